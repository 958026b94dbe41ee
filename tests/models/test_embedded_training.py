"""The training of the embedded model: its data, its one pass over a picture for many questions, and its resumption."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from vtkernels import cli
from vtkernels.zoo import embedded
from vtkernels.zoo.embedded import ask, questions, scenes, train, videos
from vtkernels.zoo.embedded.model import VOCABULARY, processor

TINY = train.Config(see_steps=2, answer_steps=2, video_steps=3, draft_steps=2, batch=2, probe_every=100)


@pytest.fixture(scope="module")
def run():
    return train.Run(TINY)


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("crowded", [False, True])
def test_scenes_depend_on_the_generator_alone(crowded):
    one, two = (scenes.sample(generator(), 3, crowded=crowded) for _ in range(2))
    for field in dataclasses.fields(one):
        assert np.array_equal(getattr(one, field.name), getattr(two, field.name)), field.name
    assert not np.array_equal(one.pixels, scenes.sample(generator(1), 3, crowded=crowded).pixels)


def test_held_out_glyphs_are_never_trained_on():
    held_out, trained = (set(scenes._glyph_indices(which).tolist()) for which in (True, False))
    assert len(held_out) == scenes.HELD_OUT_GLYPHS
    assert not held_out & trained and len(held_out | trained) == 1797


@pytest.mark.parametrize("crowded", [False, True])
def test_patch_labels_are_where_the_objects_are(crowded):
    for seed in range(4):  # crowded batches stand on the slots' places or off them
        batch = scenes.sample(generator(seed), 4, crowded=crowded)
        labels = scenes.patch_labels(batch)
        assert labels.anchor.sum() == (batch.kind != scenes.NOTHING).sum()
        for scene, slot in zip(*np.nonzero(batch.kind != scenes.NOTHING), strict=True):
            y, x = batch.centre[scene, slot]
            patch = int(y // scenes.PATCH) * scenes.GRID + int(x // scenes.PATCH)
            assert labels.kind[scene, patch] == batch.kind[scene, slot]
            assert labels.colour[scene, patch] == batch.colour[scene, slot]
            assert (labels.row[scene, patch], labels.column[scene, patch]) == (y // 64, x // 64)


def test_an_object_has_its_colour_at_its_place():
    batch = scenes.sample(generator(), 8)
    for scene, slot in zip(*np.nonzero(np.isin(batch.kind, [10, 11])), strict=True):  # circles and squares are solid
        y, x = batch.centre[scene, slot].astype(int)
        ink = scenes.COLOURS[scenes.COLOUR_NAMES[batch.colour[scene, slot]]]
        assert np.abs(batch.pixels[scene, y, x].astype(int) - ink).max() < 60


def test_answers_follow_from_the_scene():
    scene = scenes.Scenes(
        pixels=np.zeros((1, 192, 192, 3), np.uint8),
        kind=np.full((1, 36), scenes.NOTHING),
        colour=np.full((1, 36), scenes.NOTHING),
        centre=np.zeros((1, 36, 2), np.float32),
    )
    for slot, kind, colour in ((0, "7", "red"), (35, "3", "blue"), (14, "ring", "red")):
        scene.kind[0, slot], scene.colour[0, slot] = scenes.KINDS.index(kind), scenes.COLOUR_NAMES.index(colour)
    asked = questions.ask(generator(), scene, tuple(questions.TASKS) * 40)
    answers = {q.text: q.answer for q in asked}
    expected = {
        "what digit is red?": "7",
        "what digit is blue?": "3",
        "how many rings are there?": "1",
        "how many digits are there?": "2",
        "how many red shapes are there?": "1",
        "where is the red ring?": "middle center",
        "where is the blue digit?": "bottom right",
        "which digit is larger, blue or red?": "red",
        "is the red digit left of the blue digit?": "yes",
        "is the blue digit left of the red digit?": "no",
        "describe the picture.": "digits: red 7 at top left, blue 3 at bottom right. "
        "shapes: 0 circles, 0 squares, 0 triangles, 0 crosses, 1 ring.",
    }
    assert expected.items() <= answers.items()


def test_every_word_is_in_the_vocabulary_and_comes_back():
    tokenizer = processor().tokenizer
    asked = questions.ask(generator(), scenes.sample(generator(), 16), tuple(questions.TASKS))
    asked += videos.ask(videos.sample(generator(), 16)[1])
    for question in asked:
        for text in (question.text, question.answer):
            ids = tokenizer(text, add_special_tokens=False).input_ids
            assert VOCABULARY.index("<unk>") not in ids, text
            assert tokenizer.decode(ids) == text


def test_the_moving_object_moves_as_told():
    pixels, stories = videos.sample(generator(), 12)
    for frames, story in zip(pixels.astype(int), stories, strict=True):
        ink = np.array(scenes.COLOURS[story.moving.split()[0]])
        distance = np.abs(frames - ink).sum(-1)
        for frame in range(videos.FRAMES - 1):
            if frame + 2 == story.when:
                continue  # the other object changes too
            nearer = distance[frame] - distance[frame + 1]  # towards the object's colour: it has come
            came, went = (centroid(np.maximum(side, 0)) for side in (nearer, -nearer))
            assert (came - went) @ np.array(videos.DIRECTIONS[story.direction]) > 4


def centroid(weights):
    at = np.stack(np.meshgrid(*map(np.arange, weights.shape), indexing="ij"), -1)
    return (at * weights[..., None]).sum((0, 1)) / weights.sum()


@torch.no_grad()
@pytest.mark.parametrize("video", [False, True])
def test_one_pass_for_many_questions_is_the_model_as_everybody_calls_it(run, video):
    if video:
        pixels, stories = videos.sample(generator(), 1)
        asked = videos.ask(stories)
        picture = [[Image.fromarray(frame) for frame in pixels[0]]]
        tokens = run.tokens(run.features(pixels[0]))[None]
        places = torch.arange(256).expand(1, videos.FRAMES, -1)
    else:
        batch = scenes.sample(generator(), 1)
        asked = questions.ask(generator(), batch, train.TASKS)
        picture, tokens, places = [Image.fromarray(batch.pixels[0])], run.tokens(run.features(batch.pixels)), None
    rows = train.Rows.encode(run.tokenizer, asked)
    language = run.model.model.language_model
    logits = run.answer_logits(language, run.read(language, tokens, places), rows)
    start = 0
    for question in asked:
        answer = run.tokenizer(question.answer, add_special_tokens=False, return_tensors="pt").input_ids
        inputs = ask(processor(), picture, [question.text])
        ids = torch.cat([inputs["input_ids"], answer], 1)
        expected = run.model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0, -answer.shape[1] - 1 :]
        torch.testing.assert_close(logits[start : start + len(expected)], expected, rtol=1e-3, atol=1e-4)
        start += len(expected)
    assert start == len(logits)


def test_a_resumed_run_is_the_run_without_the_interruption(tmp_path, monkeypatch):
    whole = train.train(TINY, tmp_path / "whole")
    monkeypatch.setattr(train.Run, "advance", interrupted(train.Run.advance, at=5))
    always = dataclasses.replace(TINY, save_seconds=0.0)
    with pytest.raises(KeyboardInterrupt):
        train.train(always, tmp_path / "parts")
    assert torch.full((1,), 1e-40).mul(1.0).item() > 0, "training flushes denormals, and leaves the caller's alone"
    monkeypatch.undo()
    resumed = train.train(always, tmp_path / "parts")
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    assert not torch.equal(whole.draft.model.norm.weight, torch.ones(128))


def interrupted(advance, at):
    def wrapped(run):
        if run.step == at:
            raise KeyboardInterrupt
        return advance(run)

    return wrapped


def test_a_folder_without_weights_is_named(tmp_path):
    for load in (embedded.load, embedded.load_draft):
        with pytest.raises(FileNotFoundError, match=f"no trained weights in {tmp_path}"):
            load(tmp_path)


def test_the_demo_says_what_videos_need():
    run = CliRunner().invoke(cli.app, ["demo", "--video", "--geometry", "clip-l"])
    assert run.exit_code == 1 and "leave out --geometry" in run.output
