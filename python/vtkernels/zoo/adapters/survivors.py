"""Which of a prompt's tokens the layers of a language model see, noted on the cache that holds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

_SURVIVORS = "_vtk_survivors"  # on a cache: list[Survivors]


@dataclass(frozen=True)
class Survivors:
    """The tokens that the layers from ``layer`` on see.

    Attributes:
        source: int64 [B, T'], the place in the prompt of each; -1 for padding, which comes first.
        length: tokens of the prompt, with padding.
        padded: whether there is any -1.
    """

    layer: int
    source: Tensor
    length: int
    padded: bool

    @classmethod
    def of(cls, layer: int, rows: list[Tensor], length: int) -> Survivors:
        """``rows``: the places of each prompt's, ascending."""
        longest = max(map(len, rows))
        source = torch.stack([pad(row, (longest - len(row), 0), value=-1) for row in rows])
        return cls(layer, source, length, any(len(row) < longest for row in rows))

    def gather(self, tensor: Tensor) -> Tensor:
        """[B or 1, T, D] -> [B, T', D]."""
        index = self.source.clamp(min=0).unsqueeze(-1).expand(-1, -1, tensor.shape[-1])
        return tensor.expand(len(index), -1, -1).gather(1, index)

    def put_back(self, hidden: Tensor) -> Tensor:
        """[B, T', C] -> [B, T, C]: at each place the last survivor up to it."""
        rows, slots = (self.source >= 0).nonzero(as_tuple=True)
        slot = self.source.new_zeros(len(hidden), self.length)
        slot[rows, self.source[rows, slots]] = slots
        return hidden.gather(1, slot.cummax(1).values.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))

    def mask(self, given: Tensor | None, new: int) -> Tensor | None:
        """bool [B, T' + new], False for padding, or None without, of the caller's [B, T + new]."""
        if given is None and not self.padded:
            return None
        later = self.source.new_ones(len(self.source), new) if given is None else given[:, self.length :]
        return torch.cat([self.source >= 0, later.bool()], dim=1)


def note_survivors(cache: Any, survivors: list[Survivors]) -> None:
    """``survivors`` by ascending layer; what is appended later counts as well."""
    cache.__dict__[_SURVIVORS] = survivors


def survivors_on(cache: Any) -> list[Survivors] | None:
    """What was noted, or None."""
    return getattr(cache, _SURVIVORS, None)


def survivors_of(cache: Any, layer: int) -> Tensor | None:
    """int64 [B, T'], the places in the prompt of the tokens that ``layer`` caches, -1 for padding; None: all."""
    known = [part for part in survivors_on(cache) or () if part.layer <= layer]
    return known[-1].source if known else None
