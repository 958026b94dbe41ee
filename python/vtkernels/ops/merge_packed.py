"""The merge family over packed segments, each with its own r: frames, crops, temporal segments.

An owner map of packed tokens is that of a batch of one: ``merge_apply(values[None], owner[None], out_len)`` and
``unmerge(merged[None], owner[None])`` take it as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtkernels.ops._autograd import below, needs_grad
from vtkernels.ops.merge import merge_gradient


def bipartite_match_varlen(
    metric: Tensor,
    cu_seqlens: Tensor,
    r: Tensor,
    *,
    protect: Tensor | None = None,
    threshold: float | None = None,
    split: str = "even_odd",
    rank: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Matches packed segments, each by itself and with its own r: :func:`bipartite_match` for every segment.

    Positions, even or odd, count from the start of the segment; no edge leaves its segment. The shapes of the outputs
    do not depend on what merges, so nothing synchronises.

    Args:
        metric: float32, float16 or bfloat16 ``[T, C]``, C >= 1: the segments one after the other; any token stride,
            contiguous last dimension.
        cu_seqlens: int32 ``[S + 1]``: segment ``s`` is rows ``cu_seqlens[s] ... cu_seqlens[s + 1] - 1``; it may be
            empty.
        r: int32 ``[S]``: edges to merge in each segment, ``r >= 0``; clamped to the sources that may merge.
        protect: bool ``[T]``.
        threshold, split: as in :func:`bipartite_match`.
        rank: int64 ``[T]``: the rank of each token within its segment, of which the parity is read.

    Returns:
        ``owner`` int64 ``[T]``: the row of each token in the packed output, -1 when dropped; ``similarity`` float32
        ``[T]``; ``cu_merged`` int32 ``[S + 1]``: the output rows of segment ``s`` are
        ``cu_merged[s] ... cu_merged[s + 1] - 1``.

    Raises:
        RuntimeError: as :func:`bipartite_match`; on the CPU also ``cu_seqlens`` that does not ascend from 0 to T, and
            an r below 0. On CUDA, where a report needs a synchronisation, such an r counts as 0, and such
            ``cu_seqlens`` drops every token.

    Example:
        >>> metric = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 1.0]])
        >>> cu, r = torch.tensor([0, 2, 5], dtype=torch.int32), torch.tensor([1, 1], dtype=torch.int32)
        >>> owner, _, cu_merged = bipartite_match_varlen(metric, cu, r)
        >>> owner.tolist(), cu_merged.tolist()
        ([0, 0, 1, 1, 2], [0, 1, 3])

    AIM merges within each frame (arXiv 2412.03248), CenterCLIP within temporal segments (arXiv 2205.00823).
    """
    return torch.ops.vtk.bipartite_match.varlen(
        metric, cu_seqlens, r, protect=protect, threshold=threshold, split=split, rank=rank
    )


