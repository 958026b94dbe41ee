"""Questions about a scene, with their answers.

| task     | question                              | answer                                  |
|----------|---------------------------------------|-----------------------------------------|
| digit    | what digit is red?                    | 7                                       |
| count    | how many circles are there?           | 3                                       |
| where    | where is the blue square?             | top left (a third of the height, width) |
| compare  | which digit is larger, red or blue?   | red                                     |
| beside   | is the red digit left of the blue digit? | yes                                  |
| describe | describe the picture.                 | every digit and every count of shapes   |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vtkernels.zoo.embedded.scenes import COLOUR_NAMES, COLUMNS, KINDS, ROWS, SHAPES, SLOTS, Scenes

PLURALS = {shape: {"cross": "crosses"}.get(shape, f"{shape}s") for shape in SHAPES}


@dataclass(frozen=True)
class Question:
    """``scene`` is the scene's number in its batch."""

    scene: int
    task: str
    text: str
    answer: str


@dataclass(frozen=True)
class _Object:
    kind: str
    colour: str
    slot: int

    @property
    def is_digit(self) -> bool:
        return self.kind.isdigit()

    @property
    def name(self) -> str:
        return f"{self.colour} {'digit' if self.is_digit else self.kind}"

    @property
    def place(self) -> str:
        return f"{ROWS[self.slot // SLOTS * 3 // SLOTS]} {COLUMNS[self.slot % SLOTS * 3 // SLOTS]}"


def ask(rng: np.random.Generator, scenes: Scenes, tasks: tuple[str, ...]) -> list[Question]:
    """One question of each task (which may repeat) about each scene."""
    questions = []
    for scene in range(len(scenes)):
        objects = _objects(scenes, scene)
        for task in tasks:
            text, answer = TASKS[task](rng, objects)
            questions.append(Question(scene, task, text, answer))
    return questions


def _objects(scenes: Scenes, scene: int) -> list[_Object]:
    kinds, colours = scenes.kind[scene], scenes.colour[scene]
    return [_Object(KINDS[kinds[slot]], COLOUR_NAMES[colours[slot]], int(slot)) for slot in np.nonzero(kinds >= 0)[0]]


def _digit(rng: np.random.Generator, objects: list[_Object]) -> tuple[str, str]:
    digit = _pick(rng, [o for o in objects if o.is_digit])
    return f"what digit is {digit.colour}?", digit.kind


def _count(rng: np.random.Generator, objects: list[_Object]) -> tuple[str, str]:
    shapes = [o for o in objects if not o.is_digit]
    draw = rng.random()
    if draw < 0.15:
        return "how many digits are there?", str(len(objects) - len(shapes))
    if draw < 0.6:
        shape = _pick(rng, shapes).kind if rng.random() < 0.8 else _pick(rng, list(SHAPES))
        return f"how many {PLURALS[shape]} are there?", str(sum(o.kind == shape for o in shapes))
    colour = _pick(rng, shapes).colour if rng.random() < 0.8 else _pick(rng, list(COLOUR_NAMES))
    return f"how many {colour} shapes are there?", str(sum(o.colour == colour for o in shapes))


def _where(rng: np.random.Generator, objects: list[_Object]) -> tuple[str, str]:
    names = [o.name for o in objects]
    found = _pick(rng, [o for o in objects if names.count(o.name) == 1])
    return f"where is the {found.name}?", found.place


def _compare(rng: np.random.Generator, objects: list[_Object]) -> tuple[str, str]:
    first, second = _two_digits(rng, objects)
    if first.kind == second.kind:
        return f"which digit is larger, {first.colour} or {second.colour}?", "neither"
    larger = max(first, second, key=lambda o: int(o.kind))
    return f"which digit is larger, {first.colour} or {second.colour}?", larger.colour


def _beside(rng: np.random.Generator, objects: list[_Object]) -> tuple[str, str]:
    first, second = _two_digits(rng, objects)
    answer = "yes" if first.slot % SLOTS < second.slot % SLOTS else "no"
    return f"is the {first.name} left of the {second.name}?", answer


def _describe(rng: np.random.Generator, objects: list[_Object]) -> tuple[str, str]:
    """The digits in the order of their colours, then how many there are of each shape."""
    digits = sorted((o for o in objects if o.is_digit), key=lambda o: COLOUR_NAMES.index(o.colour))
    listed = ", ".join(f"{o.colour} {o.kind} at {o.place}" for o in digits)
    counts = {shape: sum(o.kind == shape for o in objects) for shape in SHAPES}
    counted = ", ".join(f"{count} {shape if count == 1 else PLURALS[shape]}" for shape, count in counts.items())
    return "describe the picture.", f"digits: {listed}. shapes: {counted}."


def _two_digits(rng: np.random.Generator, objects: list[_Object]) -> list[_Object]:
    digits = [o for o in objects if o.is_digit]
    return [digits[index] for index in rng.permutation(len(digits))[:2]]


def _pick(rng: np.random.Generator, items: list):
    return items[rng.integers(len(items))]


TASKS: dict[str, Callable[[np.random.Generator, list[_Object]], tuple[str, str]]] = {
    "digit": _digit,
    "count": _count,
    "where": _where,
    "compare": _compare,
    "beside": _beside,
    "describe": _describe,
}
