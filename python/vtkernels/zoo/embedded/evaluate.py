"""What each method costs in answers and saves in time and memory, on held-out questions: ``vtk eval``."""

from __future__ import annotations

import contextlib
import functools
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

import vtkernels.attention  # noqa: F401  (registers "vtk")
from vtkernels import zoo
from vtkernels.collect_env import collect
from vtkernels.zoo.embedded import model as embedded
from vtkernels.zoo.embedded import questions, report, scenes, videos
from vtkernels.zoo.embedded.questions import Question
from vtkernels.zoo.embedded.report import BASELINES, Row
from vtkernels.zoo.measure import Cost, measure, prefill_flops
from vtkernels.zoo.recipe import BudgetError, Recipe

TASKS = tuple(questions.TASKS)
LONGEST = 64  # tokens of an answer
_HELD_OUT = 3  # the stream of the evaluation's scenes; training draws from 1 and 2


@dataclass(frozen=True)
class Batch:
    """Questions of one task, with the processor's inputs for them."""

    questions: list[Question]
    inputs: dict[str, Tensor]

    def alone(self, row: int) -> dict[str, Tensor]:
        """One question's inputs, without padding."""
        real = self.inputs["attention_mask"][row].bool()
        pixels = self.inputs["pixel_values"].unflatten(0, (len(self.questions), -1))
        return {"input_ids": self.inputs["input_ids"][row : row + 1, real], "pixel_values": pixels[row]}


def main(
    console: Console,
    *,
    folder: Path | None,
    methods: Sequence[str],
    keeps: Sequence[float],
    formats: Sequence[str],
    video: bool,
    count: int,
    rounds: int,
    seed: int,
    device: torch.device,
    out: Path,
) -> None:
    """``vtk eval``: the tables, eval.json and eval.png."""
    folder = embedded.WEIGHTS if folder is None else folder
    transformers.utils.logging.disable_progress_bar()
    model, processor = embedded.load(folder, device)
    draft = embedded.load_draft(folder / "draft", device)
    batches = held_out(processor, count, video=video, seed=seed, device=device)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("evaluating", total=num_steps(batches, methods, keeps, rounds, formats))
        rows = evaluate(model, processor, batches, methods, keeps, rounds, lambda: progress.advance(task), formats)
    total = sum(len(batch.questions) for batch in batches)
    facts = collect() | {"questions": total, "seed": seed, "video": video, "device": str(device)}
    console.print(report.accuracy_table(rows, f"accuracy on {total} held-out questions"))
    console.print(report.cost_table(rows, f"cost of one prompt, {device}, {torch.get_num_threads()} threads"))
    if not video:
        lengths = acceptance_length(model, draft, batches)
        facts["acceptance_length"] = lengths
        console.print("tokens that a verification of four draft tokens yields:", lengths, highlight=False)
    report.write_json(out / "eval.json", rows, facts)
    report.plot(out / "eval.png", rows)
    evaluated = {(row.method, row.keep) for row in rows}
    for name, keep in itertools.product(methods, keeps):
        if (name, keep) not in evaluated and (name, None) not in evaluated:
            console.print(f"{name} cannot keep as little as {keep:g} of the tokens of this encoder")
    console.print(f"wrote {out / 'eval.json'} and {out / 'eval.png'}")


