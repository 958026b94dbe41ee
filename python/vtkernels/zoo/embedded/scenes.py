"""Rendered scenes: handwritten digits and coloured shapes on textured backgrounds, with what is where.

A scene has 6 x 6 slots of 32 pixels; an object stands somewhere inside its slot. Everything is drawn for a whole batch
at once with numpy and depends on the generator alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SIDE = 192  # pixels
PATCH = 12
GRID = SIDE // PATCH
SLOT = 32
SLOTS = SIDE // SLOT

COLOURS = {
    "red": (230, 40, 40),
    "orange": (250, 140, 30),
    "yellow": (245, 235, 60),
    "green": (50, 200, 60),
    "cyan": (60, 225, 235),
    "blue": (70, 100, 250),
    "purple": (190, 70, 240),
    "white": (245, 245, 245),
}
COLOUR_NAMES = tuple(COLOURS)
SHAPES = ("circle", "square", "triangle", "cross", "ring")
KINDS = (*map(str, range(10)), *SHAPES)  # a digit is the kind of its value
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
NOTHING = -1

HELD_OUT_GLYPHS = 297  # of 1797
_SPRITE = 28  # pixels, of which an object fills the inner 24
_JITTER = 3.5  # pixels by which an object's centre may leave its slot's
_REACH = 15.0  # pixels from an object's centre, along each axis, within which a patch's centre belongs to it


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes: ``pixels`` uint8 [B, 192, 192, 3], and what stands in each slot.

    ``kind`` (index into KINDS) and ``colour`` (into COLOUR_NAMES) are int64 [B, 36], NOTHING in an empty slot;
    ``centre`` float32 [B, 36, 2] holds the objects' (y, x) in pixels; ``offset`` is where the slots' corner lies.
    """

    pixels: NDArray[np.uint8]
    kind: NDArray[np.int64]
    colour: NDArray[np.int64]
    centre: NDArray[np.float32]
    offset: tuple[int, int] = (0, 0)

    def __len__(self) -> int:
        return len(self.pixels)


@dataclass(frozen=True)
class PatchLabels:
    """What each of the 256 patches shows: int64 [B, 256] each, NOTHING where no object is.

    ``row`` and ``column`` (thirds of the scene) are the object's, or the patch's own where no object is. ``anchor``
    says whether the patch holds an object's centre.
    """

    kind: NDArray[np.int64]
    colour: NDArray[np.int64]
    row: NDArray[np.int64]
    column: NDArray[np.int64]
    anchor: NDArray[np.bool_]


def sample(rng: np.random.Generator, count: int, *, held_out: bool = False, crowded: bool = False) -> Scenes:
    """``count`` scenes of 2 to 6 digits, each of another colour, and 2 to 8 shapes.

    Args:
        held_out: draw the digits from the glyphs that training never sees.
        crowded: 6 to 36 objects of any kind and colour, every other batch off the slots' places: for training the
            vision tower, which learns from each object.
    """
    slots = SLOTS * SLOTS
    offset = (0, 0)
    order = rng.random((count, slots)).argsort(1)
    if crowded:
        objects = rng.integers(6, slots + 1, (2, count, 1)).max(0)
        present = order < objects
        digit = present & (rng.random((count, slots)) < 0.8)
        colour = rng.integers(0, len(COLOURS), (count, slots))
        if rng.random() < 0.5:
            offset = (int(rng.integers(1, SLOT)), int(rng.integers(1, SLOT)))
            present &= np.arange(slots) % SLOTS < SLOTS - 1  # the others would leave the picture
            present &= np.arange(slots) // SLOTS < SLOTS - 1
    else:
        digits = rng.integers(2, 7, (count, 1))
        present = order < digits + rng.integers(2, 9, (count, 1))
        digit = order < digits
        distinct = rng.random((count, len(COLOURS))).argsort(1)
        colour = np.take_along_axis(distinct, np.minimum(order, len(COLOURS) - 1), 1)
        colour = np.where(digit, colour, rng.integers(0, len(COLOURS), (count, slots)))
    sprite, kind = sprites(rng, digit, held_out)
    middle = np.arange(SLOTS) * SLOT + SLOT / 2
    grid = np.stack(np.meshgrid(middle, middle, indexing="ij"), -1).reshape(slots, 2)
    centre = (grid + offset + rng.uniform(-_JITTER, _JITTER, (count, slots, 2))).astype(np.float32)
    scenes = Scenes(
        pixels=np.empty((count, SIDE, SIDE, 3), np.uint8),
        kind=np.where(present, kind, NOTHING),
        colour=np.where(present, colour, NOTHING),
        centre=centre,
        offset=offset,
    )
    dy, dx = offset
    canvas = np.roll(background(rng, count), (-dy, -dx), (1, 2))
    _paint(canvas, rng, scenes, sprite)
    scenes.pixels[...] = np.roll(canvas.clip(0, 255), (dy, dx), (1, 2))
    return scenes


