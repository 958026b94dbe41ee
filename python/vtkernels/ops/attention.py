"""The attention family: attention over listed key blocks, the lists, and their conversions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vtkernels.ops._autograd import below, needs_grad


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_counts: Tensor,
    block_indices: Tensor,
    *,
    block_q: int = 128,
    block_k: int = 128,
    causal: bool = False,
    scale: float | None = None,
    full_counts: Tensor | None = None,
    full_indices: Tensor | None = None,
    column_counts: Tensor | None = None,
    column_indices: Tensor | None = None,
    key_bias: Tensor | None = None,
    seqlens_k: Tensor | None = None,
    token_offsets: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention of each block of queries over the key blocks and single keys that are listed for it.

    ``out[i] = sum_n P[i, n] value[n]`` with ``P[i] = softmax_n(scale * query[i] . key[n] + key_bias[n])`` over the keys
    listed for the block of query ``i``; ``lse[i]`` is the natural logarithm of the softmax's denominator. A list is a
    count and the first ``count`` entries of a row of indices, as in FlexAttention's BlockMask. The order of a list
    changes no more than the rounding; a key that is listed twice counts twice. Products and sums are float32 whatever
    the inputs are; the extra memory does not grow with ``Q * N``. Gradients flow to ``query``, ``key`` and ``value``,
    from ``out`` and from ``lse`` (:func:`block_sparse_attention_backward`); they are not differentiable again.

    Args:
        query: float32, float16 or bfloat16 ``[B, H, Q, D]``, ``1 <= D <= 256``; any batch, head and row strides,
            contiguous last dimension.
        key: ``[B, Hk, N, D]`` of the dtype of ``query``, ``H`` a multiple of ``Hk``: head ``h`` reads key head
            ``h // (H / Hk)``.
        value: ``[B, Hk, N, D]``, as ``key``.
        block_counts: int32 ``[B | 1, H | 1, Mq]``, ``Mq = ceil(Q / block_q)``; a size of 1 is shared.
        block_indices: int32 ``[B | 1, H | 1, Mq, capacity]``: numbers of blocks of ``block_k`` keys. Of these blocks a
            query attends to the keys that ``causal`` lets it see.
        block_q, block_k: 64 or 128.
        causal: query ``i`` sees keys ``j <= i + length - Q`` (the last query sees all), ``length`` being ``N`` or
            ``seqlens_k[b]``.
        scale: factor on the products, default ``D ** -0.5``.
        full_counts, full_indices: further blocks, to which ``causal`` does not apply; the faster path of blocks that
            every query of the block sees whole.
        column_counts, column_indices: single keys, under ``causal`` as ``block_indices`` are.
        key_bias: float32 ``[B, N]``, added to the logits of every key; -inf, and all below -2.3e38, excludes a key
            (padding), log(size) is ToMe's proportional attention.
        seqlens_k: int32 ``[B]``, ``0 <= seqlens_k <= N``: keys that exist.
        token_offsets: entries of ``block_indices`` and ``full_indices`` are the first key of a block, at any key,
            instead of its number.

    Returns:
        ``out [B, H, Q, D]`` of the dtype of ``query`` and ``lse`` float32 ``[B, H, Q]``. A query without a key has out
        0 and lse -inf. A NaN in a query or in a key it attends to, and a NaN or inf in that key's bias, makes its row
        NaN. Keys excluded by ``key_bias`` or ``seqlens_k``, and keys not listed, never leak; a NaN or infinity in the
        value of a key that ``causal`` hides from some queries of a block may reach those queries, as in flash
        attention.

    Raises:
        RuntimeError: a shape, dtype, device or option that does not fit, naming the argument. On the CPU also a count
            outside ``[0, capacity]``, an index outside the keys and a length outside ``[0, N]``. On CUDA, where a
            report needs a synchronisation, counts and lengths are clamped and such an index is passed over; a list
            there holds fewer than 2^24 entries.
        NotImplementedError: a ``key_bias`` that requires a gradient: it would get none.

    Example:
        >>> q, k = torch.eye(2)[None, None], torch.zeros(1, 1, 3, 2)
        >>> v = torch.tensor([[[[1.0, 0.0], [3.0, 0.0], [9.0, 6.0]]]])
        >>> count, index = torch.ones(1, 1, 1, dtype=torch.int32), torch.zeros(1, 1, 1, 1, dtype=torch.int32)
        >>> out, lse = block_sparse_attention(q, k, v, count, index, causal=True)
        >>> out[0, 0].tolist(), [round(x, 3) for x in lse[0, 0].tolist()]
        ([[2.0, 0.0], [4.333333492279053, 2.0]], [0.693, 1.099])

    The lists are those of FlexAttention (arXiv 2412.05496); columns and unaligned blocks those of MInference
    (arXiv 2407.02490); computed blockwise as in FlashAttention (arXiv 2205.14135).
    """
    return torch.ops.vtk.block_sparse_attention.default(
        query,
        key,
        value,
        block_counts,
        block_indices,
        block_q=block_q,
        block_k=block_k,
        causal=causal,
        scale=scale,
        full_counts=full_counts,
        full_indices=full_indices,
        column_counts=column_counts,
        column_indices=column_indices,
        key_bias=key_bias,
        seqlens_k=seqlens_k,
        token_offsets=token_offsets,
    )


