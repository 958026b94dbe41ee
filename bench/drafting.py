"""What stands beside verification: the choice of tokens with their confidence, and the compaction of caches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.harness import Case, compiled
from vtkernels import compact_accepted, sample_stats

OPS = ["compact_accepted", "sample_stats"]


def eager_stats(logits: Tensor, temperature: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What decoding loops write: softmaxes over the rows, and numbers of torch's generator."""
    logprob = logits.float().log_softmax(-1)
    p = logprob.exp()
    if temperature is None:
        token = logprob.argmax(-1)
    else:
        token = (logits.float() / temperature.unsqueeze(1)).softmax(-1).multinomial(1).squeeze(1)
    best = p.topk(2, dim=-1).values
    chosen = logprob.gather(1, token.unsqueeze(1)).squeeze(1)
    return token, chosen, -(p * logprob).sum(-1), best[:, 0] - best[:, 1]


def stats_case(rows: int, vocabulary: int, drawn: bool, dtype: torch.dtype, device: torch.device) -> Case:
    random = torch.Generator(device).manual_seed(0)
    logits = (3 * torch.randn(rows, vocabulary, generator=random, device=device)).to(dtype)
    number = torch.arange(rows, device=device)
    temperature = torch.full((rows,), 0.8, device=device) if drawn else None
    options = {"temperature": temperature, "seeds": number, "positions": number} if drawn else {}

    def check(ours, peer) -> None:
        for mine, theirs in zip(ours[2 if drawn else 0 :], peer[2 if drawn else 0 :], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)

    return Case(
        "sample_stats",
        f"[{rows}, {vocabulary}] {str(dtype).removeprefix('torch.')} {'drawn' if drawn else 'greedy'}",
        lambda: sample_stats(logits, **options),
        {
            "eager": lambda: lambda: eager_stats(logits, temperature),
            "inductor": compiled(eager_stats, logits, temperature),
        },
        check,
        bytes=logits.nbytes,
        target={"eager": 5.0, "inductor": 1.5},
    )


def compact_case(device: torch.device) -> Case:
    """8 requests of 1024 tokens and a tree of 60, of which 7 nodes are accepted, in 8 layers of 8 heads."""
    tail, moved, shape = 60, 8, (8, 8, 1084, 128)
    random = torch.Generator(device).manual_seed(0)
    caches = [torch.randn(shape, generator=random, device=device).bfloat16() for _ in range(16)]
    nodes = torch.arange(0, 2 * moved, 2, device=device)  # of a tree: node 0, then every other one
    accepted = nodes.repeat(8, 1)
    count = torch.full((8,), moved - 1, dtype=torch.int32, device=device)

    def eager() -> list[Tensor]:
        """Gather the accepted nodes, write them to the front, layer by layer."""
        place = (accepted + shape[2] - tail)[:, None, :, None].expand(-1, shape[1], -1, shape[3])
        for cache in caches:
            cache[:, :, -tail : moved - tail] = cache.gather(2, place)
        return caches

    def ours() -> list[Tensor]:
        compact_accepted(caches, accepted, count, tail=tail)
        return caches

    return Case(
        "compact_accepted",
        "16 x [8, 8, 1084, 128] bfloat16, 7 of 60 nodes",
        ours,
        {"eager": lambda: eager},
        lambda ours, peer: None,
        bytes=2 * 16 * 8 * 8 * (moved - 1) * 128 * 2,
        target={"eager": 3.0},
    )


def cases(device: torch.device) -> Iterator[Case]:
    for drawn in (False, True):
        yield stats_case(8, 152064, drawn, torch.bfloat16, device)
        yield stats_case(1, 152064, drawn, torch.float32, device)
    yield compact_case(device)
