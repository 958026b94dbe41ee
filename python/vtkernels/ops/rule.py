"""Attention by a rule: the executor of block lists over keys that five numbers a head describe."""

from __future__ import annotations

import torch
from torch import Tensor

from vtkernels.ops._autograd import without_backward


def rule_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rule: Tensor,
    *,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    starts_k: Tensor | None = None,
    seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention over sinks, a window and strided blocks, which five numbers a head describe.

    ``out[i] = sum_n P[i, n] value[n]`` with ``P[i] = softmax_n(scale * query[i] . key[n] + key_bias[n])`` over the keys
    that query ``i`` sees, ``lse[i]`` the natural logarithm of the softmax's denominator. Positions count from the first
    key that exists: the query stands at ``t = i + length - Q - start`` and sees the key at ``j <= t`` if

    - ``j < sink``, or
    - ``j >= sink + (u - window + 1) * unit`` with ``u = max(t - sink, 0) // unit``: the query's own unit of keys and
      the ``window - 1`` units before it; units are counted from the end of the sinks, or
    - ``stride > 0`` and ``(j // 64 + phase + 1) % stride == 0``.

    Memory and work grow with the keys that are seen, and no list is made. ``vtkernels.attention.Rule`` makes the rules
    of published methods: StreamingLLM and A-shape ``(sink, local, 1, 0, 0)``, MoA ``(64, band, 64, 0, 0)``,
    S2-Attention ``(0, local_blocks, 64, stride, h * step)``, chunks of a video ``(first, previous + 1, chunk, 0, 0)``.

    Args:
        query: float32, float16 or bfloat16 ``[B, H, Q, D]``, ``1 <= D <= 256``; any batch, head and row strides,
            contiguous last dimension.
        key: ``[B, Hk, N, D]`` of the dtype of ``query``, ``H`` a multiple of ``Hk``: head ``h`` reads key head
            ``h // (H / Hk)``.
        value: ``[B, Hk, N, D]``, as ``key``.
        rule: int32 ``[H | 1, 5]``: ``sink >= 0``, ``window >= 1``, ``unit >= 1``, ``stride >= 0`` and ``phase >= 0`` of
            each head; a size of 1 is shared, and lets the heads of one key head read their keys together.
        scale: factor on the products, default ``D ** -0.5``.
        key_bias: float32 ``[B, N]``, added to the logits of every key; -inf excludes a key.
        starts_k: int32 ``[B]``, ``0 <= starts_k <= N``: the first key that exists, at position 0 (padding on the left).
        seqlens_k: int32 ``[B]``, ``0 <= seqlens_k <= N``: the keys before it exist.

    Returns:
        ``out [B, H, Q, D]`` of the dtype of ``query`` and ``lse`` float32 ``[B, H, Q]``. A query without a key has out
        0 and lse -inf. A NaN in a query or in a key it attends to makes its row NaN. Keys excluded by ``key_bias``,
        ``starts_k`` or ``seqlens_k`` never leak; a NaN or infinity in the value of a key that another query within the
        same 128 sees may reach a query that does not, as in flash attention.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, naming the argument. On the CPU also a number of
            ``rule``, a start or a length out of its range; on CUDA, where a report needs a synchronisation, these are
            clamped.
        NotImplementedError: in backward: there is no backward pass yet.

    Example:
        >>> q, k = torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2)
        >>> v = torch.tensor([[[[8.0], [4.0], [2.0], [0.0]]]]).expand(1, 1, 4, 2).contiguous()
        >>> out, lse = rule_attention(q, k, v, torch.tensor([[1, 2, 1, 0, 0]], dtype=torch.int32))
        >>> [[round(x, 3) for x in row.tolist()] for row in (out[0, 0, :, 0], lse[0, 0])]
        [[8.0, 6.0, 4.667, 3.333], [0.0, 0.693, 1.099, 1.099]]

    StreamingLLM (arXiv 2309.17453), MInference's A-shape (arXiv 2407.02490), MoA (arXiv 2406.14909), S2-Attention
    (arXiv 2407.17678), Video-XL-2 (arXiv 2506.19225).
    """
    return torch.ops.vtk.rule_attention.default(
        query, key, value, rule, scale=scale, key_bias=key_bias, starts_k=starts_k, seqlens_k=seqlens_k
    )


@torch.library.register_fake("vtk::rule_attention")
def _(query, key, value, rule, **_options):
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=torch.float32)


def _rule_attention_autograd(query, key, value, rule, **options):
    def call(query, key, value):
        return torch.ops.vtk.rule_attention.default(query, key, value, rule, **options)

    reason = "vtk::rule_attention: there is no backward pass yet; train on block lists or sdpa"
    return without_backward(reason, call, query, key, value)


_library = torch.library.Library("vtk", "FRAGMENT")
_library.impl("rule_attention", _rule_attention_autograd, "Autograd")
