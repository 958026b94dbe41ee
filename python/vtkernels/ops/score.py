"""The score family: one score per key token."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_scores(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    lse: Tensor | None = None,
    head_reduce: str = "mean",
    query_reduce: str = "mean",
    causal: bool = False,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
) -> Tensor:
    """How much attention each key token receives, without ever holding the attention matrix.

    ``scores[b, n] = head_reduce_h query_reduce_i P[b, h, i, n]`` with ``P = softmax(scale * query key^T)`` over the
    ``N`` keys given, or ``P = exp(scale * query key^T - lse)`` when ``lse`` is given, so that the normaliser may cover
    keys outside the span (it comes from a flash-attention pass over all of them). Query rows are reduced first, then
    heads. Arithmetic is float32 whatever the inputs are; the extra memory does not grow with ``Q * N``. The result is
    not differentiable: it carries no gradient.

    Args:
        query: float32, float16 or bfloat16 ``[B, H, Q, D]``: the rows that vote (the [CLS] row, the last prompt
            token, all rows), ``Q >= 1``. Any batch, head and row strides, contiguous last dimension: views of a
            projection's output ``[B, N, H * D]`` work without a copy.
        key: ``[B, Hk, N, D]`` of the dtype of ``query``, ``H`` a multiple of ``Hk``: head ``h`` reads key head
            ``h // (H / Hk)``.
        scale: factor on the logits, default ``D ** -0.5``.
        lse: float32 ``[B, H, Q]``, natural log-sum-exp of each row's logits. A row whose ``lse`` is -inf contributes 0.
        head_reduce: ``"mean"``, ``"sum"``, ``"max"``, or ``"none"``, which keeps the heads.
        query_reduce: ``"mean"`` (over the rows that vote), ``"sum"`` or ``"max"``.
        causal: row ``i`` sees keys ``j <= N - Q + i`` (the last row sees all).
        key_mask: bool ``[B, N]``; False excludes a key: its score is 0 and it is not in the normaliser.
        query_mask: bool ``[B, Q]``; False rows do not vote. Without voters every score is 0.

    Returns:
        float32 ``[B, N]``, or ``[B, H, N]`` with ``head_reduce="none"``. A row that sees no key votes 0. A NaN in a
        row of ``query`` or in a key that the row sees makes the row's probabilities NaN (with ``lse`` only those that
        meet the NaN); what ``key_mask``, ``query_mask`` or ``causal`` exclude never leaks. A logit of +inf gives NaN,
        as ``torch.softmax`` does; a row of -inf alone counts as a row that sees no key. Probabilities below 1e-38
        are 0.

    Raises:
        RuntimeError: a shape, dtype, device or option that does not fit, naming the argument.

    Example:
        >>> query = torch.tensor([[[[1.0, 0.0]]]])
        >>> key = torch.tensor([[[[2.0, 5.0], [0.0, 5.0], [2.0, 0.0]]]])
        >>> [round(x, 3) for x in attention_scores(query, key, scale=1.0)[0].tolist()]
        [0.468, 0.063, 0.468]

    The score of FasterVLM (arXiv 2412.01818) with the [CLS] row, of FastV (arXiv 2403.06764) with the last prompt
    token; computed blockwise as in FlashAttention (arXiv 2205.14135).
    """
    return torch.ops.vtk.attention_scores.default(
        query,
        key,
        scale=scale,
        lse=lse,
        head_reduce=head_reduce,
        query_reduce=query_reduce,
        causal=causal,
        key_mask=key_mask,
        query_mask=query_mask,
    )


def energy_scores(
    metric: Tensor,
    *,
    margin: float = 0.9,
    kind: str = "elu",
    alpha: float = 1.0,
    valid: Tensor | None = None,
) -> Tensor:
    """How much each token has in common with all tokens of its row: high in a crowd, low for a token of its own.

    ``energy[b, i] = mean_j f(cos(metric[b, i], metric[b, j]))`` over all tokens, ``i`` included, with

    - ``"elu"``: ``f(s) = s - margin`` where that is positive, else ``alpha * (exp(s - margin) - 1)``;
    - ``"gaussian"``: ``f(s) = exp(-((1 - s) / sigma)^2 / 2) / (sigma * sqrt(2 pi))``, ``sigma = 1 - margin``.

    Arithmetic is float32 whatever the inputs are, and no ``N x N`` matrix is stored. The result carries no gradient.

    Args:
        metric: float32, float16 or bfloat16 ``[B, N, C]``, C >= 1; any batch and token strides, contiguous last
            dimension.
        margin: the cosine from which on a token counts as similar.
        kind: ``"elu"`` (images) or ``"gaussian"`` (text), which needs ``margin < 1``.
        alpha: of the ELU: how far a dissimilar token lowers the energy.
        valid: bool ``[B, N]``; False tokens count for nobody. Default: all count.

    Returns:
        float32 ``[B, N]``; -inf where ``valid`` is False. A token whose norm is below 1.1e-19 counts as a zero vector
        and has cosine 0 with every token, itself included. A token with a NaN, an infinity or an infinite norm has
        energy NaN and counts for nobody else.

    Raises:
        RuntimeError: a shape, dtype, device or option that does not fit, naming the argument.

    Extra memory: on the CPU about ``4 * N * (C + 16)`` bytes for each batch row in work, on CUDA ``4 * N`` for each row
    and as much for each block that shares it (at most 512 share all rows).

    Example:
        >>> angles = torch.deg2rad(torch.tensor([0.0, 10.0, 90.0, 82.0, 50.0, 200.0]))
        >>> metric = torch.stack([angles.cos(), angles.sin()], dim=-1)[None]
        >>> energy_scores(metric)[0].argsort(descending=True).tolist()
        [4, 3, 1, 2, 0, 5]

    PiToMe (arXiv 2405.16148).
    """
    return torch.ops.vtk.energy_scores.default(metric, margin=margin, kind=kind, alpha=alpha, valid=valid)


@torch.library.register_fake("vtk::attention_scores")
def _(query, key, *, head_reduce="mean", **_options):
    batch, heads, keys = query.shape[0], query.shape[1], key.shape[2]
    shape = (batch, heads, keys) if head_reduce == "none" else (batch, keys)
    return query.new_empty(shape, dtype=torch.float32)


@torch.library.register_fake("vtk::energy_scores")
def _(metric, **_options):
    return metric.new_empty(metric.shape[:2], dtype=torch.float32)


# Not differentiable: autograd looks past the ops, so their outputs do not require grad.
_library = torch.library.Library("vtk", "FRAGMENT")
_library.impl("attention_scores", torch.library.fallthrough_kernel, "Autograd")
_library.impl("energy_scores", torch.library.fallthrough_kernel, "Autograd")
