"""The scores against the matrix that they are reductions of: torch eager, torch.compile."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from bench.harness import Case, compiled

OPS = ["attention_scores", "energy_scores"]


def eager_scores(query: Tensor, key: Tensor) -> Tensor:
    """What pruning methods ship: the whole matrix, then its mean."""
    return (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1).mean((1, 2)).float()


def scores_case(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device, target: dict, views: bool = False
) -> Case:
    """shape = (B, H, Q, N, D); ``views``: q and k as a projection leaves them, [B, N, H * D] split into heads."""
    batch, heads, rows, keys, depth = shape
    random = torch.Generator(device).manual_seed(0)

    def projected(count: int) -> Tensor:
        x = torch.randn(batch, count, heads, depth, generator=random, device=device).to(dtype).transpose(1, 2)
        return x if views else x.contiguous()

    query, key = projected(rows), projected(keys)

    def check(ours: object, peer: object) -> None:
        assert isinstance(ours, Tensor) and isinstance(peer, Tensor)
        tolerance = 1e-4 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(ours, peer, rtol=tolerance, atol=tolerance * ours.max().item())

    return Case(
        "attention_scores",
        f"B{batch} H{heads} Q{rows} N{keys} D{depth} {str(dtype).removeprefix('torch.')}{' views' if views else ''}",
        lambda: torch.ops.vtk.attention_scores.default(query, key),
        {"eager": lambda: lambda: eager_scores(query, key), "inductor": compiled(eager_scores, query, key)},
        check,
        bytes=query.nbytes + key.nbytes + 4 * batch * keys,
        flops=2 * batch * heads * rows * keys * depth,
        target=target,
    )


def eager_energy(metric: Tensor, margin: float = 0.9, kind: str = "elu", alpha: float = 1.0) -> Tensor:
    """As PiToMe ships it: all cosines, then the mean of a function of them."""
    unit = torch.nn.functional.normalize(metric, dim=-1)
    cosine = unit @ unit.transpose(-1, -2)
    if kind == "elu":
        return torch.nn.functional.elu(cosine - margin, alpha=alpha).mean(-1)
    sigma = 1 - margin
    return (-0.5 * ((1 - cosine) / sigma) ** 2).exp().mean(-1) / (sigma * (2 * math.pi) ** 0.5)


def energy_case(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Case:
    batch, count, channels = shape
    random = torch.Generator(device).manual_seed(0)
    metric = torch.randn(shape, generator=random, device=device).to(dtype)

    def check(ours: object, peer: object) -> None:
        assert isinstance(ours, Tensor) and isinstance(peer, Tensor)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(ours, peer.float(), rtol=tolerance, atol=tolerance)

    return Case(
        "energy_scores",
        f"{list(shape)} {str(dtype).removeprefix('torch.')}",
        lambda: torch.ops.vtk.energy_scores.default(metric),
        {"eager": lambda: lambda: eager_energy(metric), "inductor": compiled(eager_energy, metric)},
        check,
        bytes=metric.nbytes + 4 * batch * count,
        flops=batch * count * count * channels,
        target={"eager": 2.0, "inductor": 2.0},
    )


def cases(device: torch.device) -> Iterator[Case]:
    goal = {"eager": 2.0, "inductor": 1.5}
    for dtype in (torch.float32, torch.bfloat16):
        for rows in (1, 64):
            for depth in (64, 128):
                yield scores_case((1, 16, rows, 2880, depth), dtype, device, goal)
        # CLIP-L: the [CLS] row of five crops, and all rows.
        yield scores_case((5, 16, 1, 577, 64), dtype, device, goal, views=True)
        yield scores_case((8, 16, 577, 577, 64), dtype, device, {"eager": 3.0, "inductor": 1.5}, views=True)
    for shape in ((8, 576, 64), (1, 2304, 1024)):
        for dtype in (torch.float32, torch.bfloat16):
            yield energy_case(shape, dtype, device)
