"""What the Autograd kernels of all families share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def below(op: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Calls an op past its Autograd kernel."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args, **options)


class _NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, reason, *tensors):
        ctx.reason = reason
        return below(call, *tensors)

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(ctx.reason)


def without_backward(reason: str, call: Callable[..., Any], *tensors: Tensor | None) -> Any:
    """``call(*tensors)`` past its Autograd kernel; a backward pass says ``reason`` instead of ending without a word."""
    if needs_grad(*(t for t in tensors if t is not None)):
        return _NoBackward.apply(call, reason, *tensors)
    return below(call, *tensors)