def bipartite_merge_varlen(
    tokens: Tensor,
    metric: Tensor,
    cu_seqlens: Tensor,
    r: Tensor,
    *,
    size: Tensor | None = None,
    protect: Tensor | None = None,
    threshold: float | None = None,
    split: str = "even_odd",
    order: str = "position",
    out_len: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Merges packed segments, each by itself and with its own r: match and size-weighted mean in one call.

    ``owner, _, cu_merged = bipartite_match_varlen(metric, cu_seqlens, r)``;
    ``merged[m] = sum(size * tokens) / sum(size)`` over the tokens that m owns. Since segments may end with different
    numbers of rows, r is clamped to what ``protect`` and ``threshold`` allow in each, on every device. The gradient
    flows to ``tokens`` and takes the sizes as constants.

    Args:
        tokens: float32, float16 or bfloat16 ``[T, D]``: the segments one after the other; any token stride,
            contiguous last dimension.
        metric, cu_seqlens, r, protect, threshold, split: as in :func:`bipartite_match_varlen`.
        size: ``[T]``, positive and finite: how many tokens each one stands for. Default: ones.
        order: ``"position"`` or ``"tome"``, as in :func:`bipartite_merge`, within each segment.
        out_len: rows of the output, at least as many as are left: ``T - sum(r)`` when nothing clamps r, or any bound
            such as T. Rows beyond ``cu_merged[S]`` are zeros of size 0. Default: exactly the rows that are left; on
            CUDA reading that number is a synchronisation, which a given ``out_len`` avoids (needed under CUDA-graph
            capture).

    Returns:
        ``merged [out_len, D]`` of the dtype of ``tokens``, ``size`` float32 ``[out_len]``, ``owner`` int64 ``[T]`` and
        ``cu_merged`` int32 ``[S + 1]``.

    Raises:
        RuntimeError: as :func:`bipartite_match_varlen`; ``order="tome"`` with ``split="causal"``; on the CPU also a
            size that is not a finite number above 0, and an ``out_len`` below the rows that are left. On CUDA the
            rows beyond ``out_len`` are lost, their tokens' owners lie outside, which every op takes as dropped.

    Example:
        >>> metric = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 1.0]])
        >>> cu, r = torch.tensor([0, 2, 5], dtype=torch.int32), torch.tensor([1, 1], dtype=torch.int32)
        >>> merged, size, _, cu_merged = bipartite_merge_varlen(torch.arange(5.0)[:, None], metric, cu, r)
        >>> merged[:, 0].tolist(), size.tolist(), cu_merged.tolist()
        ([0.5, 2.5, 4.0], [2.0, 2.0, 1.0], [0, 1, 3])

    AIM (arXiv 2412.03248); with ``split="causal"`` and ``threshold=0.5`` the temporal merging of B-VLLM
    (arXiv 2412.09919).
    """
    return torch.ops.vtk.bipartite_merge.varlen(
        tokens, metric, cu_seqlens, r, size=size, protect=protect, threshold=threshold, split=split, order=order,
        out_len=out_len,
    )  # fmt: skip


@torch.library.register_fake("vtk::bipartite_match.varlen")
def _(metric, cu_seqlens, r, **_options):
    count = metric.shape[0]
    cu_merged = torch.empty_like(cu_seqlens, memory_format=torch.contiguous_format)
    return metric.new_empty(count, dtype=torch.int64), metric.new_empty(count, dtype=torch.float32), cu_merged


@torch.library.register_fake("vtk::bipartite_merge.varlen")
def _(tokens, metric, cu_seqlens, r, *, out_len=None, **_options):
    rows = torch.library.get_ctx().new_dynamic_size() if out_len is None else out_len
    torch._check(rows >= 0, lambda: f"vtk::bipartite_merge: expected out_len >= 0, got {rows}")
    cu_merged = torch.empty_like(cu_seqlens, memory_format=torch.contiguous_format)
    return (
        tokens.new_empty(rows, tokens.shape[1]),
        tokens.new_empty(rows, dtype=torch.float32),
        tokens.new_empty(tokens.shape[0], dtype=torch.int64),
        cu_merged,
    )


_library = torch.library.Library("vtk", "FRAGMENT")


class _BipartiteMergeVarlen(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, metric, cu_seqlens, r, options):
        merged, total, owner, cu_merged = below(
            torch.ops.vtk.bipartite_merge.varlen, tokens, metric, cu_seqlens, r, **options
        )
        ctx.save_for_backward(owner, options["size"], total)
        ctx.mark_non_differentiable(total, owner, cu_merged)
        return merged, total, owner, cu_merged

    @staticmethod
    def backward(ctx, grad, *_):
        owner, size, total = (None if t is None else t[None] for t in ctx.saved_tensors)
        return merge_gradient(grad[None], owner, size, total, "weighted_mean", None, None)[0], *[None] * 4


def _bipartite_merge_varlen_autograd(tokens, metric, cu_seqlens, r, **options):
    if needs_grad(tokens):
        return _BipartiteMergeVarlen.apply(tokens, metric, cu_seqlens, r, {"size": None, **options})
    return below(torch.ops.vtk.bipartite_merge.varlen, tokens, metric, cu_seqlens, r, **options)


_library.impl("bipartite_match.varlen", torch.library.fallthrough_kernel, "Autograd")
_library.impl("bipartite_merge.varlen", _bipartite_merge_varlen_autograd, "Autograd")