def sprites(
    rng: np.random.Generator, digit: NDArray[np.bool_], held_out: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """A random glyph where ``digit`` is set, a random shape elsewhere: sprite numbers, and the kinds they are."""
    glyphs, values = _glyph_indices(held_out), _atlas()[1]
    glyph = glyphs[rng.integers(0, len(glyphs), digit.shape)]
    shape = rng.integers(0, len(SHAPES), digit.shape)
    return np.where(digit, glyph, len(values) + shape), np.where(digit, values[glyph], 10 + shape)


def patch_labels(scenes: Scenes) -> PatchLabels:
    """The labels of every patch: a patch shows the object of the slot its centre falls in, if that is near enough."""
    middle = np.arange(GRID) * PATCH + PATCH / 2
    y, x = (axis.ravel() for axis in np.meshgrid(middle, middle, indexing="ij"))
    dy, dx = scenes.offset
    # A patch before the first slot takes that slot's object, which is then too far away.
    slot = (np.maximum(y - dy, 0) // SLOT * SLOTS + np.maximum(x - dx, 0) // SLOT).astype(np.int64)
    centre = scenes.centre[:, slot]
    distance = np.abs(centre - np.stack([y, x], -1)).max(-1)
    kind = scenes.kind[:, slot]
    shown = (kind != NOTHING) & (distance < _REACH)
    third = (np.where(shown[..., None], centre, np.stack([y, x], -1)) // (SIDE / 3)).astype(np.int64)
    return PatchLabels(
        kind=np.where(shown, kind, NOTHING),
        colour=np.where(shown, scenes.colour[:, slot], NOTHING),
        row=third[..., 0],
        column=third[..., 1],
        anchor=shown & (distance <= PATCH / 2),
    )


@cache
def _atlas() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Sprites [1797 + 5, 28, 28] in 0 ... 1, digits before shapes, and the digits' values."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    edge = (_SPRITE - 24) // 2
    sprites = np.zeros((len(digits.images) + len(SHAPES), _SPRITE, _SPRITE), np.float32)
    inner = sprites[:, edge:-edge, edge:-edge]
    for sprite, image in zip(inner, digits.images, strict=False):
        glyph = Image.fromarray((image / 16).astype(np.float32))
        sprite[...] = np.asarray(glyph.resize((24, 24), Image.Resampling.BICUBIC)).clip(0, 1)
    for sprite, name in zip(inner[len(digits.images) :], SHAPES, strict=True):
        sprite[...] = _shape(name)
    return sprites, digits.target.astype(np.int64)


def _shape(name: str) -> NDArray[np.float32]:
    size = 240
    picture = Image.new("L", (size, size))
    draw = ImageDraw.Draw(picture)
    if name == "circle":
        draw.ellipse((20, 20, 220, 220), fill=255)
    elif name == "square":
        draw.rectangle((30, 30, 210, 210), fill=255)
    elif name == "triangle":
        draw.polygon(((120, 15), (230, 215), (10, 215)), fill=255)
    elif name == "cross":
        draw.rectangle((85, 15, 155, 225), fill=255)
        draw.rectangle((15, 85, 225, 155), fill=255)
    else:
        draw.ellipse((15, 15, 225, 225), outline=255, width=50)
    return np.asarray(picture.resize((24, 24), Image.Resampling.BOX), np.float32) / np.float32(255)


@cache
def _glyph_indices(held_out: bool) -> NDArray[np.int64]:
    order = np.random.default_rng(0).permutation(len(_atlas()[1]))
    return np.sort(order[:HELD_OUT_GLYPHS] if held_out else order[HELD_OUT_GLYPHS:])


@cache
def _smooth(points: int) -> NDArray[np.float32]:
    """[192, points]: linear interpolation of values at evenly spaced points."""
    at = np.linspace(0, points - 1, SIDE)[:, None]
    return np.maximum(0, 1 - np.abs(at - np.arange(points))).astype(np.float32)


def background(rng: np.random.Generator, count: int) -> NDArray[np.float32]:
    """Clouds, stripes, strokes and grain, all dim: [count, 192, 192, 3]."""

    def uniform(low: float, high: float, *shape: int) -> NDArray[np.float32]:
        return rng.uniform(low, high, (count, *shape)).astype(np.float32)

    points, strokes = 7, 10
    base = uniform(25, 75, 1, 1, 1) + uniform(-12, 12, 3, 1, 1)
    clouds = _smooth(points) @ (base + uniform(-22, 22, 3, points, points)) @ _smooth(points).T
    # sin(fy + gx) = sin(fy) cos(gx) + cos(fy) sin(gx)
    along = np.arange(SIDE, dtype=np.float32)
    fy = uniform(0.05, 0.6, 1) * along + uniform(0, 6.28, 1)
    gx = uniform(-0.6, 0.6, 1) * along
    rows, columns = np.stack([np.sin(fy), np.cos(fy)], 2), np.stack([np.cos(gx), np.sin(gx)], 1)
    stripes = (uniform(0, 12, 1, 1) * rows) @ columns
    # A stroke is the product of a bump along y and one along x.
    y, x = (np.exp(-(((along - uniform(0, SIDE, strokes, 1)) / uniform(1, 9, strokes, 1)) ** 2)) for _ in "yx")
    tint = uniform(-40, 60, 1, 1, strokes) + uniform(-15, 15, 3, 1, strokes)
    grain = rng.integers(0, 20, (count, 1, SIDE, SIDE), dtype=np.uint8)
    canvas = clouds + stripes[:, None] + (y.transpose(0, 2, 1)[:, None] * tint) @ x[:, None] + grain
    return np.ascontiguousarray(canvas.transpose(0, 2, 3, 1))


def _paint(canvas: NDArray[np.float32], rng: np.random.Generator, scenes: Scenes, sprite: NDArray[np.int64]) -> None:
    """Draws each object into its slot."""
    where = np.nonzero(scenes.kind != NOTHING)
    corner = np.stack([where[1] // SLOTS, where[1] % SLOTS], -1) * SLOT + scenes.offset
    alpha, ink = tiles(rng, sprite[where], scenes.colour[where], scenes.centre[where] - corner)
    view = canvas.reshape(-1, SLOTS, SLOT, SLOTS, SLOT, 3).transpose(0, 1, 3, 2, 4, 5)
    slots = (where[0], where[1] // SLOTS, where[1] % SLOTS)
    under = view[slots]
    view[slots] = under + alpha * (ink - under)


def tiles(
    rng: np.random.Generator, sprite: NDArray[np.int64], colour: NDArray[np.int64], centre: NDArray[np.floating]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Coverage [M, 32, 32, 1] and ink [M, 1, 1, 3] of M objects around ``centre`` [M, 2], slightly turned, sheared and
    scaled."""
    total = len(sprite)
    angle, shear, scale, gain = (
        rng.uniform(*limits, (total, 1, 1)).astype(np.float32)
        for limits in ((-0.2, 0.2), (-0.12, 0.12), (0.85, 1.03), (1.2, 1.7))
    )
    palette = np.array([COLOURS[name] for name in COLOUR_NAMES], np.float32)
    ink = palette[colour] * rng.uniform(0.85, 1.0, (total, 1)) + rng.uniform(-12, 12, (total, 3))

    middle = (centre - 0.5).astype(np.float32)[..., None, None]
    pixel = np.arange(SLOT, dtype=np.float32)
    dy = (pixel[:, None] - middle[:, 0]) / scale
    dx = (pixel - middle[:, 1]) / scale
    v = np.cos(angle) * dy + np.sin(angle) * dx
    u = np.cos(angle) * dx - np.sin(angle) * dy + shear * v
    alpha = np.clip(_sample(sprite, v, u) * gain, 0, 1)
    return alpha[..., None], ink.astype(np.float32)[:, None, None]


def _sample(sprite: NDArray[np.int64], v: NDArray[np.float32], u: NDArray[np.float32]) -> NDArray[np.float32]:
    """The sprites' values at (v, u) from their centres, bilinear; their zero border serves everything outside."""
    atlas = _atlas()[0]
    middle, last = (_SPRITE - 1) / 2, _SPRITE - 1.001
    down, right = (np.clip(axis + np.float32(middle), 0, np.float32(last)) for axis in (v, u))
    top, left = down.astype(np.int32), right.astype(np.int32)
    down, right = down - top, right - left
    flat = atlas.reshape(-1)
    at = sprite.astype(np.int32)[:, None, None] * _SPRITE**2 + top * _SPRITE + left
    upper = flat[at] * (1 - right) + flat[at + 1] * right
    lower = flat[at + _SPRITE] * (1 - right) + flat[at + _SPRITE + 1] * right
    return upper * (1 - down) + lower * down
