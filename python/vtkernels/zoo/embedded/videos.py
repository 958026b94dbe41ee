"""Short videos: one object moves across a scene, another appears or disappears, the rest stays.

| task      | question                          | answer                                                        |
|-----------|-----------------------------------|---------------------------------------------------------------|
| direction | which way does the red digit move? | left                                                         |
| when      | when does the blue ring appear?   | frame 4                                                       |
| changed   | what changed?                     | the red digit moves left, the blue ring appears at frame 4.   |
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vtkernels.zoo.embedded import scenes
from vtkernels.zoo.embedded.questions import Question
from vtkernels.zoo.embedded.scenes import COLOUR_NAMES, KINDS, SIDE, SLOT, SLOTS

FRAMES = 8
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
TASKS = ("direction", "when", "changed")


@dataclass(frozen=True)
class Story:
    """What happens: the object ``moving`` goes into ``direction``; ``other`` appears or disappears with frame
    ``when`` (2 ... 8)."""

    moving: str
    direction: str
    other: str
    appears: bool
    when: int

    def ask(self, task: str) -> tuple[str, str]:
        """A task's question and its answer."""
        verb = "appear" if self.appears else "disappear"
        if task == "direction":
            return f"which way does the {self.moving} move?", self.direction
        if task == "when":
            return f"when does the {self.other} {verb}?", f"frame {self.when}"
        moves = f"the {self.moving} moves {self.direction}"
        return "what changed?", f"{moves}, the {self.other} {verb}s at frame {self.when}."


def sample(rng: np.random.Generator, count: int, *, held_out: bool = False) -> tuple[NDArray[np.uint8], list[Story]]:
    """``count`` videos uint8 [count, 8, 192, 192, 3], each of four to six objects of different colours, and stories.

    Args:
        held_out: draw the digits from the glyphs that training never sees.
    """
    objects = 6
    colour = rng.random((count, len(COLOUR_NAMES))).argsort(1)[:, :objects]
    sprite, kind = scenes.sprites(rng, rng.random((count, objects)) < 0.6, held_out)
    inside = SLOT / 2 + rng.uniform(-3, 3, (count * objects, 2))
    alpha, ink = scenes.tiles(rng, sprite.ravel(), colour.ravel(), inside)
    alpha, ink = (part.reshape(count, objects, *part.shape[1:]) for part in (alpha, ink))
    canvas = np.repeat(scenes.background(rng, count)[:, None], FRAMES, 1)
    stories = []
    for video in range(count):
        story, tracks = _plan(rng, [_name(*pair) for pair in zip(kind[video], colour[video], strict=True)])
        for index, track in enumerate(tracks):
            for frame, (y, x) in track.items():
                under = canvas[video, frame, y : y + SLOT, x : x + SLOT]
                under += alpha[video, index] * (ink[video, index] - under)
        stories.append(story)
    return canvas.clip(0, 255).astype(np.uint8), stories


def ask(stories: list[Story], tasks: tuple[str, ...] = TASKS) -> list[Question]:
    """One question of each task about each video; a question's ``scene`` is the video's number."""
    return [Question(video, task, *story.ask(task)) for video, story in enumerate(stories) for task in tasks]


def _name(kind: int, colour: int) -> str:
    return f"{COLOUR_NAMES[colour]} {'digit' if KINDS[kind].isdigit() else KINDS[kind]}"


def _plan(rng: np.random.Generator, names: list[str]) -> tuple[Story, list[dict[int, tuple[int, int]]]]:
    """A story of the first two objects, and where (corner of its tile) each object is in the frames that show it."""
    direction = list(DIRECTIONS)[rng.integers(4)]
    dy, dx = DIRECTIONS[direction]
    lane = int(rng.integers(SLOTS))
    steps = np.linspace(0, 1, FRAMES)
    length = rng.integers(64, SIDE - SLOT + 1)
    start = rng.integers(0, SIDE - SLOT - length + 1)
    along = np.rint(start + length * (steps if dy + dx > 0 else 1 - steps)).astype(int).tolist()
    path = [(lane * SLOT, at) if dx else (at, lane * SLOT) for at in along]

    free = [(y, x) for y in range(SLOTS) for x in range(SLOTS) if (y if dx else x) != lane]
    places = [free[place] for place in rng.permutation(len(free))[: rng.integers(3, len(names))]]
    corners = [(y * SLOT, x * SLOT) for y, x in places]
    when, appears = int(rng.integers(2, FRAMES + 1)), bool(rng.random() < 0.5)
    shown = range(when - 1, FRAMES) if appears else range(when - 1)
    tracks = [dict(enumerate(path)), dict.fromkeys(shown, corners[0])]
    tracks += [dict.fromkeys(range(FRAMES), corner) for corner in corners[1:]]
    return Story(names[0], direction, names[1], appears, when), tracks
