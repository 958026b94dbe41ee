"""The select family: scores (or features) to kept token indices, and the gather of the kept rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vtkernels.ops._autograd import below, needs_grad

# Every function below is a thin, documented face of one registered op; the work is in csrc/select/.


def prune_gather(
    tokens: Tensor,
    scores: Tensor,
    keep: int,
    *,
    keep_mask: Tensor | None = None,
    drop_mask: Tensor | None = None,
    head_reduce: str = "mean",
    order: str = "position",
) -> tuple[Tensor, Tensor]:
    """Keeps the ``keep`` highest-scoring tokens of each batch row and gathers their rows, in one call.

    ``indices[b] = sort(top_keep(scores[b]))`` and ``kept[b, i] = tokens[b, indices[b, i]]``. Ties: the lower index
    wins. NaN ranks below -inf. ``kept`` is bitwise the input rows; its gradient scatters back to ``tokens``.

    Args:
        tokens: float32, float16 or bfloat16 ``[B, N, D]``; any batch and token strides, contiguous last dimension.
        scores: float32, float16 or bfloat16 ``[B, N]``, or ``[B, H, N]``, which is reduced over heads first.
        keep: tokens to keep in each row, ``0 <= keep <= N``.
        keep_mask: bool ``[B, N]``; True tokens are always kept, count toward ``keep`` and rank above every score.
        drop_mask: bool ``[B, N]``; True tokens are never kept.
        head_reduce: ``"mean"``, ``"sum"`` or ``"max"``, in float32; read only when ``scores`` has heads.
        order: ``"position"`` (ascending indices) or ``"score"`` (best first, ties by index).

    Returns:
        ``kept [B, keep, D]`` of the dtype of ``tokens`` and ``indices`` int64 ``[B, keep]``.

    Raises:
        RuntimeError: a shape, dtype, device, ``keep`` or option that does not fit, naming the argument. On the CPU
            also contradictory masks: a token in both, more forced tokens than ``keep``, fewer allowed than ``keep``.
            On CUDA these are clamped, because reporting them needs a synchronisation: ``drop_mask`` wins, the
            lowest-indexed forced tokens stay, the lowest-indexed dropped tokens fill up.

    Example:
        >>> tokens = torch.arange(8.0).reshape(1, 4, 2)
        >>> kept, indices = prune_gather(tokens, torch.tensor([[0.1, 0.9, 0.2, 0.8]]), keep=2)
        >>> indices.tolist(), kept.tolist()
        ([[1, 3]], [[[2.0, 3.0], [6.0, 7.0]]])

    The selection step of FasterVLM (arXiv 2412.01818), FastV (arXiv 2403.06764) and most of their successors.
    """
    return torch.ops.vtk.prune_gather.default(
        tokens, scores, keep, keep_mask=keep_mask, drop_mask=drop_mask, head_reduce=head_reduce, order=order
    )


def prune_gather_attention(
    tokens: Tensor,
    query: Tensor,
    key: Tensor,
    keep: int,
    *,
    scale: float | None = None,
    lse: Tensor | None = None,
    head_reduce: str = "mean",
    query_reduce: str = "mean",
    keep_mask: Tensor | None = None,
    drop_mask: Tensor | None = None,
    order: str = "position",
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores the tokens by the attention that ``query`` pays to ``key``, then keeps and gathers the best.

    ``scores = attention_scores(query, key)``, then :func:`prune_gather`.

    Args:
        tokens: ``[B, N, D]`` as in :func:`prune_gather`.
        query: ``[B, H, Q, d]``: the rows that vote, for example the [CLS] row or the last prompt token.
        key: ``[B, Hk, N, d]``: one key a token; ``H`` is a multiple of ``Hk``.
        keep: tokens to keep in each row, ``0 <= keep <= N``.
        scale, lse, head_reduce, query_reduce: as in :func:`vtkernels.attention_scores`; ``head_reduce="none"`` is an
            error here, since a selection needs one score a token.
        keep_mask, drop_mask, order: as in :func:`prune_gather`.

    Returns:
        ``kept [B, keep, D]``, ``indices`` int64 ``[B, keep]`` and ``scores`` float32 ``[B, N]``.

    Raises:
        RuntimeError: as :func:`prune_gather` and :func:`vtkernels.attention_scores`.

    Example:
        >>> tokens, key = torch.eye(3).reshape(1, 3, 3), torch.tensor([[[[0.0], [2.0], [1.0]]]])
        >>> prune_gather_attention(tokens, torch.ones(1, 1, 1, 1), key, keep=2)[1].tolist()
        [[1, 2]]

    FastV (arXiv 2403.06764), FasterVLM (arXiv 2412.01818), without materialised attention.
    """
    return torch.ops.vtk.prune_gather.attention(
        tokens, query, key, keep, scale=scale, lse=lse, head_reduce=head_reduce, query_reduce=query_reduce,
        keep_mask=keep_mask, drop_mask=drop_mask, order=order,
    )  # fmt: skip


