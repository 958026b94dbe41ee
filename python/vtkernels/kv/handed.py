"""What a cache hands to attention in place of its keys and values.

No tensors: attention that does not know them must not go on with some of the tokens alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from torch import Tensor

from vtkernels.kv.pages import Stored


class _Handed:
    """Answers what it does not know with the error that names ``"vtk"``."""

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # Python's own questions, of copies for example
            raise AttributeError(name)
        _refuse(name)

    def __getitem__(self, index: object) -> NoReturn:
        _refuse("an index")

    @classmethod
    def __torch_function__(cls, function: Any, *_args: Any, **_kwargs: Any) -> NoReturn:
        _refuse(getattr(function, "__name__", str(function)))


class PackedKeysValues(_Handed):
    """Keys and values of a layer, the new ones last, when some of them are packed or evicted.

    Attributes:
        tokens: the length of the sequence, which masks have.
    """

    def __init__(self, stored: Stored):
        self._stored = stored
        self.tokens = stored.tokens

    def attend(self, query: Tensor, *, key_bias: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
        """:func:`vtkernels.packed_attention` over all of them, with its ``causal``, ``ancestors`` and ``scale``.

        Args:
            query: ``[B, H, Q, D]``.
            key_bias: float32 ``[B | 1, tokens]``, of the tokens as they came.
        """
        return self._stored.attend(query, key_bias=key_bias, **options)


class PromptKeysValues(_Handed):
    """Keys and values ``[B, Hk, N, D]`` of a layer's first call, which the cache wants to see attended.

    Attributes:
        keys, values: what attention reads.
        attended: to be called with the :class:`vtkernels.attention.Pass`.
    """

    def __init__(self, keys: Tensor, values: Tensor, attended: Callable[[Any], None]):
        self.keys = keys
        self.values = values
        self.attended = attended


def _refuse(what: str) -> NoReturn:
    raise NotImplementedError(
        'PackedKVCache: expected the attention "vtk" (model.set_attn_implementation("vtk")), which reads keys and '
        f"values packed; others need PackedKVCache(unpack=True). Asked for: {what}"
    )
