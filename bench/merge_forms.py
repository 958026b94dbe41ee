"""Packed segments against a loop over them, and several tensors against a loop over these, in torch ops."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.harness import Case
from bench.merge import eager_apply, eager_merge, eager_owner

OPS = ["bipartite_match.varlen", "bipartite_merge.varlen", "merge_apply.tensors"]
# Five crops of LLaVA-NeXT, of which the last three are cut to what the image fills; a quarter merges.
LENGTHS, WIDTH, CHANNELS = [576, 576, 432, 288, 144], 1024, 64


def segments(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    random = torch.Generator(device).manual_seed(0)
    tokens, metric = (torch.randn(sum(LENGTHS), width, generator=random, device=device) for width in (WIDTH, CHANNELS))
    lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=device)
    return tokens, metric, torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)), lengths // 4


def pair_operations() -> int:
    return sum(length * length // 2 * CHANNELS for length in LENGTHS)


def match_case(device: torch.device) -> Case:
    _, metric, bounds, r = segments(device)

    def loop() -> Tensor:
        owners, rows = [], 0
        for part in metric.split(LENGTHS):
            merges = part.shape[0] // 4
            owners.append(eager_owner(part[None], merges)[0] + rows)
            rows += part.shape[0] - merges
        return torch.cat(owners)

    def check(ours: object, peer: object) -> None:
        """Row numbers differ, the groups do not, up to edges that rounding decides."""
        sizes = [owner.bincount(minlength=owner.numel())[owner] for owner in (ours[0], peer)]
        same = (sizes[0] == sizes[1]).float().mean().item()
        if same < 0.97:
            raise AssertionError(f"only {same:.1%} of the tokens are in groups of the same size")

    return Case(
        "bipartite_match.varlen",
        f"{LENGTHS} x {CHANNELS} float32 r 1/4",
        lambda: torch.ops.vtk.bipartite_match.varlen(metric, bounds, r),
        {"eager loop": lambda: loop},
        check,
        bytes=metric.nbytes + 12 * metric.shape[0],
        flops=pair_operations(),
        target={"eager loop": 2.0},
    )


def merge_case(device: torch.device) -> Case:
    tokens, metric, bounds, r = segments(device)
    rows = sum(length - length // 4 for length in LENGTHS)

    def loop() -> Tensor:
        merged = [
            eager_merge(x[None], part[None], part.shape[0] // 4, x.new_ones(1, x.shape[0]))[0][0]
            for x, part in zip(tokens.split(LENGTHS), metric.split(LENGTHS), strict=True)
        ]
        return torch.cat(merged)

    def check(ours: object, peer: object) -> None:
        same = ((ours[0] - peer).abs() <= 1e-4 * (1 + peer.abs())).all(-1).double().mean().item()
        if same < 0.97:
            raise AssertionError(f"only {same:.1%} of the rows agree")

    return Case(
        "bipartite_merge.varlen",
        f"{LENGTHS} x {WIDTH}, {CHANNELS} float32 r 1/4",
        lambda: torch.ops.vtk.bipartite_merge.varlen(tokens, metric, bounds, r, order="tome", out_len=rows),
        {"eager loop": lambda: loop},
        check,
        bytes=tokens.nbytes + rows * WIDTH * 4 + metric.nbytes,
        flops=pair_operations(),
        target={"eager loop": 3.0},
    )


def tensors_case(device: torch.device) -> Case:
    """Keys and values of eight heads and a score, 2880 tokens into 2160."""
    random = torch.Generator(device).manual_seed(0)
    count, rows = 2880, 2160
    values = [torch.randn(1, count, *shape, generator=random, device=device) for shape in ((1024,), (1024,), ())]
    owner = torch.cat([torch.arange(rows), torch.randint(rows, (count - rows,))])[None].to(device)
    weight = torch.ones(1, count, device=device)

    def loop() -> list[Tensor]:
        merged = [eager_apply(x.reshape(1, count, -1), owner, rows, weight)[0] for x in values]
        return [m.reshape(1, rows, *x.shape[2:]) for m, x in zip(merged, values, strict=True)]

    def check(ours: object, peer: object) -> None:
        for got, want in zip(ours[0], peer, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)

    return Case(
        "merge_apply.tensors",
        f"[1, {count}, 1024] x 2, [1, {count}] float32 out_len {rows}",
        lambda: torch.ops.vtk.merge_apply.tensors(values, owner, rows),
        {"eager loop": lambda: loop},
        check,
        bytes=sum(x.nbytes for x in values) * (count + rows) // count + owner.nbytes,
        target={"eager loop": 2.0},
    )


def cases(device: torch.device) -> Iterator[Case]:
    for make in (match_case, merge_case, tensors_case):
        yield make(device)
