"""The merge family: which tokens merge into which, and the merged rows. The owner map is what its ops exchange."""

from __future__ import annotations

import torch
from torch import Tensor

from vtkernels.ops._autograd import below, needs_grad

# Every function below is a thin, documented face of one registered op; the work is in csrc/merge/.


def bipartite_match(
    metric: Tensor,
    r: int,
    *,
    protect: Tensor | None = None,
    threshold: float | None = None,
    split: str = "even_odd",
    rank: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Finds the ``r`` best source-destination pairs of a bipartite split and where every token goes when they merge.

    Sources are the tokens of even rank, destinations those of odd rank. Each source has one edge, to
    ``argmax_d cos(metric[source], metric[d])``; the ``r`` most similar edges merge. Ties: the lower destination, then
    the lower source. Similarities are float32. A token whose norm is below 1.1e-19 counts as a zero vector and has
    similarity 0 with every token; with a NaN, an infinity or an infinite norm its similarities are NaN, which rank
    below every number (as the only choice, the lowest destination is taken). The result carries no gradient.

    With ``split="causal"`` every token is a source and its destinations are the tokens before it, so the first token
    stays. Merging is not transitive: what would merge into a token that is merged itself goes nowhere and is dropped
    (owner -1), so a row that is left is its token and those that merge into it directly.

    Args:
        metric: float32, float16 or bfloat16 ``[B, N, C]``, C >= 1; any batch and token strides, contiguous last
            dimension.
        r: edges to merge, ``r >= 0``; clamped to the number of sources that may merge, row by row.
        protect: bool ``[B, N]``; True tokens are neither source nor destination.
        threshold: only edges with ``similarity > threshold`` may merge.
        split: ``"even_odd"`` or ``"causal"``; any other split into two sets is a ``rank``.
        rank: int64 ``[B, N]``: the rank of each token, of which the parity is read. Default: its position. Not with
            ``"causal"``.

    Returns:
        ``owner`` int64 ``[B, N]``: the output row of each token; survivors keep their order, a merged source has the
        row of its destination (-1 when that is merged too), so ``owner.max() + 1`` is the number of rows left.
        ``similarity`` float32 ``[B, N]``: of each source's edge, -inf for tokens without one.

    Raises:
        RuntimeError: a shape, dtype, device or option that does not fit, ``r < 0``, a NaN ``threshold``, naming the
            argument.

    Extra memory: on the CPU about ``4 * N * C + 32 * N`` bytes for each batch row in work, on CUDA about ``30 * N`` for
    each row and ``4 * N`` more for each block that shares it (at most 512 share all rows); never an ``N/2 x N/2``
    matrix.

    Example:
        >>> angles = torch.deg2rad(torch.tensor([0.0, 10.0, 90.0, 82.0, 50.0, 200.0]))
        >>> metric = torch.stack([angles.cos(), angles.sin()], dim=-1)[None]
        >>> owner, similarity = bipartite_match(metric, r=2)
        >>> owner.tolist(), similarity[0, 2].item() > similarity[0, 0].item()
        ([[0, 0, 1, 1, 2, 3]], True)

    ToMe (arXiv 2210.09461); by rank, PiToMe (arXiv 2405.16148); causal with ``threshold=0.5``, the temporal merging of
    B-VLLM (arXiv 2412.09919), whose similarity (cos + 1) / 2 must exceed 0.75.
    """
    return torch.ops.vtk.bipartite_match.default(
        metric, r, protect=protect, threshold=threshold, split=split, rank=rank
    )


def merge_apply(
    values: Tensor,
    owner: Tensor,
    out_len: int,
    *,
    weight: Tensor | None = None,
    reduce: str = "weighted_mean",
    center: Tensor | None = None,
    beta: float = 0.6,
) -> tuple[Tensor, Tensor]:
    """Reduces the tokens that share an output row into one.

    ``merged[b, m]`` is, over the tokens n with ``owner[b, n] = m``,

    - ``"weighted_mean"``: ``sum(weight_n * values_n) / sum(weight_n)``;
    - ``"mean"``, ``"sum"``, ``"max"`` of ``values_n``, whatever the weights. A NaN makes the maximum NaN.

    The others tell the value ``c`` of the token ``center[b, m]`` from the values ``x_1 ... x_s`` of the row's other
    tokens, its sources:

    - ``"target_plus_mean"``: ``c + mean(x)`` (VisionDrop);
    - ``"beta"``: ``beta * c + (1 - beta) * mean(x)`` (HoliTom);
    - ``"pivot"``: the mean of ``c`` and all ``(c + x_i) / 2`` (LOOK-M);
    - ``"similarity_weighted"``: the mean of ``c`` and all ``weight_i * x_i``, for any weights (LOOK-M, with the
      similarity of :func:`nearest_match`);
    - ``"sequential_half"``: ``c <- (c + x_i) / 2``, one source after another (HoliTom inside the language model);
    - ``"prune"``: ``c``; the sources are dropped, their weights too.

    Every reduction but the maximum is a sum of coefficients times values, divided once; the sum is float32, in the
    order of the tokens: no atomics, the same bits in every run. A row of one token is bitwise that token, a row of none
    is zeros. The gradient flows to ``values`` and takes the weights as constants; that of a maximum goes to the first
    token that attains it.

    Args:
        values: float32, float16 or bfloat16 ``[B, N, D]``; any batch and token strides, contiguous last dimension.
        owner: int64 ``[B, N]``: the output row of each token, or -1 to drop it.
        out_len: output rows, ``out_len >= 0``.
        weight: float32, float16 or bfloat16 ``[B, N]``, positive and finite: the size of each token. Default: ones.
        reduce: one of the names above.
        center: int64 ``[B, out_len]``, the token that the others of a row merge into, -1 for a row without tokens; for
            the reductions that tell it from the others, and only for them. Of a ``nearest_match`` these are its
            ``centers``.
        beta: what ``"beta"`` keeps of the center.

    Returns:
        ``merged [B, out_len, D]`` of the dtype of ``values`` and ``weight`` float32 ``[B, out_len]``, the sums of the
        weights.

    Raises:
        RuntimeError: a shape, dtype, device or option that does not fit, ``out_len < 0``, naming the argument. On the
            CPU also an owner outside ``-1 <= owner < out_len``, a weight that is not a finite number above 0 and a
            center that is no token of its row. On CUDA, where a report needs a synchronisation, such an owner drops its
            token, such a weight enters the formula, and such a center leaves a row of sources: the terms with ``c``
            are missing from the sum, and s is one less than their number.

    Example:
        >>> values = torch.tensor([[[1.0], [2.0], [6.0]]])
        >>> merged, weight = merge_apply(values, torch.tensor([[0, 1, 0]]), 2, weight=torch.tensor([[1.0, 1.0, 3.0]]))
        >>> merged.tolist(), weight.tolist()
        ([[[4.75], [2.0]]], [[4.0, 1.0]])

    ToMe (arXiv 2210.09461), VisionDrop (arXiv 2506.22283), HoliTom (arXiv 2505.21334), LOOK-M (arXiv 2406.18139).
    """
    return torch.ops.vtk.merge_apply.default(
        values, owner, out_len, weight=weight, reduce=reduce, center=center, beta=beta
    )


def nearest_match(
    metric: Tensor, centers: Tensor, *, valid: Tensor | None = None, distance: str = "cosine"
) -> tuple[Tensor, Tensor]:
    """Finds the most similar of a few centers for every token, as the owner map of the merge into them.

    ``owner[b, n] = argmax_k similarity(metric[b, n], metric[b, centers[b, k]])``; a center owns itself. Ties: the lower
    k. The similarity is

    - ``"cosine"``: of the two tokens, in float32; zero vectors, NaN and infinity count as in :func:`bipartite_match`
      (where every similarity is NaN, the first center is taken);
    - ``"euclidean"``: minus the squared distance, ``2 x . c - x . x - c . c`` in float32 and at most 0, so its error
      is that of the squared norms. A token with a NaN or a norm of 6.5e18 or more has similarities NaN.

    Heads that match on their own are batch rows of their own. The result carries no gradient.

    Args:
        metric: float32, float16 or bfloat16 ``[B, N, C]``, C >= 1; any batch and token strides, contiguous last
            dimension.
        centers: int64 ``[B, K]``: distinct tokens in any order, or -1 for none, so that batch rows may have fewer than
            K. K may be 0.
        valid: bool ``[B, N]``; False tokens take no part, and no center may be one.
        distance: ``"cosine"`` or ``"euclidean"``.

    Returns:
        ``owner`` int64 ``[B, N]``: a row of ``centers``, or -1 for tokens that take no part or have no center to go to.
        ``similarity`` float32 ``[B, N]`` to it; 1 (cosine) or 0 for the centers, -inf where owner is -1.

    Raises:
        RuntimeError: a shape, dtype, device or option that does not fit, naming the argument. On the CPU also a center
            outside ``-1 <= centers < N``, a repeated or an invalid one. On CUDA, where a report needs a
            synchronisation, these count as -1 (of equal centers, all but the first).

    Extra memory: on the CPU about ``4 * K * C + 4 * N`` bytes for each batch row in work, on CUDA about
    ``12 * N + 8 * K`` for each row and ``8 * N`` more for each further block that shares it; never an ``N x K`` matrix.

    Example:
        >>> metric = torch.tensor([[[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]])
        >>> owner, similarity = nearest_match(metric, torch.tensor([[2, 0]]))
        >>> owner.tolist(), similarity[0, 1].item() > 0.79
        ([[1, 0, 0]], True)

    LOOK-M (arXiv 2406.18139), VisionDrop (arXiv 2506.22283), HoliTom (arXiv 2505.21334).
    """
    return torch.ops.vtk.nearest_match.default(metric, centers, valid=valid, distance=distance)


def unmerge(merged: Tensor, owner: Tensor) -> Tensor:
    """Gives every token the row that it was merged into.

    ``out[b, n] = merged[b, owner[b, n]]``, zeros for a dropped token (owner -1). The rows are bitwise copies; the
    gradient of a row is the sum over its tokens, in their order.

    Args:
        merged: float32, float16 or bfloat16 ``[B, M, D]``; any batch and row strides, contiguous last dimension.
        owner: int64 ``[B, N]``: the row of each token, or -1.

    Returns:
        ``[B, N, D]`` of the dtype of ``merged``.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, naming the argument. On the CPU also an owner
            outside ``-1 <= owner < M``; on CUDA, where a report needs a synchronisation, it gives zeros.

    Example:
        >>> unmerge(torch.tensor([[[1.5], [3.5]]]), torch.tensor([[0, 0, 1, -1]])).tolist()
        [[[1.5], [1.5], [3.5], [0.0]]]

    ToMe for dense outputs (arXiv 2210.09461, arXiv 2303.17604).
    """
    return torch.ops.vtk.unmerge.default(merged, owner)


def bipartite_merge(
    tokens: Tensor,
    metric: Tensor,
    r: int,
    *,
    size: Tensor | None = None,
    protect: Tensor | None = None,
    order: str = "position",
) -> tuple[Tensor, Tensor, Tensor]:
    """Merges ``r`` tokens of each batch row into their most similar ones, in one call.

    ``owner = bipartite_match(metric, r)``; ``merged[m] = sum(size * tokens) / sum(size)`` over the tokens that m owns.
    Nothing of size ``N/2 x N/2`` is stored. The gradient flows to ``tokens`` and takes the sizes as constants.

    Args:
        tokens: float32, float16 or bfloat16 ``[B, N, D]``; any batch and token strides, contiguous last dimension.
        metric: float32, float16 or bfloat16 ``[B, N, C]``, as in :func:`bipartite_match`.
        r: tokens to merge, ``r >= 0``; clamped to the number of even positions (0 for N = 1) and to the sources that
            ``protect`` leaves, see below.
        size: ``[B, N]``, positive and finite: how many tokens each one stands for. Default: ones.
        protect: bool ``[B, N]``; True tokens are neither source nor destination.
        order: of the output rows: ``"position"``, or ``"tome"``: unmerged tokens of even position, then all of odd
            position, the former by descending similarity (ties by index) or, as in ToMe with a class token, by position
            when ``protect`` is given.

    Returns:
        ``merged [B, N - r, D]`` of the dtype of ``tokens``, ``size`` float32 ``[B, N - r]`` and ``owner`` int64
        ``[B, N]``.

    Raises:
        RuntimeError: a shape, dtype, device or option that does not fit, ``r < 0``, naming the argument; on the CPU
            also a size that is not a finite number above 0.

    Give an ``r`` that ``protect`` allows. Where it allows fewer sources, the CPU clamps r to the fewest over the
    batch rows, which gives more rows than ``torch.compile`` can foresee. On CUDA, where that needs a synchronisation,
    the output keeps its length, and the lowest-indexed tokens of even position that cannot merge are dropped
    (owner -1).

    Example:
        >>> angles = torch.deg2rad(torch.tensor([0.0, 10.0, 90.0, 82.0, 50.0, 200.0]))
        >>> metric = torch.stack([angles.cos(), angles.sin()], dim=-1)[None]
        >>> merged, size, owner = bipartite_merge(torch.arange(1.0, 7.0)[None, :, None], metric, r=2, order="tome")
        >>> merged[0, :, 0].tolist(), size.tolist()
        ([5.0, 1.5, 3.5, 6.0], [[1.0, 2.0, 2.0, 1.0]])

    ToMe (arXiv 2210.09461), TinyChart (arXiv 2404.16635), AuroraCap (arXiv 2410.03051).
    """
    return torch.ops.vtk.bipartite_merge.default(tokens, metric, r, size=size, protect=protect, order=order)


# Fakes. Shape errors are the real kernels' to word; a fake only refuses what would give a wrong output shape.


@torch.library.register_fake("vtk::bipartite_match")
def _(metric, r, **_options):
    torch._check(r >= 0, lambda: f"vtk::bipartite_match: expected r >= 0, got r = {r}")
    batch, count, _ = metric.shape
    return (
        metric.new_empty(batch, count, dtype=torch.int64),
        metric.new_empty(batch, count, dtype=torch.float32),
    )


@torch.library.register_fake("vtk::merge_apply")
def _(values, owner, out_len, **_options):
    torch._check(out_len >= 0, lambda: f"vtk::merge_apply: expected out_len >= 0, got {out_len}")
    return _rows_like(values, out_len)


@torch.library.register_fake("vtk::nearest_match")
def _(metric, centers, **_options):
    shape = metric.shape[:2]
    return metric.new_empty(shape, dtype=torch.int64), metric.new_empty(shape, dtype=torch.float32)


@torch.library.register_fake("vtk::unmerge")
def _(merged, owner):
    return merged.new_empty(*owner.shape, merged.shape[2])


@torch.library.register_fake("vtk::bipartite_merge")
def _(tokens, metric, r, **_options):
    torch._check(r >= 0, lambda: f"vtk::bipartite_merge: expected r >= 0, got r = {r}")
    count = tokens.shape[1]
    rows = count - min(r, (count + 1) // 2) if count > 1 else count
    return *_rows_like(tokens, rows), tokens.new_empty(tokens.shape[:2], dtype=torch.int64)


def _rows_like(values: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    batch, _, width = values.shape
    return values.new_empty(batch, rows, width), values.new_empty(batch, rows, dtype=torch.float32)


# Autograd. The owner map and the weights are constants of the backward pass.
# NOTE: torch.library.register_autograd refuses keyword-only tensor arguments, so the Autograd key is implemented
# here, as in ops/select.py.

_library = torch.library.Library("vtk", "FRAGMENT")


def rows_of(rows: Tensor, owner: Tensor) -> Tensor:
    """unmerge in plain torch, for any dtype: rows ``[B, M]`` or ``[B, M, D]``, zeros where owner is no row."""
    batch, count = rows.shape[:2]
    rows = torch.cat([rows, rows.new_zeros(batch, 1, *rows.shape[2:])], dim=1)
    index = owner.where(_owned(owner, count), count)
    if rows.dim() == 3:
        index = index[..., None].expand(-1, -1, rows.shape[2])
    return rows.gather(1, index)


def _owned(owner: Tensor, rows: int) -> Tensor:
    return (owner >= 0) & (owner < rows)


def merge_gradient(
    grad: Tensor,
    owner: Tensor,
    weight: Tensor | None,
    total: Tensor,
    reduce: str,
    extremes: tuple[Tensor, Tensor] | None = None,
    center: Tensor | None = None,
    beta: float = 0.6,
) -> Tensor:
    """The gradient of values, given that of merged ``[B, M, D]`` and the summed weights ``total [B, M]``; for a maximum
    ``extremes`` are values and merged.
    """
    if reduce == "max":
        return _max_gradient(grad, owner, *extremes)
    share = _shares(owner, weight, total, reduce, center, beta).where(_owned(owner, total.shape[1]), 0)
    return (rows_of(grad, owner) * share[..., None]).to(grad.dtype)


def _shares(
    owner: Tensor, weight: Tensor | None, total: Tensor, reduce: str, center: Tensor | None, beta: float
) -> Tensor:
    """What a row takes of each of its tokens ``[B, N]``: coefficient over divisor, as the table of
    csrc/merge/merge_apply.h has them. Tokens of no row have some number.
    """
    ones, owned = total.new_ones(owner.shape), _owned(owner, total.shape[1])
    weight = ones if weight is None else weight.to(total.dtype)
    if reduce == "sum":
        return ones
    if reduce == "weighted_mean":
        return weight / rows_of(total, owner)
    is_center = torch.zeros_like(owned)
    if center is not None:
        is_center = owned & (rows_of(center, owner) == torch.arange(owner.shape[1], device=owner.device))
    if reduce == "prune":
        return is_center.to(total.dtype)
    counts = total.new_zeros(total.shape).scatter_add(1, owner.where(owned, 0), owned.to(total.dtype))
    sources = rows_of(counts, owner) - 1
    some = sources.clamp_min(1)
    if reduce == "mean":
        shares = 1 / (sources + 1)
    elif reduce == "target_plus_mean":
        shares = ones.where(is_center, 1 / some)
    elif reduce == "beta":
        shares = (beta * ones).where(is_center, (1 - beta) / some)
    elif reduce == "pivot":
        shares = (sources + 2).where(is_center, 1) / (2 * (sources + 1))
    elif reduce == "similarity_weighted":
        shares = ones.where(is_center, weight) / (sources + 1)
    else:
        shares = torch.exp2(_before(owner.where(owned & ~is_center, -1)).where(~is_center, 0) - sources)
    return shares.where(sources > 0, 1)  # a row of one token is that token


def _before(owner: Tensor) -> Tensor:
    """How many tokens of the same row stand before each one."""
    rows, order = owner.sort(dim=1, stable=True)
    position = torch.arange(owner.shape[1], device=owner.device)
    return torch.empty_like(owner).scatter(1, order, position - torch.searchsorted(rows, rows))


def _max_gradient(grad: Tensor, owner: Tensor, values: Tensor, merged: Tensor) -> Tensor:
    """To the first token of each row that attains the maximum; to none where that is NaN."""
    count, owned = values.shape[1], _owned(owner, merged.shape[1])
    attains = (values == rows_of(merged, owner)) & owned[..., None]
    position = torch.arange(count, device=values.device)[None, :, None].expand(values.shape)
    index = owner.where(owned, 0)[..., None].expand(values.shape)
    first = position.new_full(merged.shape, count).scatter_reduce(1, index, position.where(attains, count), "amin")
    return rows_of(grad, owner).where(attains & (position == rows_of(first, owner)), 0)


class _MergeApply(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, owner, out_len, weight, reduce, center, beta):
        options = {"weight": weight, "reduce": reduce, "center": center, "beta": beta}
        merged, total = below(torch.ops.vtk.merge_apply.default, values, owner, out_len, **options)
        extremes = (values, merged) if reduce == "max" else (None, None)
        ctx.reduce, ctx.beta = reduce, beta
        ctx.save_for_backward(owner, weight, total, center, *extremes)
        ctx.mark_non_differentiable(total)
        return merged, total

    @staticmethod
    def backward(ctx, grad, _):
        owner, weight, total, center, *extremes = ctx.saved_tensors
        return merge_gradient(grad, owner, weight, total, ctx.reduce, extremes, center, ctx.beta), *[None] * 6


class _BipartiteMerge(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, metric, r, size, protect, order):
        merged, total, owner = below(
            torch.ops.vtk.bipartite_merge.default, tokens, metric, r, size=size, protect=protect, order=order
        )
        ctx.save_for_backward(owner, size, total)
        ctx.mark_non_differentiable(total, owner)
        return merged, total, owner

    @staticmethod
    def backward(ctx, grad, *_):
        owner, size, total = ctx.saved_tensors
        return merge_gradient(grad, owner, size, total, "weighted_mean"), *[None] * 5


class _Unmerge(torch.autograd.Function):
    @staticmethod
    def forward(ctx, merged, owner):
        out = below(torch.ops.vtk.unmerge.default, merged, owner)
        ctx.rows = merged.shape[1]
        ctx.save_for_backward(owner)
        return out

    @staticmethod
    def backward(ctx, grad):
        (owner,) = ctx.saved_tensors
        return torch.ops.vtk.merge_apply.default(grad.contiguous(), owner, ctx.rows, reduce="sum")[0], None


def _merge_apply_autograd(values, owner, out_len, *, weight=None, reduce="weighted_mean", center=None, beta=0.6):
    if needs_grad(values):
        return _MergeApply.apply(values, owner, out_len, weight, reduce, center, beta)
    options = {"weight": weight, "reduce": reduce, "center": center, "beta": beta}
    return below(torch.ops.vtk.merge_apply.default, values, owner, out_len, **options)


def _bipartite_merge_autograd(tokens, metric, r, *, size=None, protect=None, order="position"):
    if needs_grad(tokens):
        return _BipartiteMerge.apply(tokens, metric, r, size, protect, order)
    return below(torch.ops.vtk.bipartite_merge.default, tokens, metric, r, size=size, protect=protect, order=order)


def _unmerge_autograd(merged, owner):
    if needs_grad(merged):
        return _Unmerge.apply(merged, owner)
    return below(torch.ops.vtk.unmerge.default, merged, owner)


# NOTE: without this a float output of a tracked metric would claim a gradient that does not exist.
_library.impl("bipartite_match", torch.library.fallthrough_kernel, "Autograd")
_library.impl("nearest_match", torch.library.fallthrough_kernel, "Autograd")
_library.impl("merge_apply", _merge_apply_autograd, "Autograd")
_library.impl("bipartite_merge", _bipartite_merge_autograd, "Autograd")
_library.impl("unmerge", _unmerge_autograd, "Autograd")
