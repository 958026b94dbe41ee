"""select_diverse and select_cover against the loops that pruning methods ship, eager and with a compiled step."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.harness import Case

OPS = ["select_diverse", "select_cover"]
COUNT, KEEP = 2880, 288  # LLaVA-NeXT's tokens, a tenth kept


def diverse_step(unit: Tensor, score: Tensor, blocked: Tensor, mode: str) -> tuple[Tensor, Tensor, Tensor]:
    pick = torch.where(blocked, torch.inf, score).argmin()
    row = unit @ unit.index_select(0, pick[None])[0]
    score = torch.maximum(score, row) if mode == "max_min" else score + row
    return pick, score, blocked.index_fill(0, pick[None], True)


def diverse_loop(features: Tensor, keep: int, mode: str, step: Callable = diverse_step) -> Tensor:
    """Normalise once in float32, then one matrix-vector product a pick."""
    unit = torch.nn.functional.normalize(features[0].float(), dim=-1)
    score, blocked = unit @ unit[0], torch.zeros(unit.shape[0], dtype=torch.bool, device=unit.device)
    blocked[0] = True
    picks = [torch.zeros((), dtype=torch.int64, device=unit.device)]
    for _ in range(keep - 1):
        pick, score, blocked = step(unit, score, blocked, mode)
        picks.append(pick)
    return torch.stack(picks).sort().values[None]


def cover_step(gains: Tensor, covered: Tensor, blocked: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    value = (gains - covered).clamp_min(0).sum(0)
    pick = torch.where(blocked, -1.0, value).argmax()
    covered = torch.maximum(covered, gains.index_select(1, pick[None]))
    return pick, covered, blocked.index_fill(0, pick[None], True)


def cover_loop(gains: Tensor, keep: int, step: Callable = cover_step) -> Tensor:
    """One pass over the gains a pick, in float32."""
    table = gains[0].float()
    covered = table.new_zeros(table.shape[0], 1)
    blocked = torch.zeros(table.shape[1], dtype=torch.bool, device=table.device)
    picks = []
    for _ in range(keep):
        pick, covered, blocked = step(table, covered, blocked)
        picks.append(pick)
    return torch.stack(picks).sort().values[None]


def compiled_step(loop: Callable, step: Callable, *args: object) -> Callable[[], Callable[[], object]]:
    def build():
        torch._dynamo.reset()
        fast = torch.compile(step, fullgraph=True, dynamic=False)
        return lambda: loop(*args, step=fast)

    return build


def check_picks(ours: Tensor, peer: Tensor) -> None:
    """The same tokens, up to picks that rounding decides: sums in another order part ways at near-ties."""
    same = len(set(ours[0].tolist()) & set(peer[0].tolist()))
    if same < 0.97 * ours.shape[1]:
        raise AssertionError(f"only {same} of {ours.shape[1]} picks agree")


def vision_features(width: int, device: torch.device) -> Tensor:
    """Around 60 centres with a common mean, as projected vision tokens are."""
    random = torch.Generator(device).manual_seed(0)
    centres = torch.randn(60, width, generator=random, device=device)
    mean = torch.randn(width, generator=random, device=device)
    owner = torch.randint(60, (COUNT,), generator=random, device=device)
    noise = torch.randn(COUNT, width, generator=random, device=device)
    return (0.7 * mean + 0.8 * centres[owner] + 0.6 * noise)[None]


def diverse_case(kind: str, width: int, dtype: torch.dtype, mode: str, device: torch.device) -> Case:
    if kind == "random":
        random = torch.Generator(device).manual_seed(0)
        features = torch.randn(1, COUNT, width, generator=random, device=device).to(dtype)
    else:
        features = vision_features(width, device).to(dtype)
    return Case(
        "select_diverse",
        f"{mode} {list(features.shape)} {str(dtype).removeprefix('torch.')} {kind}, keep {KEEP}",
        lambda: torch.ops.vtk.select_diverse.default(features, KEEP, mode=mode),
        {
            "torch loop": lambda: lambda: diverse_loop(features, KEEP, mode),
            "inductor step": compiled_step(diverse_loop, diverse_step, features, KEEP, mode),
        },
        check_picks,
        bytes=features.nbytes + KEEP * 8,
        flops=2 * COUNT * KEEP * width,  # of the plain loop
        target={"torch loop": 5.0},
    )


def coverage_gains(text: int, device: torch.device) -> Tensor:
    """MMTok's table: softmax of text-vision and vision-vision similarities, row weights multiplied in."""
    random = torch.Generator(device).manual_seed(0)
    vision = torch.nn.functional.normalize(vision_features(256, device)[0], dim=-1)
    words = torch.nn.functional.normalize(torch.randn(text, 256, generator=random, device=device), dim=-1)
    return torch.cat(
        [(words @ vision.T / 0.02).softmax(-1) / text, 0.5 * (vision @ vision.T / 0.2).softmax(-1) / COUNT]
    )[None]


def cover_case(kind: str, dtype: torch.dtype, device: torch.device) -> Case:
    random = torch.Generator(device).manual_seed(0)
    gains = (
        coverage_gains(32, device)
        if kind == "softmax"
        else torch.rand(1, COUNT + 32, COUNT, generator=random, device=device)
    )
    gains = gains.to(dtype)
    return Case(
        "select_cover",
        f"{list(gains.shape)} {str(dtype).removeprefix('torch.')} {kind}, keep {KEEP}",
        lambda: torch.ops.vtk.select_cover.default(gains, KEEP),
        {
            "torch loop": lambda: lambda: cover_loop(gains, KEEP),
            "inductor step": compiled_step(cover_loop, cover_step, gains, KEEP),
        },
        check_picks,
        bytes=gains.nbytes + KEEP * 8,
        target={"torch loop": 5.0},
    )


def cases(device: torch.device) -> Iterator[Case]:
    for mode in ("max_min", "max_sum"):
        for width in (1024, 4096):
            for dtype in (torch.float32, torch.bfloat16):
                yield diverse_case("random", width, dtype, mode, device)
        yield diverse_case("clustered", 4096, torch.bfloat16, mode, device)
    for kind in ("uniform", "softmax"):
        for dtype in (torch.float32, torch.bfloat16):
            yield cover_case(kind, dtype, device)
