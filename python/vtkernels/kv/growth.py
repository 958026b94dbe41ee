"""Memory in which pages are appended in place.

NOTE: concatenating instead leaves a hole of the old size at every append, and glibc before 2.38 does not hand such
holes out again to torch's aligned allocations: a cache of 113 MB, grown page by page, held 12.9 GB.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor


@dataclass
class Room:
    """Buffers ``[B, Hk, capacity, n]``, one for each tensor of some pages, of which the first ``used`` are taken."""

    buffers: Sequence[Tensor]
    used: int

    @classmethod
    def after(cls, tensors: Sequence[Tensor], extra: int) -> Room:
        """Copies of ``tensors`` ``[B, Hk, pages, n]`` and room for ``extra`` pages, more where that is free."""
        used = tensors[0].shape[2]
        buffers = [_reserve(x, used + extra) for x in tensors]
        for buffer, x in zip(buffers, tensors, strict=True):
            buffer[:, :, :used] = x
        return cls(buffers, used)

    @property
    def capacity(self) -> int:
        return self.buffers[0].shape[2]

    def append(self, tensors: Sequence[Tensor]) -> None:
        """Writes pages behind those that are there."""
        last = self.used + tensors[0].shape[2]
        for buffer, x in zip(self.buffers, tensors, strict=True):
            buffer[:, :, self.used : last] = x
        self.used = last

    def views(self) -> list[Tensor]:
        """The pages that are there."""
        return [buffer[:, :, : self.used] for buffer in self.buffers]


def _reserve(like: Tensor, pages: int) -> Tensor:
    batch, heads, _, size = like.shape
    if like.device.type != "cpu":
        return like.new_empty(batch, heads, pages + pages // 32, size)
    shape = (batch, heads, 2 * pages, size)
    if prod(shape) == 0:
        return like.new_empty(shape)
    # Fresh memory is there once it is written: what is beyond the pages is addresses alone, but for huge pages.
    memory = mmap.mmap(-1, prod(shape) * like.element_size(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=like.dtype).view(shape)
