"""A transformers cache of low-bit pages, which ``"vtk"`` attention reads packed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

import vtkernels.attention  # noqa: F401  (registers "vtk")
from vtkernels.kv import PAGE_TOKENS, KVFormat
from vtkernels.kv.pages import PackedKeysValues, Pages

__all__ = ["PackedKVCache", "PackedKVLayer"]

_Format = KVFormat | str


class PackedKVLayer(DynamicLayer):
    """The cache of one layer: pages, and the tokens in no page as ``keys`` and ``values`` ``[B, Hk, R, D]``.

    Args:
        format: of the pages.
        window: how many of the latest tokens stay in no page.
        unpack: whether attention gets unpacked keys and values.
    """

    keys: Any  # None before the first update
    values: Any

    def __init__(self, format: KVFormat, *, window: int = 0, unpack: bool = False):
        super().__init__()
        self.format = format
        self.window = window
        self.unpack = unpack
        self.pages: Pages | None = None
        self.record_past = False  # the name by which transformers switches it off

    def activate_past_recording(self) -> None:
        """From now on pages are packed by :meth:`crop`, which speculation calls after every step: what a step
        rejects was never packed."""
        self.record_past = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Appends tokens ``[B, Hk, T, D]``; returns what they attend to, in which they are not packed yet."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = self.pages
        keys = torch.cat([self.keys, key_states], dim=2)
        values = torch.cat([self.values, value_states], dim=2)
        self._keep(keys, values, pack=not self.record_past)
        if before is None:
            return keys, values
        if self.unpack:
            packed = before.unpack(keys.shape[-1], keys.dtype)
            return torch.cat([packed[0], keys], dim=2), torch.cat([packed[1], values], dim=2)
        everything = PackedKeysValues(before, keys, values)
        return everything, everything

    def _keep(self, keys: Tensor, values: Tensor, *, pack: bool) -> None:
        """Makes these the tokens in no page, or with ``pack`` what they leave when full pages have been packed."""
        full = max(keys.shape[-2] - self.window, 0) // PAGE_TOKENS * PAGE_TOKENS if pack else 0
        if full > 0:
            pages = Pages.of(keys, values, self.format) if self.pages is None else self.pages
            self.pages = pages.append(keys[:, :, :full], values[:, :, :full])
            # Copies: views would keep what has been packed.
            keys, values = keys[:, :, full:].clone(), values[:, :, full:].clone()
        self.keys, self.values = keys, values

    def get_seq_length(self) -> int:
        """How many tokens there are, packed or not."""
        packed = 0 if self.pages is None else self.pages.tokens
        return packed + super().get_seq_length()

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last ``-tokens_to_remove`` tokens, which must be in no page.

        Raises:
            ValueError: a positive number, or more tokens than are in no page.
        """
        self.check_crop(tokens_to_remove)
        if self.is_initialized:
            kept = self.keys.shape[-2] + tokens_to_remove
            self._keep(self.keys[..., :kept, :], self.values[..., :kept, :], pack=self.record_past)

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raises what :meth:`crop` raises."""
        if tokens_to_remove > 0:
            raise ValueError(f"PackedKVCache.crop: expected tokens_to_remove <= 0, got {tokens_to_remove}")
        residual = super().get_seq_length()
        if -tokens_to_remove > residual:
            raise ValueError(
                f"PackedKVCache.crop: expected to remove at most the {residual} tokens that are in no page, got "
                f"{-tokens_to_remove}; a window keeps more of them"
            )

    def reset(self) -> None:
        """Forgets all tokens."""
        self.pages = self.keys = self.values = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Any) -> None:
        """Batch item ``i`` becomes what ``beam_idx[i]`` was."""
        super().reorder_cache(beam_idx)
        self._map_pages(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every batch item."""
        super().batch_repeat_interleave(repeats)
        self._map_pages(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these batch items."""
        super().batch_select_indices(indices)
        self._map_pages(lambda x: x[indices])

    def _map_pages(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.pages is not None:
            self.pages = self.pages.map(function)

    @property
    def nbytes(self) -> int:
        """Bytes of the pages and of the tokens in no page."""
        if not self.is_initialized:
            return 0
        return (0 if self.pages is None else self.pages.nbytes) + self.keys.nbytes + self.values.nbytes

    @property
    def elements(self) -> int:
        """Numbers that the layer stands for, keys and values."""
        if self.get_seq_length() == 0:
            return 0
        batch, heads, _, head_dim = self.keys.shape
        return 2 * batch * heads * self.get_seq_length() * head_dim


class PackedKVCache(Cache):
    """A cache whose tokens are packed into pages of 128, once, and read packed by ``"vtk"`` attention.

    Tokens attend to each other in the call that brings them as the model made them, so a prompt is attended exactly;
    then every full page is packed by :func:`vtkernels.kv_pack`, and never again. The up to 127 tokens in no page stay
    in the model's dtype. Later calls of any length read pages and residual tokens by
    :func:`vtkernels.packed_attention`, causal among the new ones; nothing is unpacked to memory.

    While tokens are speculated (transformers then asks caches to record the past) pages are packed when the step's
    rejected tokens have been cropped. Otherwise :meth:`crop` removes at most what is in no page: any ``window`` tokens.

    Args:
        config: of the model, or of its language model; its layers must have full attention.
        format: how layers are packed (:class:`vtkernels.kv.KVFormat` or its text, ``"mix/ternary5/128"``): one for all,
            one a layer, or a function of the layer's index; ``"none/none/64"`` keeps the elements.
        window: at least how many of the latest tokens stay in no page.
        unpack: hands attention the unpacked keys and values of the whole cache at every step: slow and large, for
            other implementations than ``"vtk"`` and for batches with padding.

    Raises:
        ValueError: a config with other than full attention, a format that is none, another number of formats than
            layers, a negative window.
        NotImplementedError: from attention: another implementation than ``"vtk"``; a batch with padding, since pages
            have no key mask yet; lists, rules or a recording of a call that reads pages.
        RuntimeError: from :func:`vtkernels.kv_pack`: a head dim that does not fit the format.

    Example:
        >>> model.set_attn_implementation("vtk")  # doctest: +SKIP
        >>> cache = PackedKVCache(model.config, "mix/ternary5/128")  # doctest: +SKIP
        >>> model.generate(**inputs, past_key_values=cache)  # doctest: +SKIP

    KIVI (arXiv 2402.02750) and VidKV (arXiv 2503.16257) for the formats.
    """

    layers: list[Any]  # PackedKVLayer

    def __init__(
        self,
        config: Any,
        format: _Format | Sequence[_Format] | Callable[[int], _Format] = "int4/int4/64",
        *,
        window: int = 0,
        unpack: bool = False,
    ):
        config = config.get_text_config(decoder=True)
        others = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
        if others:
            raise ValueError(f"PackedKVCache: expected layers with full attention, got {', '.join(sorted(others))}")
        if window < 0:
            raise ValueError(f"PackedKVCache: expected window >= 0, got {window}")
        formats = _formats(format, config.num_hidden_layers)
        super().__init__(layers=[PackedKVLayer(each, window=window, unpack=unpack) for each in formats])

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last ``-tokens_to_remove`` tokens of every layer, or of none where one cannot: ``ValueError``."""
        for layer in self.layers:
            layer.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)

    @property
    def nbytes(self) -> int:
        """Bytes of all layers, metadata, channel orders and tokens in no page included."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def bits_per_element(self) -> float:
        """``nbytes`` in bits for each number that the cache stands for; NaN while it is empty."""
        elements = sum(layer.elements for layer in self.layers)
        return 8 * self.nbytes / elements if elements else float("nan")


def _formats(format: Any, num_layers: int) -> list[KVFormat]:
    if isinstance(format, KVFormat | str):
        chosen = [format] * num_layers
    else:
        chosen = [format(layer) for layer in range(num_layers)] if callable(format) else list(format)
    if len(chosen) != num_layers:
        raise ValueError(f"PackedKVCache: expected a format for each of {num_layers} layers, got {len(chosen)}")
    return [KVFormat.parse(each) if isinstance(each, str) else each for each in chosen]
