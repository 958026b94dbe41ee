"""temporal_segments from its definition: every cut of every window, by a table."""

from __future__ import annotations

import torch
from torch import Tensor


def static_positions(similar: Tensor, begin: int, end: int) -> Tensor:
    """Of frames [begin, end): similar [F - 1, S] over every pair; nobody in a single frame."""
    return similar[begin : end - 1].all(0) & (end - begin > 1)


def cut_row(similar: Tensor, max_window: int) -> tuple[list[int], int]:
    """The segment of each frame and the total gain."""
    frames = len(similar) + 1
    total, length = [0] * (frames + 1), [0] * (frames + 1)
    for end in range(1, frames + 1):
        total[end] = -1
        for window in range(1, min(end, max_window) + 1):
            begin = end - window
            gain = total[begin] + int(static_positions(similar, begin, end).sum()) * (window - 1)
            if gain > total[end]:
                total[end], length[end] = gain, window
    cuts, end = [], frames
    while end > 0:
        cuts.append(length[end])
        end -= length[end]
    return [n for n, window in enumerate(reversed(cuts)) for _ in range(window)], total[frames]


def temporal_segments(similarity: Tensor, threshold: float, max_window: int = 1024) -> tuple[Tensor, Tensor, Tensor]:
    batch, pairs, positions = similarity.shape
    segment = torch.zeros(batch, pairs + 1, dtype=torch.int64)
    is_static = torch.zeros(batch, pairs + 1, positions, dtype=torch.bool)
    gain = torch.zeros(batch, dtype=torch.int64)
    for b in range(batch):
        similar = similarity[b].float() > threshold
        ids, gain[b] = cut_row(similar, max_window)
        segment[b] = torch.tensor(ids)
        for n in range(ids[-1] + 1):
            mine = (segment[b] == n).nonzero()[:, 0].tolist()
            is_static[b, mine] = static_positions(similar, mine[0], mine[-1] + 1)
    return segment, is_static, gain