@torch.library.register_fake("vtk::block_sparse_attention")
def _(query, key, value, block_counts, block_indices, **_options):
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=torch.float32)


def block_sparse_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    block_counts: Tensor,
    block_indices: Tensor,
    *,
    grad_lse: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of :func:`block_sparse_attention` for query, key and value; autograd calls it.

    With ``m[i, n]`` the times key ``n`` is listed for query ``i``, ``P[i, n] = m[i, n] exp(scale * query[i] . key[n] +
    key_bias[n] - lse[i])`` and ``dS[i, n] = P[i, n] (grad_out[i] . value[n] - out[i] . grad_out[i] + grad_lse[i])``:
    ``grad_query = scale dS key``, ``grad_key = scale dS^T query`` and ``grad_value = P^T grad_out``, the last two
    summed over the query heads of a key head. Products and sums are float32, in an order that depends on the lists
    alone: no atomics, the same bits in every run. P is computed twice, for the queries and for the keys, instead of
    stored: the extra memory grows with the length of the lists. The result carries no gradient.

    Args:
        grad_out: ``[B, H, Q, D]`` of the dtype of ``query``; any batch, head and row strides, contiguous last
            dimension.
        query, key, value, block_counts, block_indices: as the forward pass had them.
        out, lse: what it returned, contiguous.
        grad_lse: float32 ``[B, H, Q]``, contiguous; None: zero.
        options: the options of :func:`block_sparse_attention`, as the forward pass had them.

    Returns:
        ``grad_query [B, H, Q, D]``, ``grad_key`` and ``grad_value [B, Hk, N, D]``, contiguous, of the dtype of
        ``query``. A query without a key, and a key that is not listed or that ``key_bias`` or ``seqlens_k`` excludes,
        has gradient 0 and, whatever it holds, no part in the others. A NaN or infinity in a query or in ``grad_out``
        may reach the keys that stand next to those it attends to; one in a key, the other queries of a block that
        lists it.

    Raises:
        RuntimeError: as :func:`block_sparse_attention` does.

    Example:
        >>> q, k = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 3, 2)
        >>> v = torch.tensor([[[[1.0, 0.0], [3.0, 0.0], [8.0, 6.0]]]])
        >>> lists = torch.ones(1, 1, 1, dtype=torch.int32), torch.zeros(1, 1, 1, 1, dtype=torch.int32)
        >>> out, lse = block_sparse_attention(q, k, v, *lists)
        >>> grads = block_sparse_attention_backward(torch.ones_like(out), q, k, v, out, lse, *lists)
        >>> [round(x, 3) for x in grads[2][0, 0, :, 0].tolist()]
        [0.333, 0.333, 0.333]

    FlashAttention-2 (arXiv 2307.08691), over lists.
    """
    return torch.ops.vtk.block_sparse_attention_backward.default(
        grad_out, query, key, value, out, lse, block_counts, block_indices, grad_lse=grad_lse, **options
    )


@torch.library.register_fake("vtk::block_sparse_attention_backward")
def _(grad_out, query, key, value, out, lse, block_counts, block_indices, **_options):
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, block_counts, block_indices, options):
        inputs = (query, key, value, block_counts, block_indices)
        out, lse = below(torch.ops.vtk.block_sparse_attention.default, *inputs, **options)
        saved = {n: x for n, x in options.items() if isinstance(x, Tensor)}
        ctx.save_for_backward(*inputs, out, lse, *saved.values())
        ctx.saved_options = list(saved)
        ctx.options = {n: x for n, x in options.items() if n not in saved}
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_lse):
        query, key, value, block_counts, block_indices, out, lse, *saved = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        elif grad_out.stride(-1) != 1:
            grad_out = grad_out.contiguous()
        grads = torch.ops.vtk.block_sparse_attention_backward.default(
            grad_out,
            query,
            key,
            value,
            out,
            lse,
            block_counts,
            block_indices,
            grad_lse=None if grad_lse is None else grad_lse.contiguous(),
            **dict(zip(ctx.saved_options, saved, strict=True)),
            **ctx.options,
        )
        return *grads, None, None, None


def _block_sparse_attention_autograd(query, key, value, block_counts, block_indices, *, key_bias=None, **options):
    if key_bias is not None and needs_grad(key_bias):
        raise NotImplementedError(
            "vtk::block_sparse_attention: key_bias requires a gradient and would get none; pass key_bias.detach()"
        )
    options["key_bias"] = key_bias
    if needs_grad(query, key, value):
        return _Attend.apply(query, key, value, block_counts, block_indices, options)
    return below(
        torch.ops.vtk.block_sparse_attention.default, query, key, value, block_counts, block_indices, **options
    )


_library = torch.library.Library("vtk", "FRAGMENT")
_library.impl("block_sparse_attention", _block_sparse_attention_autograd, "Autograd")
_library.impl("block_sparse_attention_backward", torch.library.fallthrough_kernel, "Autograd")
