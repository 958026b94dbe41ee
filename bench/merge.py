"""Token merging against the chain of torch ops that ToMe ships: matmul, max, argsort, gather, scatter_reduce."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.harness import Case, compiled

OPS = ["bipartite_match", "nearest_match", "merge_apply", "unmerge", "bipartite_merge"]
# (batch, tokens, width), metric width, merged a layer: ToMe on CLIP-L/336 and TinyChart's SigLIP at 768 pixels.
SHAPES = [((1, 577, 1024), 64, 144), ((8, 2916, 1152), 72, 84)]

# (batch, tokens, width), centers, dtype: contextual tokens of CLIP-L/336, and a tenth of LLaVA-NeXT's hidden states.
NEAREST = [((8, 576, 1024), 64, torch.float32), ((1, 2880, 4096), 288, torch.bfloat16)]


def eager_nearest(metric: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """Each token's most similar center; stores all similarities."""
    unit = metric / metric.norm(dim=-1, keepdim=True)
    chosen = unit.gather(1, centers[..., None].expand(-1, -1, unit.shape[2]))
    similarity, owner = (unit @ chosen.transpose(-1, -2)).max(dim=-1)
    rows = torch.arange(centers.shape[1], device=centers.device).expand_as(centers)
    return owner.scatter(1, centers, rows), similarity


def eager_match(metric: Tensor) -> tuple[Tensor, Tensor]:
    """Each source's best similarity and destination; stores all similarities."""
    unit = metric / metric.norm(dim=-1, keepdim=True)
    return (unit[:, ::2] @ unit[:, 1::2].transpose(-1, -2)).max(dim=-1)


