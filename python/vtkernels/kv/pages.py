"""The pages of one layer's cache, and what a cache hands to attention in place of its keys and values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from vtkernels.kv.format import PAGE_TOKENS, KVFormat, channel_order
from vtkernels.kv.growth import Room
from vtkernels.ops.kv import kv_pack, kv_unpack, packed_attention

_PART = 64  # pages of a key head that are packed at once


@dataclass(frozen=True)
class Pages:
    """Packed keys and values. Appending leaves the bits of the pages that are there, in place where there is room.

    Attributes:
        format: how they are packed.
        packed: ``k_codes``, ``k_meta``, ``v_codes`` and ``v_meta`` of :func:`vtkernels.kv_pack`.
        k_order: int32 ``[B, Hk, D]``, the channel order of a mix, chosen once; None for other schemes.
        room: what ``packed`` are views of, if there is any room behind them.
    """

    format: KVFormat
    packed: tuple[Tensor, Tensor, Tensor, Tensor]
    k_order: Tensor | None
    room: Room | None = None

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, format: KVFormat) -> Pages:
        """No pages yet of tokens like these ``[B, Hk, N, D]``, which choose the channel order of a mix."""
        order = channel_order(keys) if format.k_scheme == "mix" else None
        nothing = kv_pack(keys[:, :, :0], values[:, :, :0], **format.options, k_order=order)
        return cls(format, nothing, order)

    def append(self, keys: Tensor, values: Tensor) -> Pages:
        """With these tokens ``[B, Hk, N, D]`` behind the others, N a multiple of 128."""
        pages, used, room = keys.shape[2] // PAGE_TOKENS, self.packed[0].shape[2], self.room
        if room is None or room.used != used or room.capacity < used + pages:
            room = Room.after(self.packed, pages)
        # In parts: what is packed at once is memory beside the pages.
        part = max(1, _PART // (keys.shape[0] * keys.shape[1])) * PAGE_TOKENS
        for some in zip(keys.split(part, 2), values.split(part, 2), strict=True):
            room.append(kv_pack(*some, **self._options))
        a, b, c, d = room.views()
        return replace(self, packed=(a, b, c, d), room=room)

    def map(self, function: Callable[[Tensor], Tensor]) -> Pages:
        """``function`` of every tensor; the batch is their first dimension."""
        a, b, c, d = map(function, self.packed)
        order = None if self.k_order is None else function(self.k_order)
        return Pages(self.format, (a, b, c, d), order)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """:func:`vtkernels.packed_attention` over the pages and these tokens in no page."""
        options |= self._options
        return packed_attention(query, *self.packed, k_residual=keys, v_residual=values, **options)

    def unpack(self, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, Hk, tokens, head_dim]``."""
        return kv_unpack(*self.packed, head_dim=head_dim, dtype=dtype, **self._options)

    @property
    def tokens(self) -> int:
        """How many tokens the pages hold."""
        return self.packed[0].shape[2] * PAGE_TOKENS

    @property
    def nbytes(self) -> int:
        """Bytes of codes, metadata and channel order."""
        return sum(x.nbytes for x in self.packed) + (0 if self.k_order is None else self.k_order.nbytes)

    @property
    def _options(self) -> dict[str, Any]:
        return self.format.options | {"k_order": self.k_order}


@dataclass(frozen=True)
class PackedKeysValues:
    """What :class:`vtkernels.cache.PackedKVCache` returns as keys and as values when some of them are packed.

    No tensor: attention that does not know it must not go on with the residual tokens alone.

    Attributes:
        pages: the packed tokens.
        keys, values: ``[B, Hk, R, D]``, those in no page, the new ones last.
    """

    pages: Pages
    keys: Tensor
    values: Tensor

    @property
    def tokens(self) -> int:
        """How many tokens there are."""
        return self.pages.tokens + self.keys.shape[2]

    def __getattr__(self, name: str) -> NoReturn:
        _refuse(name)

    def __getitem__(self, index: object) -> NoReturn:
        _refuse("an index")

    @classmethod
    def __torch_function__(cls, function: Any, *_args: Any, **_kwargs: Any) -> NoReturn:
        _refuse(getattr(function, "__name__", str(function)))


def _refuse(what: str) -> NoReturn:
    raise NotImplementedError(
        'PackedKVCache: expected the attention "vtk" (model.set_attn_implementation("vtk")), which reads keys and '
        f"values packed; others need PackedKVCache(unpack=True). Asked for: {what}"
    )
