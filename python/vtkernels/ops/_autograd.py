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