def prune_gather_varlen(
    tokens: Tensor,
    scores: Tensor,
    cu_seqlens: Tensor,
    keep: Tensor,
    *,
    keep_mask: Tensor | None = None,
    drop_mask: Tensor | None = None,
    head_reduce: str = "mean",
    order: str = "position",
    total_keep: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Prunes packed sequences, each with its own budget: :func:`prune_gather` for every segment.

    Args:
        tokens: ``[T, D]``: the segments one after the other.
        scores: ``[T]`` or ``[H, T]``.
        cu_seqlens: int32 ``[S + 1]``: segment ``s`` is rows ``cu_seqlens[s] ... cu_seqlens[s + 1] - 1``.
        keep: int32 ``[S]``: tokens to keep in each segment.
        keep_mask, drop_mask: bool ``[T]``, as in :func:`prune_gather`.
        head_reduce, order: as in :func:`prune_gather`.
        total_keep: ``sum(keep)`` when the caller knows it. On CUDA this avoids the one synchronisation that the
            ragged output size needs, and makes the call legal under CUDA-graph capture; rows beyond the true sum are
            index -1 and zeros.

    Returns:
        ``kept [sum(keep), D]``, ``indices`` int64 ``[sum(keep)]`` (rows of the packed tensor) and ``cu_kept`` int32
        ``[S + 1]``.

    Raises:
        RuntimeError: as :func:`prune_gather`; on the CPU also ``cu_seqlens`` that does not ascend from 0 to T, a
            ``keep`` outside its segment, and a ``total_keep`` that is not the sum.

    Example:
        >>> cu, keep = torch.tensor([0, 2, 5], dtype=torch.int32), torch.tensor([1, 2], dtype=torch.int32)
        >>> scores = torch.tensor([0.1, 0.2, 0.5, 0.3, 0.4])
        >>> prune_gather_varlen(torch.zeros(5, 1), scores, cu, keep)[1].tolist()
        [1, 2, 4]

    HiRED (arXiv 2408.10945) and GlobalCom2 (arXiv 2501.05179) budgets per image crop.
    """
    return torch.ops.vtk.prune_gather.varlen(
        tokens, scores, cu_seqlens, keep, keep_mask=keep_mask, drop_mask=drop_mask, head_reduce=head_reduce,
        order=order, total_keep=total_keep,
    )  # fmt: skip


def prune_gather_tensors(
    tensors: list[Tensor],
    scores: Tensor,
    keep: int,
    *,
    token_dims: list[int] | None = None,
    keep_mask: Tensor | None = None,
    drop_mask: Tensor | None = None,
    head_reduce: str = "mean",
    order: str = "position",
) -> tuple[list[Tensor], Tensor]:
    """Applies one selection to several tensors: hidden states, cos and sin, position ids, running scores.

    Args:
        tensors: 1 to 16 tensors of any dtype. Dimension ``token_dims[i]`` of ``tensors[i]`` has N tokens, the one
            before it B rows, or 1 row that all batch rows share; what follows is one dense row.
        scores: ``[B, N]`` or ``[B, H, N]``, as in :func:`prune_gather`.
        keep: tokens to keep in each row, ``0 <= keep <= N``.
        token_dims: default 1 for each; 2 for M-RoPE position ids ``[3, B, N]``.
        keep_mask, drop_mask, head_reduce, order: as in :func:`prune_gather`.

    Returns:
        The gathered tensors, each with B and ``keep`` in place of its batch and token sizes, and ``indices`` int64
        ``[B, keep]``.

    Raises:
        RuntimeError: as :func:`prune_gather`.

    Example:
        >>> positions = torch.arange(4).expand(3, 1, 4)
        >>> scores = torch.tensor([[0.1, 0.9, 0.2, 0.8]])
        >>> kept, _ = prune_gather_tensors([torch.zeros(1, 4, 2), positions], scores, 2, token_dims=[1, 2])
        >>> [list(t.shape) for t in kept], kept[1][0].tolist()
        ([[1, 2, 2], [3, 1, 2]], [[1, 3]])

    What FastV (arXiv 2403.06764) and PyramidDrop (arXiv 2410.17247) do between decoder layers, in one launch.
    """
    return torch.ops.vtk.prune_gather.tensors(
        tensors, scores, keep, token_dims=token_dims, keep_mask=keep_mask, drop_mask=drop_mask,
        head_reduce=head_reduce, order=order,
    )  # fmt: skip


# Fakes. Shape errors are the real kernels' to word; a fake only refuses what would give a wrong output shape.


@torch.library.register_fake("vtk::prune_gather")
def _(tokens, scores, keep, **_options):
    torch._check(keep >= 0 and keep <= scores.shape[-1], lambda: f"vtk::prune_gather: keep = {keep} of N tokens")
    return tokens.new_empty(tokens.shape[0], keep, tokens.shape[2]), _index_like(tokens, tokens.shape[0], keep)


@torch.library.register_fake("vtk::prune_gather.attention")
def _(tokens, query, key, keep, **_options):
    torch._check(keep >= 0 and keep <= tokens.shape[1], lambda: f"vtk::prune_gather: keep = {keep} of N tokens")
    batch, count, width = tokens.shape
    scores = tokens.new_empty(batch, count, dtype=torch.float32)
    return tokens.new_empty(batch, keep, width), _index_like(tokens, batch, keep), scores


@torch.library.register_fake("vtk::prune_gather.varlen")
def _(tokens, scores, cu_seqlens, keep, *, total_keep=None, **_options):
    rows = torch.library.get_ctx().new_dynamic_size() if total_keep is None else total_keep
    cu_kept = torch.empty_like(cu_seqlens, memory_format=torch.contiguous_format)
    return tokens.new_empty(rows, tokens.shape[1]), _index_like(tokens, rows), cu_kept


@torch.library.register_fake("vtk::prune_gather.tensors")
def _(tensors, scores, keep, *, token_dims=None, **_options):
    kept = []
    for tensor, dim in zip(tensors, token_dims or [1] * len(tensors), strict=True):
        kept.append(tensor.new_empty(*tensor.shape[: dim - 1], scores.shape[0], keep, *tensor.shape[dim + 1 :]))
    return kept, _index_like(scores, scores.shape[0], keep)


def _index_like(tensor: Tensor, *shape: int) -> Tensor:
    return tensor.new_empty(shape, dtype=torch.int64)


# Autograd. The indices are constants of the backward pass; a gathered row sends its gradient to where it came from.
# NOTE: torch.library.register_autograd refuses keyword-only tensor arguments, so the Autograd key is implemented
# here. Without gradients the kernel below costs one Python call (about 9 us); torch.inference_mode() skips it.

_library = torch.library.Library("vtk", "FRAGMENT")


class _GatherRows(torch.autograd.Function):
    """``call(*sources)`` returns (kept tensors, other outputs); ``scatter(i, grad, indices)`` undoes kept[i]."""

    @staticmethod
    def forward(ctx, call: Callable, scatter: Callable, *sources: Tensor):
        kept, others = below(call, *sources)
        ctx.scatter, ctx.sources = scatter, len(sources)
        ctx.save_for_backward(others[0])
        ctx.mark_non_differentiable(*others, *(k for k in kept if not k.is_floating_point()))
        return (*kept, *others)

    @staticmethod
    def backward(ctx, *grads):
        (indices,) = ctx.saved_tensors
        scattered = [
            ctx.scatter(i, grads[i], indices) if ctx.needs_input_grad[2 + i] else None for i in range(ctx.sources)
        ]
        return (None, None, *scattered)


def _scatter_rows(grad: Tensor, indices: Tensor, shape: torch.Size, token_dim: int) -> Tensor:
    """Gradient of a tensor of ``shape`` whose kept rows got ``grad``; a shared row set sums over the batch."""
    full = list(shape)
    full[token_dim - 1] = indices.shape[0]
    index = indices.reshape([1] * (token_dim - 1) + list(indices.shape) + [1] * (len(full) - token_dim - 1))
    # A selection never names a token twice, so this sum has one term and is deterministic on CUDA as well.
    scattered = grad.new_zeros(full).scatter_add(token_dim, index.expand(grad.shape), grad)
    return scattered.sum(token_dim - 1, keepdim=True) if shape[token_dim - 1] != full[token_dim - 1] else scattered


def _prune_gather_autograd(tokens, scores, keep, **options):
    op = torch.ops.vtk.prune_gather.default
    if not needs_grad(tokens):
        return below(op, tokens, scores, keep, **options)

    def call(source):
        kept, indices = op(source, scores, keep, **options)
        return [kept], [indices]

    shape = tokens.shape
    return _GatherRows.apply(call, lambda _, grad, indices: _scatter_rows(grad, indices, shape, 1), tokens)


def _prune_gather_attention_autograd(tokens, query, key, keep, **options):
    op = torch.ops.vtk.prune_gather.attention
    if not needs_grad(tokens):
        return below(op, tokens, query, key, keep, **options)

    def call(source):
        kept, indices, scores = op(source, query, key, keep, **options)
        return [kept], [indices, scores]

    shape = tokens.shape
    return _GatherRows.apply(call, lambda _, grad, indices: _scatter_rows(grad, indices, shape, 1), tokens)


def _prune_gather_varlen_autograd(tokens, scores, cu_seqlens, keep, **options):
    op = torch.ops.vtk.prune_gather.varlen
    if not needs_grad(tokens):
        return below(op, tokens, scores, cu_seqlens, keep, **options)

    def call(source):
        kept, indices, cu_kept = op(source, scores, cu_seqlens, keep, **options)
        return [kept], [indices, cu_kept]

    def scatter(_, grad, indices):
        spare = (indices < 0)[:, None]  # rows beyond the true sum, possible on CUDA with total_keep
        return grad.new_zeros(shape).index_add(0, indices.clamp_min(0), grad.masked_fill(spare, 0))

    shape = tokens.shape
    return _GatherRows.apply(call, scatter, tokens)


def _prune_gather_tensors_autograd(tensors, scores, keep, *, token_dims=None, **options):
    op = torch.ops.vtk.prune_gather.tensors
    if not needs_grad(*tensors):
        return below(op, tensors, scores, keep, token_dims=token_dims, **options)

    def call(*sources):
        kept, indices = op(list(sources), scores, keep, token_dims=token_dims, **options)
        return kept, [indices]

    dims = token_dims or [1] * len(tensors)
    shapes = [t.shape for t in tensors]
    *kept, indices = _GatherRows.apply(
        call, lambda i, grad, indices: _scatter_rows(grad, indices, shapes[i], dims[i]), *tensors
    )
    return kept, indices


_library.impl("prune_gather", _prune_gather_autograd, "Autograd")
_library.impl("prune_gather.attention", _prune_gather_attention_autograd, "Autograd")
_library.impl("prune_gather.varlen", _prune_gather_varlen_autograd, "Autograd")
_library.impl("prune_gather.tensors", _prune_gather_tensors_autograd, "Autograd")


def select_diverse(
    features: Tensor,
    keep: int,
    seed: Tensor | None = None,
    *,
    mode: str = "max_min",
    drop_mask: Tensor | None = None,
    order: str = "position",
) -> Tensor:
    """Selects tokens that are unlike each other, greedily, by cosine similarity.

    ``picked = [seed]``, then ``keep - 1`` times ``picked += [argbest_j f(j)]`` over the unpicked j, with

    - ``"max_min"``: the largest ``f(j) = min_{c in picked} 1 - cos(features[j], features[c])`` (farthest-first,
      k-center);
    - ``"max_sum"``: the smallest ``f(j) = sum_{c in picked} cos(features[j], features[c])``.

    Ties: the lower index wins. Similarities are float32. A token whose norm is below 1.1e-19 counts as a zero vector
    and has similarity 0 with every token; a token with a NaN, an infinity or an infinite norm ranks last (picked when
    nothing else is left, lower index first) and, as the seed, has similarity 0 with every token. The result carries
    no gradient.

    Args:
        features: float32, float16 or bfloat16 ``[B, N, C]``; any batch and token strides, contiguous last dimension.
        keep: tokens to select in each row, ``0 <= keep <= N``.
        seed: int64 ``[B]``, the first pick of each row; it counts toward ``keep``. Default: token 0, or the lowest
            token that ``drop_mask`` allows.
        mode: ``"max_min"`` or ``"max_sum"``.
        drop_mask: bool ``[B, N]``; True tokens are never picked.
        order: ``"position"`` (ascending indices) or ``"pick"`` (the order of the picks).

    Returns:
        ``indices`` int64 ``[B, keep]``.

    Raises:
        RuntimeError: a shape, dtype, device, ``keep`` or option that does not fit, naming the argument. On the CPU
            also a seed outside ``0 <= seed < N``, a seed that is dropped, and fewer allowed tokens than ``keep``. On
            CUDA these are clamped, because reporting them needs a synchronisation: the seed into the range, a
            dropped seed to the lowest allowed token, and the lowest-indexed dropped tokens fill up.

    Extra memory, for each row in work: on the CPU ``4 * keep * C`` bytes for ``"max_min"``, ``256 * N + 64 * C`` for
    ``"max_sum"``, and about ``24 * N``; on CUDA about ``16 * N``.

    Example:
        >>> angles = torch.tensor([0.0, 0.1, 1.5, 3.1])
        >>> features = torch.stack([angles.cos(), angles.sin()], dim=-1)[None]
        >>> select_diverse(features, keep=3).tolist()
        [[0, 2, 3]]
        >>> select_diverse(features, keep=3, order="pick").tolist()
        [[0, 3, 2]]

    ToDRE (arXiv 2505.18757; v1 is ``"max_min"``, v2 is ``"max_sum"``), DivPrune (arXiv 2503.02175).
    """
    return torch.ops.vtk.select_diverse.default(features, keep, seed, mode=mode, drop_mask=drop_mask, order=order)


def select_cover(gains: Tensor, keep: int, *, drop_mask: Tensor | None = None, order: str = "position") -> Tensor:
    """Selects the tokens that together cover most, greedily.

    ``covered_r = 0``, then ``keep`` times: pick ``argmax_j sum_r max(gains[r, j] - covered_r, 0)`` over the unpicked
    j and set ``covered_r = max(covered_r, gains[r, j])``. Ties: the lower index wins, so when nothing more can be
    gained the lowest unpicked indices follow. Sums are float32. A NaN gain counts as 0, a negative one adds nothing.
    The result carries no gradient.

    Args:
        gains: float32, float16 or bfloat16 ``[B, R, N]``: how well token j covers row r, row weights multiplied in;
            any batch and row strides, contiguous last dimension.
        keep: tokens to select, ``0 <= keep <= N``.
        drop_mask: bool ``[B, N]``; True tokens are never picked.
        order: ``"position"`` (ascending indices) or ``"pick"`` (the order of the picks).

    Returns:
        ``indices`` int64 ``[B, keep]``.

    Raises:
        RuntimeError: a shape, dtype, device, ``keep`` or option that does not fit, naming the argument. On the CPU
            also fewer allowed tokens than ``keep``; on CUDA the lowest-indexed dropped tokens fill up, because a
            report needs a synchronisation.

    Extra memory, for each batch item in work: on the CPU a transposed copy of the gains, ``4.5 * N * R`` bytes (the
    greedy loop reads columns); on CUDA about ``4 * R + 16 * N`` bytes.

    Example:
        >>> gains = torch.tensor([[[3.0, 2.0, 0.0], [0.0, 2.0, 1.0]]])
        >>> select_cover(gains, keep=2, order="pick").tolist()
        [[1, 0]]

    MMTok (arXiv 2508.18264).
    """
    return torch.ops.vtk.select_cover.default(gains, keep, drop_mask=drop_mask, order=order)


@torch.library.register_fake("vtk::select_diverse")
def _(features, keep, seed=None, **_options):
    batch, count, _ = features.shape
    torch._check(keep >= 0 and keep <= count, lambda: f"vtk::select_diverse: keep = {keep} of N tokens")
    return _index_like(features, batch, keep)


@torch.library.register_fake("vtk::select_cover")
def _(gains, keep, **_options):
    batch, _, count = gains.shape
    torch._check(keep >= 0 and keep <= count, lambda: f"vtk::select_cover: keep = {keep} of N tokens")
    return _index_like(gains, batch, keep)
