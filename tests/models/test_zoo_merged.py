"""A stage may merge and keep different numbers of images: what becomes of the prompt, and what the last run says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from tests.models import tiny
from vtkernels import zoo
from vtkernels.zoo.recipe import Context, Merged

GRID = 4
N = GRID * GRID
PROMPTS = [(1, 4), (3, 9), (0, 5), (2, 7)]


def ragged(ctx: Context) -> Merged:
    """One row of each image's first ``keep`` patches; of later frames also the last patch, alone; the rest dropped."""
    rows, counts, owner = [], [], torch.full(ctx.tokens.shape[:2], -1)
    for video in ctx.videos:
        for frame in range(video.start, video.stop):
            owner[frame, : ctx.keep] = len(rows)
            rows.append(ctx.tokens[frame, : ctx.keep].mean(0))
            if frame > video.start:
                owner[frame, -1] = len(rows)
                rows.append(ctx.tokens[frame, -1])
            counts.append(1 + (frame > video.start))
    return Merged(torch.stack(rows), counts, owner)


@dataclass(frozen=True)
class Early(zoo.Recipe):
    name: ClassVar[str] = "early"

    def vision_encoder(self, ctx: Context) -> Merged:
        return ragged(ctx)


@dataclass(frozen=True)
class Late(zoo.Recipe):
    name: ClassVar[str] = "late"

    def after_projector(self, ctx: Context) -> Merged:
        return ragged(ctx)


@dataclass(frozen=True)
class FirstFrame(zoo.Recipe):
    """Every frame's patches into those of its video's first frame: no token is left of the other frames."""

    name: ClassVar[str] = "first_frame"

    def after_projector(self, ctx: Context) -> Merged:
        rows, counts, owner = [], [], torch.empty(ctx.tokens.shape[:2], dtype=torch.int64)
        for index, video in enumerate(ctx.videos):
            rows.append(ctx.tokens[video].mean(0))
            counts += [N] + [0] * (video.stop - video.start - 1)
            owner[video] = index * N + torch.arange(N)
        return Merged(torch.cat(rows), counts, owner)


@pytest.fixture(scope="module")
def model():
    return tiny.llava()


def by_hand(model, last, features):
    """Logits of the shortened prompt with ``features`` [rows, C] embedded by hand, one unpadded prompt."""
    embeds = model.get_input_embeddings()(last.input_ids)
    embeds[last.input_ids == tiny.IMAGE] = features
    return model(inputs_embeds=embeds).logits


@torch.no_grad()
def test_merged_rows_stand_in_their_images_places(model):
    batch = tiny.inputs([(3, 6)])
    whole = torch.stack(list(model.get_image_features(pixel_values=batch["pixel_values"]).pooler_output))
    with zoo.apply(model, FirstFrame(), keep=5) as handle:
        logits = model(**batch).logits
    assert handle.last.indices is None and handle.last.counts == [N, 0, 0]
    assert handle.last.owner.tolist() == [list(range(N))] * 3
    assert handle.last.tokens_after == [1 + 6 + N]
    torch.testing.assert_close(logits, by_hand(model, handle.last, whole.mean(0)), rtol=1e-4, atol=1e-4)
    ids = [token for token in batch["input_ids"][0].tolist() if token != tiny.IMAGE]
    # Begin of sequence, the first word, the first image; the other words follow it without a gap.
    assert handle.last.input_ids[0].tolist() == [*ids[:2], *[tiny.IMAGE] * N, *ids[2:]]


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("recipe", [Early(), Late()], ids=["early", "late"])
def test_images_may_keep_different_numbers(model, recipe, side):
    batch = tiny.inputs(PROMPTS, side=side)
    with zoo.apply(model, recipe, keep=5) as handle:
        logits, last = model(**batch).logits, handle.last
        together = tiny.new_tokens(model, batch)
        assert last.counts == [1, 1, 2, 2, 1, 2] and last.rows == [0, 1, 1, 1, 3, 3]
        assert last.tokens_after == [1 + 4 + 1, 1 + 9 + 5, 1 + 5, 1 + 7 + 3]
        kept, dropped = [0] * 5, [-1] * 10
        assert last.owner[3].tolist() == [3] * 5 + dropped + [4]  # the third frame of the second prompt
        assert last.owner[0].tolist() == kept + dropped + [-1]
        for index, (images, _) in enumerate(PROMPTS):
            alone = tiny.row(batch, PROMPTS, index)
            mask = last.attention_mask[index].bool()
            torch.testing.assert_close(logits[index, mask], model(**alone).logits[0], rtol=1e-4, atol=1e-4)
            if images:
                first = sum(count for count, _ in PROMPTS[:index])
                assert torch.equal(handle.last.owner, last.owner[first : first + images])
            assert torch.equal(together[index : index + 1], tiny.new_tokens(model, alone))


@torch.no_grad()
def test_merging_before_the_projector_is_projecting_the_merged_rows(model):
    batch, seen = tiny.inputs([(2, 3)]), []
    projector = model.model.multi_modal_projector
    watch = projector.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    model.get_image_features(pixel_values=batch["pixel_values"])
    watch.remove()
    features = seen[0]
    rows = projector(torch.stack([features[0, :5].mean(0), features[1, :5].mean(0), features[1, -1]]))
    with zoo.apply(model, Early(), keep=5) as handle:
        logits = model(**batch).logits
    torch.testing.assert_close(logits, by_hand(model, handle.last, rows), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_owners_follow_a_selection(model):
    """The second stage's owners are told of the encoder's patches, whatever the first stage dropped."""
    batch = tiny.inputs([(2, 3)])
    with zoo.apply(model, "fastervlm", keep=8) as handle:
        model(**batch)
        chosen = handle.last.indices.tolist()
        assert handle.last.counts == [8, 8]
        assert [[int(i) for i in (owner >= 0).nonzero()] for owner in handle.last.owner] == chosen
        with zoo.apply(model, Late(), keep=5):
            model(**batch)
            expected = [[-1] * N, [-1] * N]
            for frame, patches in enumerate(chosen):
                for patch in patches[:5]:
                    expected[frame][patch] = frame
            expected[1][chosen[1][-1]] = 2
            assert handle.last.owner.tolist() == expected


def test_tokens_that_merged_are_no_patches(model):
    refused = pytest.raises(ValueError, match=r"todre: expected one patch a token .* before after_projector merged")
    with zoo.apply(model, Early(), keep=5), zoo.apply(model, "todre", keep=2), refused:
        model(**tiny.inputs([(2, 3)]))


def test_even():
    merged = Merged.even(torch.arange(8.0).view(2, 2, 2), torch.tensor([[0, 1, -1], [1, 1, 0]]))
    assert merged.tokens.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert merged.counts == [2, 2] and merged.owner.tolist() == [[0, 1, -1], [3, 3, 2]]
