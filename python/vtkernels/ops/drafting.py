"""Beside verification: tokens with their confidence, and caches rid of rejected drafts."""

from __future__ import annotations

import torch
from torch import Tensor

from vtkernels.ops._autograd import below, needs_grad, without_backward


def compact_accepted(
    caches: list[Tensor], accepted: Tensor, num_accepted: Tensor, *, tail: int, slack: Tensor | None = None
) -> None:
    """Moves the cache entries of accepted draft nodes to where they follow the tokens before them, in place.

    The last ``tail`` tokens of a cache are the nodes that one pass of the model brought, node 0 first. Then, for ``i``
    from 0 to ``num_accepted[b]``, ``cache[b, :, N - tail - slack[b] + i] = cache[b, :, N - tail + accepted[b, i]]``.
    Everything else keeps its value; the caller crops it. One launch for all layers.

    Args:
        caches: 1 to 256 tensors ``[B, Hk, N, D]`` of any dtype and strides, the last dimension contiguous: keys and
            values of all layers. Hk, N and D may differ; no two share memory.
        accepted: int64 ``[B, slots]`` as :func:`vtkernels.verify_draft` returns it: ascending nodes, the root first.
        num_accepted: int32 ``[B]``, accepted nodes without the root; -1 moves nothing.
        tail: how many of the last tokens are nodes.
        slack: int32 ``[B]``, unused tokens in front of the tail, of requests that are shorter than the longest one.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, naming the argument; caches that require gradients.
            On the CPU also numbers out of range and nodes that do not ascend; on CUDA, where a report needs a
            synchronisation, a request's moves end there.

    Returns:
        None: the caches have changed.

    Example:
        >>> cache = torch.arange(6.0).reshape(1, 1, 6, 1)  # 2 tokens, then 4 nodes
        >>> accepted, count = torch.tensor([[0, 2, 3]]), torch.tensor([2], dtype=torch.int32)
        >>> compact_accepted([cache], accepted, count, tail=4)
        >>> cache.flatten().tolist()
        [0.0, 1.0, 2.0, 4.0, 5.0, 5.0]

    The step after verification in Medusa (arXiv 2401.10774) and EAGLE-2 (arXiv 2406.16858).
    """
    torch.ops.vtk.compact_accepted.default(caches, accepted, num_accepted, tail=tail, slack=slack)


def sample_stats(
    logits: Tensor, *, temperature: Tensor | None = None, seeds: Tensor | None = None, positions: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Chooses a token of each row and says how sure the row is of it, in one pass over the logits.

    With ``p = softmax(logits)``: the token is ``argmax p``, the lowest of equals, or is drawn from
    ``softmax(logits / temperature)``; ``logprob = log p[token]``; ``entropy = -sum p log p``; ``margin`` is the
    difference of the two largest of ``p``. Only the draw knows a temperature.

    A draw is a function of its row's logits, seed and position: the same in any batch. It is independent of those by
    which :func:`vtkernels.verify_draft` judges the token. A token of probability 0 is never drawn.

    Args:
        logits: float32, float16 or bfloat16 ``[R, V]``, ``1 <= V <= 2^20``, last dimension contiguous.
        temperature: float32 ``[R]``; 0 takes the argmax. None: 0 for every row.
        seeds: int64 ``[R]``, of the requests; given with ``temperature``.
        positions: int64 ``[R]``, of the drawn token in its sequence; given with ``temperature``.

    Returns:
        ``token`` int64 ``[R]``, ``logprob``, ``entropy`` and ``margin`` float32 ``[R]``, natural logarithms. Where the
        maximum is not finite or a logit is NaN, the token is the argmax without NaN and the others are NaN.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, naming the argument. On the CPU also a negative or NaN
            temperature, which on CUDA means 0.

    Example:
        >>> token, logprob, entropy, margin = sample_stats(torch.tensor([[0.0, 0.0, -torch.inf]]))
        >>> token.item(), round(logprob.exp().item(), 3), round(entropy.exp().item(), 3), margin.item()
        (0, 0.5, 2.0, 0.0)

    The confidences of Dimple (arXiv 2505.16990); drafting for speculative sampling (arXiv 2211.17192).
    """
    return torch.ops.vtk.sample_stats.default(logits, temperature=temperature, seeds=seeds, positions=positions)


@torch.library.register_fake("vtk::compact_accepted")
def _(caches, accepted, num_accepted, *, tail, slack=None):
    return None


@torch.library.register_fake("vtk::sample_stats")
def _(logits, **_options):
    rows = logits.shape[0]
    return logits.new_empty(rows, dtype=torch.int64), *(logits.new_empty(rows, dtype=torch.float32) for _ in range(3))


def _compact_accepted_autograd(caches, accepted, num_accepted, *, tail, slack=None):
    if needs_grad(*caches):
        raise RuntimeError("vtk::compact_accepted: expected caches without gradients, which would be of moved entries")
    below(torch.ops.vtk.compact_accepted.default, caches, accepted, num_accepted, tail=tail, slack=slack)


def _sample_stats_autograd(logits, **options):
    reason = "vtk::sample_stats: there is no backward pass: a choice has no gradient"
    return without_backward(reason, lambda logits: torch.ops.vtk.sample_stats.default(logits, **options), logits)


_library = torch.library.Library("vtk", "FRAGMENT")
_library.impl("compact_accepted", _compact_accepted_autograd, "Autograd")
_library.impl("sample_stats", _sample_stats_autograd, "Autograd")
