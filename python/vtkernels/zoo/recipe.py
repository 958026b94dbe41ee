"""What a method is made of: the stages of a model, a recipe that claims some, and what a stage sees and returns.

A recipe is a frozen dataclass. Its fields are the method's options with their defaults; it claims a stage by
defining the method of that name, which takes a :class:`Context` and returns the kept tokens with their indices, or
:class:`Merged` tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vtkernels import attention_scores

Stage = Literal["vision_layers", "vision_encoder", "after_projector", "between_layers", "cache", "decoding"]

# In the order in which a token meets them. An adapter says which ones it serves; LLaVA's serves the first five.
STAGES: tuple[Stage, ...] = (
    "vision_layers",
    "vision_encoder",
    "after_projector",
    "between_layers",
    "cache",
    "decoding",
)

# What pruning returns: kept tokens [images, keep, C] and their indices int64 [images, keep] into ctx.tokens, ascending.
Kept = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Merged:
    """What merging returns, and whatever keeps more of one image than of another.

    Attributes:
        tokens: [rows, C], the visual tokens image after image, each image's in the order in which the language model
            is to see them.
        counts: how many of them stand in the place of each image; 0 is allowed.
        owner: int64 [images, n], the row of ``tokens`` that each of ``ctx.tokens`` went into, -1 for a dropped one. The
            row may stand in the place of another image of the same prompt: that is how frames merge.
    """

    tokens: Tensor
    counts: Sequence[int]
    owner: Tensor

    @classmethod
    def even(cls, tokens: Tensor, owner: Tensor) -> Merged:
        """``tokens`` [images, m, C] with ``owner`` int64 [images, n] into the m rows of the same image."""
        images, rows, _ = tokens.shape
        first = torch.arange(images, device=owner.device).unsqueeze(1) * rows
        return cls(tokens.flatten(0, 1), [rows] * images, owner.where(owner < 0, owner + first))


class MergedRows:
    """A :class:`Merged` while it grows, image after image."""

    def __init__(self, tokens: Tensor):
        """``tokens`` [images, n, C] are those that merge."""
        images, n, _ = tokens.shape
        self._rows: list[Tensor] = []
        self._counts = [0] * images
        self._owner = torch.full((images, n), -1, device=tokens.device)

    def add(self, image: int, rows: Tensor, owner: Tensor) -> None:
        """``rows`` [m, C] in the place of ``image``, no image before the last one added. ``owner`` int64 [f, n]: which
        of them the tokens of this image and the following f - 1 went into; -1 for those that did not.
        """
        first = sum(self._counts)
        self._rows.append(rows)
        self._counts[image] += len(rows)
        before = self._owner[image : image + len(owner)]
        before.copy_(torch.where(owner < 0, before, owner + first))

    def done(self) -> Merged:
        return Merged(torch.cat(self._rows), self._counts, self._owner)


class BudgetError(ValueError):
    """A budget that a method cannot meet on this encoder."""


@dataclass(frozen=True)
class Encoder:
    """The vision encoder's facts that a recipe may depend on.

    ``feature_layer`` is the layer whose output the language model gets: with ``hidden_states[-2]`` of a 24-layer
    tower it is layer 22, and the attention that belongs to those features is that layer's.
    """

    num_layers: int
    feature_layer: int
    grid: tuple[int, int]
    has_cls: bool

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    def scaled(self, layer: int, of: int = 24) -> int:
        """The layer at the same relative depth as ``layer`` in an ``of``-layer tower: exact for CLIP-L."""
        return round(layer * self.num_layers / of)


def videos_of(rows: Sequence[int]) -> list[slice]:
    """The images of each prompt that has any, of the prompt of each image."""
    ends = [i + 1 for i, row in enumerate(rows) if i + 1 == len(rows) or rows[i + 1] != row]
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


@dataclass(frozen=True)
class Context:
    """What a stage sees of one call: every image of the batch, whichever prompt it belongs to.

    Attributes:
        tokens: [images, n, C], what this stage prunes. Gradients flow through the kept ones; what a recipe scores with
            (``features``, ``projections``, ``tokens.detach()``) is a constant of the backward pass.
        features: [images, n, C'], the encoder's features of the same tokens (``tokens`` itself before the projector).
        positions: int64 [images, n], the patch number (raster order) of each token.
        keep: tokens to keep of each image, ``1 <= keep < n``; their mean where a method shares them out unevenly.
        encoder: the vision encoder's facts.
        projections: layer -> (query, key), each [images, H, S, D] with S = [CLS] + patches, for the layers that the
            recipe asked for.
        lse: layer -> float32 [images, H, S], what normalises each of those rows, where the encoder's attention left it
            ("vtk"); ``attention_scores`` then need not find it again.
        questions: one int64 [length] tensor a prompt: its ids without images, padding and special tokens.
        rows: the prompt (index into ``questions``) of each image; never descending.
        embed: the language model's embedding table: ids [*] -> [*, C].
        project: the projector: features [images, *, C'] -> [images, *, C].
    """

    tokens: Tensor
    features: Tensor
    positions: Tensor
    keep: int
    encoder: Encoder
    projections: dict[int, tuple[Tensor, Tensor]]
    lse: dict[int, Tensor]
    questions: Sequence[Tensor]
    rows: Sequence[int]
    embed: Callable[[Tensor], Tensor]
    project: Callable[[Tensor], Tensor]

    def attention(self, layer: int, *, voters: Literal["cls", "all"], head_reduce: str = "mean") -> Tensor:
        """Attention that each token receives in one encoder layer: float32 [images, n].

        ``voters="cls"`` reads the [CLS] row, ``"all"`` the mean over all rows. The softmax runs over every key,
        [CLS] included, as in the encoder itself; only then is the [CLS] column left out.
        """
        query, key = self.projections[layer]
        lse = self.lse.get(layer)
        if voters == "cls":
            query, lse = query[:, :, :1], None if lse is None else lse[:, :, :1]
        scores = attention_scores(query, key, lse=lse, head_reduce=head_reduce)
        patches = scores[:, 1:] if self.encoder.has_cls else scores
        # An earlier stage may have dropped patches already.
        return patches if patches.shape[1] == self.tokens.shape[1] else patches.gather(1, self.positions)

    @property
    def videos(self) -> list[slice]:
        """The images of each prompt that has any: a video's frames, in order."""
        return videos_of(self.rows)

    def take(self, indices: Tensor) -> Kept:
        """The tokens at ``indices`` int64 [images, keep], with the indices."""
        return self.tokens.gather(1, indices.unsqueeze(-1).expand(-1, -1, self.tokens.shape[-1])), indices


@dataclass(frozen=True)
class Recipe:
    """Base of every method. A subclass defines one method per stage it claims: ``(ctx: Context) -> Kept | Merged``;
    for ``vision_layers``, ``between_layers`` and ``cache`` see merging.py, reuse.py, decoder.py and caching.py.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    reference: ClassVar[str]
    status: ClassVar[str]  # where the facts come from: "verified" (the authors' code) or "inferred", and what
    training_free: ClassVar[bool] = True
    merges: ClassVar[bool] = False  # returns Merged
    video: ClassVar[bool] = False  # made for the frames of a video, each an image of one prompt

    @classmethod
    def stages(cls) -> tuple[Stage, ...]:
        return tuple(stage for stage in STAGES if hasattr(cls, stage))

    @classmethod
    def options(cls) -> dict[str, Any]:
        """Option name -> default."""
        return {field.name: field.default for field in fields(cls)}

    @property
    def needs_cls(self) -> bool:
        return False

    @property
    def reads_question(self) -> bool:
        return False

    def attention_layers(self, encoder: Encoder) -> tuple[int, ...]:
        """The encoder layers whose query and key the recipe scores with."""
        return ()

    def decoder_layers(self, num_layers: int) -> tuple[int, ...]:
        """The language model's layers before which ``between_layers`` is called, each in [1, num_layers - 1]."""
        return ()

    def watched_layer(self, num_layers: int) -> int | None:
        """The language model's layer whose incoming hidden states a cache reads, as ``states`` of a PackedKVCache."""
        return None

    def budget(self, encoder: Encoder, keep: int | None) -> int | None:
        """Tokens an image, or None for all, when ``keep`` was asked for: a recipe's options may say it as well."""
        return keep

    def check(self, encoder: Encoder, keep: int) -> None:
        """Raises ValueError when this encoder or budget cannot be served, BudgetError where another budget could."""
        return None

    def one_of(self, option: str, choices: Sequence[str]) -> None:
        value = getattr(self, option)
        if value not in choices:
            raise ValueError(f"{self.name}: expected {option} to be one of {', '.join(choices)}, got {value!r}")
