from __future__ import annotations

import torch

from vtkernels.testing.cases import Case


def _plain(random: torch.Generator, dtype: torch.dtype):
    return (torch.rand(2, 9, 13, generator=random).to(dtype),), {"threshold": 0.3}


def _window(random: torch.Generator, dtype: torch.dtype):
    similarity = torch.rand(11, 3, 40, generator=random).to(dtype).transpose(0, 1)[:, :, :30]
    return (similarity,), {"threshold": 0.1, "max_window": 4}


def _one_frame(random: torch.Generator, dtype: torch.dtype):
    return (torch.rand(2, 0, 5, generator=random).to(dtype),), {"threshold": 0.5}


CASES = [
    Case("temporal_segments", "plain", _plain),
    Case("temporal_segments", "window, strided", _window),
    Case("temporal_segments", "one frame", _one_frame),
]
