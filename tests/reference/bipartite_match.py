"""bipartite_match from its definition, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MIN_NORM = 2.0**-63  # squared: the smallest normal float32


def units(metric: Tensor) -> Tensor:
    """[N, C] divided by its norms: zeros for zero vectors, NaN where float32 has no cosine."""
    x = metric.double()
    norm = x.norm(dim=-1)
    unit = torch.where((norm < MIN_NORM)[:, None], 0.0, x / norm[:, None])
    return torch.where((norm.square() < 2.0**128)[:, None], unit, math.nan)


def parts(count: int, protect: Tensor | None, rank: Tensor | None) -> tuple[list[int], list[int]]:
    """Sources and destinations of one row."""
    order = torch.arange(count) if rank is None else rank
    free = torch.ones(count, dtype=torch.bool) if protect is None else ~protect
    return ((order % 2 == 0) & free).nonzero()[:, 0].tolist(), ((order % 2 != 0) & free).nonzero()[:, 0].tolist()


def descending(edge: tuple[float, int]) -> tuple[bool, float, int]:
    """Sorts (similarity, token): the most similar first, NaN last, ties by token."""
    similarity, token = edge
    return math.isnan(similarity), -similarity if similarity == similarity else 0.0, token


def best_edges(unit: Tensor, sources: list[int], destinations: list[int]) -> dict[int, tuple[float, int]]:
    """Each source's largest similarity and its first destination with it; of only NaN, the first destination."""
    edges = {}
    for s in sources if destinations else []:
        row = unit[destinations] @ unit[s]
        d = int(row.nan_to_num(-math.inf).argmax())
        edges[s] = (float(row[d]), destinations[d])
    return edges


def causal_edges(unit: Tensor, protect: Tensor | None) -> dict[int, tuple[float, int]]:
    """best_edges where the destinations of a token are the free tokens before it."""
    count = unit.shape[0]
    free = [n for n in range(count) if protect is None or not protect[n]]
    edges = {}
    for i, s in enumerate(free):
        edges |= best_edges(unit, [s], free[:i])
    return edges


def owner_map(count: int, targets: dict[int, int], first: list[int] = ()) -> list[int]:
    """Numbers the survivors, those of ``first`` before the others; the merged take their target's row, -1 when it has
    none.
    """
    survivors = list(first) + [n for n in range(count) if n not in targets and n not in set(first)]
    row = {n: i for i, n in enumerate(survivors)}
    return [row.get(targets.get(n, n), -1) for n in range(count)]


def match_row(
    metric: Tensor,
    r: int,
    protect: Tensor | None = None,
    threshold: float | None = None,
    rank: Tensor | None = None,
    order: str = "position",
    split: str = "even_odd",
) -> tuple[list[int], list[float], int]:
    """Owners, similarities and the number of rows that are left."""
    count = metric.shape[0]
    causal = split == "causal"
    edges = causal_edges(units(metric), protect) if causal else best_edges(units(metric), *parts(count, protect, rank))
    ranked = sorted(edges, key=lambda s: descending((edges[s][0], s)))
    allowed = [s for s in ranked if threshold is None or edges[s][0] > threshold]
    targets = {s: edges[s][1] for s in allowed[:r]}
    first = []
    if order == "tome":
        unmerged = [n for n in range(0, count, 2) if n not in targets]
        first = unmerged if protect is not None or not edges else [s for s in ranked if s not in targets]
    similarity = [edges[n][0] if n in edges else -math.inf for n in range(count)]
    return owner_map(count, targets, first), similarity, count - len(targets)


def bipartite_match(
    metric: Tensor,
    r: int,
    protect: Tensor | None = None,
    threshold: float | None = None,
    rank: Tensor | None = None,
    order: str = "position",
    split: str = "even_odd",
) -> tuple[Tensor, Tensor]:
    owners, similarities = [], []
    for b in range(metric.shape[0]):
        masks = [None if t is None else t[b] for t in (protect, rank)]
        owner, similarity, _ = match_row(metric[b], r, masks[0], threshold, masks[1], order, split)
        owners.append(owner)
        similarities.append(similarity)
    shape = metric.shape[:2]
    return (
        torch.tensor(owners, dtype=torch.int64).reshape(shape),
        torch.tensor(similarities, dtype=torch.float64).reshape(shape),
    )


def bipartite_match_varlen(
    metric: Tensor,
    cu_seqlens: Tensor,
    r: Tensor,
    protect: Tensor | None = None,
    threshold: float | None = None,
    rank: Tensor | None = None,
    order: str = "position",
    split: str = "even_odd",
) -> tuple[Tensor, Tensor, Tensor]:
    """Segment by segment."""
    owners, similarities, cu_merged = [], [], [0]
    for begin, end, merges in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), r.tolist(), strict=True):
        masks = [None if t is None else t[begin:end] for t in (protect, rank)]
        owner, similarity, rows = match_row(metric[begin:end], merges, masks[0], threshold, masks[1], order, split)
        owners += [row + cu_merged[-1] if row >= 0 else -1 for row in owner]
        similarities += similarity
        cu_merged.append(cu_merged[-1] + rows)
    return (
        torch.tensor(owners, dtype=torch.int64),
        torch.tensor(similarities, dtype=torch.float64),
        torch.tensor(cu_merged, dtype=torch.int32),
    )


def worst_regret(
    metric: Tensor, owner: Tensor, r: int, protect: Tensor | None = None, rank: Tensor | None = None
) -> float:
    """How far the matching of one row [N, C] is from a best one: the largest similarity given away, by a source that
    could have had a better destination or by an edge that merged before a better one. infinity when the map is no
    matching of r edges with survivors numbered by position.
    """
    count = metric.shape[0]
    sources, destinations = parts(count, protect, rank)
    unit = units(metric)
    edges = best_edges(unit, sources, destinations)
    home = {}  # output row -> the destination or lone token in it
    members: dict[int, list[int]] = {}
    for n, row in enumerate(owner.tolist()):
        members.setdefault(row, []).append(n)
    merged = {}
    for row, tokens in members.items():
        homes = [n for n in tokens if n not in edges] or tokens[:1]
        home[row] = homes[0]
        if len(homes) > 1 or (len(tokens) > 1 and homes[0] not in destinations):
            return math.inf
        merged |= {n: homes[0] for n in tokens if n != homes[0]}
    by_position = [home[row] for row in sorted(home)]
    if by_position != sorted(by_position) or sorted(home) != list(range(len(home))):
        return math.inf
    if len(merged) != min(r, len(edges)):
        return math.inf
    regrets = [edges[s][0] - float(unit[s] @ unit[d]) for s, d in merged.items()]
    if merged and len(merged) < len(edges):
        regrets.append(max(edges[s][0] for s in edges if s not in merged) - min(edges[s][0] for s in merged))
    return max(regrets, default=0.0)
