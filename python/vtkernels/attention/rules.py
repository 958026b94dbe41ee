"""Rules: which keys each query sees, in five numbers a head, and the methods that are such rules.

:func:`vtkernels.rule_attention` defines the numbers and executes them; no list of blocks is made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtkernels.ops.rule import rule_attention

_BLOCK = 64


@dataclass(frozen=True)
class Rule:
    """The rule of one layer, as :func:`vtkernels.rule_attention` takes it. Constructors take one number for all heads.

    Attributes:
        numbers: int32 ``[H | 1, 5]``: sink, window, unit, stride and phase of each head.
    """

    numbers: Tensor

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """``rule_attention`` by this rule: out and lse. ``options``: scale, key_bias, starts_k, seqlens_k."""
        return rule_attention(query, key, value, self.numbers, **options)

    @classmethod
    def streaming(cls, sink: int | Sequence[int], local: int | Sequence[int], *, device: Any = None) -> Rule:
        """The first ``sink`` keys and the last ``local`` ones, the query's own among them; both may be one a head.

        StreamingLLM (arXiv 2309.17453), and the exact streaming of Block-Sparse-Attention.

        Example:
            >>> Rule.streaming(4, [8, 16]).numbers.tolist()
            [[4, 8, 1, 0, 0], [4, 16, 1, 0, 0]]
        """
        return cls._of(device, sink, local, 1)

    @classmethod
    def a_shape(cls, initial: int = 128, local: int = 3968, *, device: Any = None) -> Rule:
        """MInference's A-shape (arXiv 2407.02490) with SCBench's numbers; its search takes 100 and 800.

        Tri-shape is this rule, and all keys for the last 512 queries: a second call, ``causal`` and dense.
        """
        return cls.streaming(initial, local, device=device)

    @classmethod
    def moa(
        cls,
        alphas: Sequence[float],
        betas: Sequence[float],
        length: int,
        *,
        minimum: int = 128,
        device: Any = None,
    ) -> Rule:
        """MoA's elastic spans (arXiv 2406.14909): one sink block and a band of blocks, ``alpha + beta * length`` keys
        together.

        A span is at least ``minimum`` keys, rounded up to blocks of 64. In decoding MoA's cache drops keys one by one;
        here whole blocks stay, up to 63 keys more.

        Args:
            alphas, betas: one of each a query head.
            length: of the sequence: MoA takes the prompt and the tokens to be generated.
        """
        spans = [max(int(alpha + beta * length), minimum) for alpha, beta in zip(alphas, betas, strict=True)]
        return cls._of(device, _BLOCK, [max(1, math.ceil(span / _BLOCK) - 1) for span in spans], _BLOCK)

    @classmethod
    def strided(
        cls, local_blocks: int, stride: int, heads: int, *, homogeneous: bool = False, device: Any = None
    ) -> Rule:
        """S2-Attention (arXiv 2407.17678): the last ``local_blocks`` blocks of 64 keys, the query's own among them, and
        every ``stride``-th block, beginning elsewhere in each head unless ``homogeneous``.

        Example:
            >>> Rule.strided(16, 8, 4).numbers.tolist()
            [[0, 16, 64, 8, 0], [0, 16, 64, 8, 2], [0, 16, 64, 8, 4], [0, 16, 64, 8, 6]]
        """
        step = 0 if homogeneous else max(1, stride // heads)
        phases = 0 if homogeneous else [h * step for h in range(heads)]
        return cls._of(device, 0, local_blocks, _BLOCK, stride, phases)

    @classmethod
    def chunked(cls, chunk: int, previous: int, *, first: int = 0, device: Any = None) -> Rule:
        """Video-XL-2's chunks (arXiv 2506.19225): a query sees its own chunk, ``previous`` chunks before it, and the
        keys before the first chunk.

        This is the rule of visual tokens. What else that model lets see everything is not in it: the text after the
        video (a second call, dense) and timestamps, which are columns of block lists.

        Args:
            chunk: keys of a chunk, all chunks being of one length.
            first: the key at which the first chunk begins.
        """
        return cls._of(device, first, previous + 1, chunk)

    @classmethod
    def _of(cls, device: Any, *numbers: int | Sequence[int]) -> Rule:
        """Numbers of all heads or one a head; those left out are 0."""
        columns = [torch.as_tensor(n, dtype=torch.int32).reshape(-1) for n in (*numbers, 0, 0)[:5]]
        return cls(torch.stack(torch.broadcast_tensors(*columns), -1).to(device))