def held_out(
    processor: Any, count: int, *, video: bool = False, seed: int = 0, size: int | None = None, device: Any = "cpu"
) -> list[Batch]:
    """``count`` questions on pictures or videos never trained on, rounded up so that each has one of every task.

    Batches are of one task and of at most ``size`` prompts.
    """
    tasks = videos.TASKS if video else TASKS
    pictures, asked = drawn(-(-count // len(tasks)), video, seed)
    size = size or (4 if video else 32)
    batches = []
    for task in tasks:
        of_task = [q for q in asked if q.task == task]
        for start in range(0, len(of_task), size):
            part = of_task[start : start + size]
            inputs = ask(processor, [pictures[q.scene] for q in part], [q.text for q in part], device)
            batches.append(Batch(part, inputs))
    return batches


def drawn(count: int, video: bool, seed: int) -> tuple[list[Any], list[Question]]:
    """``count`` held-out pictures, or videos as lists of frames, with a question of every task about each."""
    rng = np.random.default_rng([seed, _HELD_OUT])
    if video:
        pixels, stories = videos.sample(rng, count, held_out=True)
        return [[Image.fromarray(frame) for frame in frames] for frames in pixels], videos.ask(stories)
    batch = scenes.sample(rng, count, held_out=True)
    return [Image.fromarray(picture) for picture in batch.pixels], questions.ask(rng, batch, TASKS)


def ask(processor: Any, pictures: Sequence[Any], texts: Sequence[str], device: Any = "cpu") -> dict[str, Tensor]:
    """The processor's inputs for one question about each picture, or each list of frames, padded on the left."""
    prompts = []
    for picture, text in zip(pictures, texts, strict=True):
        content: list[dict[str, str]] = [{"type": "image"}]
        if isinstance(picture, list):
            content = []
            for frame in range(len(picture)):
                content += [{"type": "text", "text": f"frame {frame + 1} "}, {"type": "image"}]
        turn = {"role": "user", "content": [*content, {"type": "text", "text": text}]}
        prompts.append(processor.apply_chat_template([turn], add_generation_prompt=True))
    return dict(processor(images=list(pictures), text=prompts, padding=True, return_tensors="pt").to(device))


@torch.inference_mode()
def answers(model: Any, processor: Any, inputs: dict[str, Tensor]) -> list[str]:
    """Greedy answers, one a prompt."""
    out = model.generate(**inputs, max_new_tokens=LONGEST, do_sample=False)
    return processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def score(question: Question, answer: str) -> float:
    """1 or 0; for several facts, those that the answer shares with the right one, over those of the longer of both."""
    if "," not in question.answer:
        return float(answer.strip() == question.answer)
    right, given = _facts(question.answer), _facts(answer)
    return len(right & given) / max(len(right), len(given))


def _facts(text: str) -> set[str]:
    parts = text.replace("digits:", "").replace("shapes:", "").replace(".", ",").split(",")
    return {part.strip() for part in parts if part.strip()}


def accuracy(
    model: Any, processor: Any, batches: Sequence[Batch], advance: Callable[[], Any] = int
) -> dict[str, float]:
    """Mean score by task. ``advance`` is called after each batch."""
    scores: dict[str, list[float]] = {}
    for batch in batches:
        for question, answer in zip(batch.questions, answers(model, processor, batch.inputs), strict=True):
            scores.setdefault(question.task, []).append(score(question, answer))
        advance()
    return {task: statistics.fmean(of_task) for task, of_task in scores.items()}


def evaluate(
    model: Any,
    processor: Any,
    batches: Sequence[Batch],
    methods: Sequence[str],
    keeps: Sequence[float],
    rounds: int = 3,
    advance: Callable[[], Any] = int,
    formats: Sequence[str] = (),
) -> list[Row]:
    """The untouched model's row, then one of every method that prunes or merges (the baselines always among them) at
    every budget, one of every method of the cache, and one of every format of a packed cache.

    Budgets that a method cannot meet on this encoder have no row. ``advance`` is called :func:`num_steps` times, less
    often without those.
    """
    variants = _variants(model, methods, keeps, formats)
    costs = _costs(model, processor, batches, variants, rounds, advance)
    return [
        _row(model, processor, batches, variant, cost, costs[0], advance)
        for variant, cost in zip(variants, costs, strict=True)
    ]


def _row(
    model: Any,
    processor: Any,
    batches: Sequence[Batch],
    variant: tuple[str, float | None, Any],
    cost: Sequence[Cost],
    full: Sequence[Cost],
    advance: Callable[[], Any],
) -> Row:
    name, keep, attach = variant
    images = len(batches[0].inputs["pixel_values"]) // len(batches[0].questions)
    tokens: list[float] = []  # visual tokens a prompt, of each batch
    with attach() as handle:

        def note() -> None:
            tokens.append((embedded.GRID**2 if handle is None else statistics.fmean(handle.last.counts)) * images)
            advance()

        by_task = accuracy(model, processor, batches, note)
        flops = prefill_flops(model, batches[0].alone(0))
    return Row(
        method=name,
        keep=keep,
        tokens=round(statistics.fmean(tokens)),
        accuracy={task: round(value, 4) for task, value in by_task.items()},
        mean=round(statistics.fmean(by_task.values()), 4),
        prefill_ms=_median(cost, "prefill"),
        decode_ms=_median([c for c in cost if len(c.ids) > 1], "decode"),
        question_ms=_mean_total(cost),
        speedup=round(_mean_total(full) / _mean_total(cost), 3),
        kv_bytes=cost[0].kv_bytes,
        prefill_flops=flops,
    )


def num_steps(
    batches: Sequence[Batch], methods: Sequence[str], keeps: Sequence[float], rounds: int, formats: Sequence[str] = ()
) -> int:
    """How often :func:`evaluate` reports progress."""
    pruned = len(_pruning(methods)) * len(keeps)
    return (1 + pruned + len(_caches(methods, formats))) * (len(batches) + rounds + 1)


def _pruning(methods: Sequence[str]) -> list[str]:
    caches = _of_the_cache()
    return [*(name for name in methods if name not in (*BASELINES, *caches)), *BASELINES]


def _caches(methods: Sequence[str], formats: Sequence[str]) -> list[tuple[str, Recipe]]:
    """What a row is called, and its recipe."""
    named = [(name, zoo.make_recipe(name)) for name in methods if name in _of_the_cache()]
    return [*named, *((format, zoo.make_recipe("packed", format=format)) for format in formats)]


def _of_the_cache() -> set[str]:
    return {method.name for method in zoo.methods() if method.stages == ("cache",)}


@contextlib.contextmanager
def _cached(model: Any, recipe: Recipe) -> Iterator[zoo.Handle]:
    """The recipe attached, and the attention that reads its cache in the language model."""
    before = model.config.text_config._attn_implementation
    model.set_attn_implementation({"text_config": "vtk"})
    try:
        with zoo.apply(model, recipe) as handle:
            yield handle
    finally:
        model.set_attn_implementation({"text_config": before})


def _variants(
    model: Any, methods: Sequence[str], keeps: Sequence[float], formats: Sequence[str]
) -> list[tuple[str, float | None, Any]]:
    variants: list[tuple[str, float | None, Any]] = [("all tokens", None, contextlib.nullcontext)]
    variants += [(name, None, functools.partial(_cached, model, recipe)) for name, recipe in _caches(methods, formats)]
    for name in _pruning(methods):
        for keep in keeps:
            with contextlib.suppress(BudgetError):
                zoo.apply(model, name, keep).remove()
                variants.append((name, keep, lambda name=name, keep=keep: zoo.apply(model, name, keep)))
    return variants


def _costs(
    model: Any,
    processor: Any,
    batches: Sequence[Batch],
    variants: Sequence[tuple[str, float | None, Any]],
    rounds: int,
    advance: Callable[[], Any],
) -> list[list[Cost]]:
    """Each variant's costs, one question of each task a round, the variants taking turns; the first round warms up."""
    first = {batch.questions[0].task: batch for batch in reversed(batches)}
    costs: list[list[Cost]] = [[] for _ in variants]
    for turn in range(rounds + 1):
        for cost, (_, _, attach) in zip(costs, variants, strict=True):
            with attach():
                for batch in first.values():
                    answer = processor.tokenizer(batch.questions[0].answer, add_special_tokens=False).input_ids
                    measured = measure(model, batch.alone(0), len(answer) + 1)
                    if turn > 0:
                        cost.append(measured)
            advance()
    return costs


def _median(costs: Sequence[Cost], name: str) -> float:
    return round(statistics.median(getattr(cost, name) for cost in costs) * 1e3, 3)


def _mean_total(costs: Sequence[Cost]) -> float:
    """Milliseconds a question: the mean over answer lengths of the median over rounds."""
    by_length: dict[int, list[float]] = {}
    for cost in costs:
        by_length.setdefault(len(cost.ids), []).append(cost.total)
    totals = [statistics.median(of_length) for of_length in by_length.values() for _ in of_length]
    return round(statistics.fmean(totals) * 1e3, 3)


@torch.inference_mode()
def acceptance_length(model: Any, draft: Any, batches: Sequence[Batch], proposals: int = 4) -> dict[str, float]:
    """Tokens a verification yields with ``proposals`` greedy draft tokens each, by task, over the model's own answers.

    Greedy speculation accepts the proposals up to the first that differs from the model's choice, which it then takes
    instead. The draft continues accepted text alone, so its choices after the model's own tokens tell every round.
    """
    tokens: dict[str, int] = {}
    verifications: dict[str, int] = {}
    for batch in batches:
        task, prompt = batch.questions[0].task, batch.inputs["input_ids"]
        ids = model.generate(**batch.inputs, max_new_tokens=LONGEST, do_sample=False)
        visual = torch.cat(list(model.model.get_image_features(batch.inputs["pixel_values"]).pooler_output))
        embeds = draft.get_input_embeddings()(ids)
        embeds[ids == model.config.image_token_id] = visual.to(embeds.dtype)
        mask = torch.cat([batch.inputs["attention_mask"], torch.ones_like(ids[:, prompt.shape[1] :])], 1)
        chosen = draft(inputs_embeds=embeds, attention_mask=mask).logits.argmax(-1)
        start = prompt.shape[1]
        for row, agrees in zip(ids[:, start:], (chosen[:, :-1] == ids[:, 1:])[:, start - 1 :], strict=True):
            length = int((row != embedded.PAD).sum())
            tokens[task] = tokens.get(task, 0) + length
            verifications[task] = verifications.get(task, 0) + _rounds(agrees[:length].tolist(), proposals)
    by_task = {task: round(tokens[task] / verifications[task], 3) for task in tokens}
    return by_task | {"all": round(sum(tokens.values()) / sum(verifications.values()), 3)}


def _rounds(agrees: list[bool], proposals: int) -> int:
    """Verifications that an answer takes, given where the draft agrees with it."""
    position = count = 0
    while position < len(agrees):
        window = agrees[position : position + proposals]
        accepted = window.index(False) if False in window else len(window)
        position += accepted + 1
        count += 1
    return count