def eager_owner(metric: Tensor, r: int) -> Tensor:
    """The owner map, rows in ToMe's order."""
    best, partner = eager_match(metric)
    order = best.argsort(dim=-1, descending=True)
    merged, kept = order[:, :r], order[:, r:]
    batch, count, _ = metric.shape
    sources = torch.empty_like(order).scatter_(
        1, kept, torch.arange(kept.shape[1], device=metric.device).expand_as(kept)
    )
    sources.scatter_(1, merged, partner.gather(1, merged) + kept.shape[1])
    owner = order.new_empty(batch, count)
    owner[:, ::2] = sources
    owner[:, 1::2] = torch.arange(count // 2, device=metric.device) + kept.shape[1]
    return owner


def eager_apply(values: Tensor, owner: Tensor, rows: int, weight: Tensor) -> tuple[Tensor, Tensor]:
    index = owner[..., None].expand_as(values)
    total = weight.new_zeros(values.shape[0], rows).scatter_add(1, owner, weight)
    weighted = values * weight[..., None].to(values.dtype)
    merged = values.new_zeros(values.shape[0], rows, values.shape[2]).scatter_reduce(1, index, weighted, "sum")
    return merged / total[..., None].to(values.dtype), total


def eager_merge(tokens: Tensor, metric: Tensor, r: int, size: Tensor) -> tuple[Tensor, Tensor]:
    """As ToMe does it: the unmerged sources are gathered, the merged ones scattered into the destinations."""
    best, partner = eager_match(metric)
    order = best.argsort(dim=-1, descending=True)
    merged, kept = order[:, :r, None], order[:, r:, None]
    to = partner.gather(1, order[:, :r])[..., None]

    def reduce(x: Tensor) -> Tensor:
        sources, destinations, width = x[:, ::2], x[:, 1::2], x.shape[2]
        moved = sources.gather(1, merged.expand(-1, -1, width))
        destinations = destinations.scatter_reduce(1, to.expand(-1, -1, width), moved, "sum")
        return torch.cat([sources.gather(1, kept.expand(-1, -1, width)), destinations], dim=1)

    scale = size[..., None].to(tokens.dtype)
    total = reduce(scale)
    return reduce(tokens * scale) / total, total


def check_merge(ours: object, peer: object) -> None:
    """The same rows, up to edges that rounding decides; in 16 bits torch rounds the similarities, so it merges other
    tokens, and only the totals must agree.
    """
    (merged, size), (expected, expected_size) = (
        (t.double().reshape(*t.shape[:2], -1) for t in x[:2]) for x in (ours, peer)
    )
    same = ((merged - expected).abs() <= 1e-4 * (1 + expected.abs())).all(-1).double().mean().item()
    if ours[0].dtype == torch.float32 and same < 0.97:
        raise AssertionError(f"only {same:.1%} of the rows agree")
    total, expected_total = (merged * size).sum(1), (expected * expected_size).sum(1)
    if (total - expected_total).norm() > 0.01 * expected_total.norm():
        raise AssertionError("the sums over all tokens differ")


def inputs(shape: tuple[int, int, int], channels: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    random = torch.Generator(device).manual_seed(0)
    tokens = torch.randn(shape, generator=random, device=device).to(dtype)
    metric = torch.randn(*shape[:2], channels, generator=random, device=device).to(dtype)
    size = torch.randint(1, 5, shape[:2], generator=random, device=device).float()
    return tokens, metric, size


def name_of(*tensors: Tensor, **numbers: int) -> str:
    shapes = " ".join(str(list(t.shape)) for t in tensors)
    return f"{shapes} {str(tensors[0].dtype).removeprefix('torch.')} " + " ".join(
        f"{k} {v}" for k, v in numbers.items()
    )


def merge_case(shape: tuple, channels: int, r: int, dtype: torch.dtype, device: torch.device) -> Case:
    tokens, metric, size = inputs(shape, channels, dtype, device)
    args, (batch, count, width) = (tokens, metric, r, size), shape
    return Case(
        "bipartite_merge",
        name_of(tokens, metric, r=r),
        lambda: torch.ops.vtk.bipartite_merge.default(tokens, metric, r, size=size, order="tome"),
        {"eager": lambda: lambda: eager_merge(*args), "inductor": compiled(eager_merge, *args)},
        check_merge,
        bytes=(2 * count - r) * batch * width * tokens.element_size() + metric.nbytes + 2 * size.nbytes,
        flops=batch * count * count // 2 * channels,
        target={"eager": 3.0, "inductor": 3.0},
    )


def match_case(shape: tuple, channels: int, r: int, dtype: torch.dtype, device: torch.device) -> Case:
    _, metric, _ = inputs(shape, channels, dtype, device)

    def group_sizes(owner: Tensor) -> Tensor:
        """How many tokens share the row of each token: row numbers differ, groups do not."""
        counts = owner.new_zeros(shape[0], shape[1]).scatter_add(1, owner, torch.ones_like(owner))
        return counts.gather(1, owner)

    def check(ours: object, peer: object) -> None:
        same = (group_sizes(ours[0]) == group_sizes(peer)).float().mean().item()
        if same < 0.97:
            raise AssertionError(f"only {same:.1%} of the tokens are in groups of the same size")

    return Case(
        "bipartite_match",
        name_of(metric, r=r),
        lambda: torch.ops.vtk.bipartite_match.default(metric, r),
        {"eager": lambda: lambda: eager_owner(metric, r), "inductor": compiled(eager_owner, metric, r)},
        check,
        bytes=metric.nbytes + 12 * shape[0] * shape[1],
        flops=shape[0] * shape[1] * shape[1] // 2 * channels,
        target={"eager": 2.0, "inductor": 2.0},
    )


def nearest_case(shape: tuple, kept: int, dtype: torch.dtype, device: torch.device) -> Case:
    random = torch.Generator(device).manual_seed(0)
    metric = torch.randn(shape, generator=random, device=device).to(dtype)
    centers = torch.rand(shape[:2], generator=random, device=device).argsort(-1)[:, :kept]

    def check(ours: object, peer: object) -> None:
        """In 16 bits torch rounds the similarities, so that it finds other centers, which must be about as similar."""
        same = (ours[0] == peer[0]).float().mean().item()
        others = torch.ones_like(ours[0], dtype=torch.bool).scatter(1, centers, False)
        apart = (ours[1] - peer[1].float())[others].abs().max().item()
        if (dtype == torch.float32 and same < 0.999) or apart > 0.01:
            raise AssertionError(f"{same:.1%} of the tokens agree, similarities differ by up to {apart:.1e}")

    return Case(
        "nearest_match",
        name_of(metric, k=kept),
        lambda: torch.ops.vtk.nearest_match.default(metric, centers),
        {"eager": lambda: lambda: eager_nearest(metric, centers), "inductor": compiled(eager_nearest, metric, centers)},
        check,
        bytes=metric.nbytes + 12 * shape[0] * shape[1],
        flops=2 * shape[0] * shape[1] * kept * shape[2],
        target={"eager": 2.0},
    )


def apply_case(shape: tuple, channels: int, r: int, dtype: torch.dtype, device: torch.device) -> Case:
    tokens, metric, size = inputs(shape, channels, dtype, device)
    owner, rows = torch.ops.vtk.bipartite_match.default(metric, r)[0], shape[1] - r
    args = (tokens, owner, rows, size)
    return Case(
        "merge_apply",
        name_of(tokens, out_len=rows),
        lambda: torch.ops.vtk.merge_apply.default(tokens, owner, rows, weight=size),
        {"eager": lambda: lambda: eager_apply(*args), "inductor": compiled(eager_apply, *args)},
        check_merge,
        bytes=tokens.nbytes * (shape[1] + rows) // shape[1] + owner.nbytes + size.nbytes,
        target={"eager": 2.0},
    )


def unmerge_case(shape: tuple, channels: int, r: int, dtype: torch.dtype, device: torch.device) -> Case:
    tokens, metric, _ = inputs(shape, channels, dtype, device)
    merged, _, owner = torch.ops.vtk.bipartite_merge.default(tokens, metric, r)

    def eager(merged: Tensor, owner: Tensor) -> Tensor:
        return merged.gather(1, owner[..., None].expand(-1, -1, merged.shape[2]))

    def check(ours: object, peer: object) -> None:
        assert torch.equal(ours, peer)

    return Case(
        "unmerge",
        name_of(merged, owner),
        lambda: torch.ops.vtk.unmerge.default(merged, owner),
        {"eager": lambda: lambda: eager(merged, owner), "inductor": compiled(eager, merged, owner)},
        check,
        bytes=merged.nbytes + tokens.nbytes + owner.nbytes,
        target={"eager": 1.0},
    )


def cases(device: torch.device) -> Iterator[Case]:
    for shape, channels, r in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            yield merge_case(shape, channels, r, dtype, device)
        for make in (match_case, apply_case, unmerge_case):
            yield make(shape, channels, r, torch.float32, device)
    for shape, kept, dtype in NEAREST:
        yield nearest_case(shape, kept, dtype, device)
