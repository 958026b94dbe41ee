"""verify_draft from its definition, in float64. Every random decision is one call of ``choose``.

``choose(weights, level, index, purpose)`` picks an index with probability proportional to its weight. ``philox_choice``
draws it from the numbers that the op draws; ``outcomes`` takes every branch, which gives the exact law.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.reference.philox import stream_word

ACCEPT, TOKEN, BLOCK = 0, 1, 2
Choose = Callable[[Sequence[float], int, int, int], int]
Law = list[float]  # a probability, or a weight, of every token


# ---- Random decisions ----


def philox_choice(seed: int, position: int) -> Choose:
    def choose(weights: Sequence[float], level: int, index: int, purpose: int) -> int:
        uniform = (stream_word(seed, position + level, 0, purpose, index) + 0.5) / 2**32
        target, through = uniform * math.fsum(weights), 0.0
        for pick, weight in enumerate(weights):
            through += weight
            if target < through and weight > 0:
                return pick
        return max(pick for pick, weight in enumerate(weights) if weight > 0)

    return choose


class Branch:
    """One way through: the planned picks, then the first possible one each time."""

    def __init__(self, planned: tuple[int, ...]):
        self.planned, self.taken, self.probability = planned, (), 1.0
        self.others: list[tuple[int, ...]] = []

    def __call__(self, weights: Sequence[float], *_key: int) -> int:
        possible = [pick for pick, weight in enumerate(weights) if weight > 0]
        if len(self.taken) < len(self.planned):
            pick = self.planned[len(self.taken)]
        else:
            pick = possible[0]
            self.others += [(*self.taken, other) for other in possible[1:]]
        self.taken = (*self.taken, pick)
        self.probability *= weights[pick] / math.fsum(weights)
        return pick


def outcomes(run: Callable[[Choose], Any]) -> Iterator[tuple[Any, float]]:
    """Every way ``run`` can end, with its probability."""
    pending: list[tuple[int, ...]] = [()]
    while pending:
        branch = Branch(pending.pop())
        yield run(branch), branch.probability
        pending += branch.others


# ---- Distributions ----


def normalised(weights: Sequence[float]) -> Law:
    total = math.fsum(weights)
    return [w / total for w in weights] if total > 0 else [0.0] * len(weights)


def softmax(logits: Sequence[float], temperature: float = 1.0) -> Law:
    """NaN counts as -inf; among infinite logits the mass is shared; a row of -inf has no mass."""
    usable = [-math.inf if math.isnan(z) else z for z in logits]
    most = max(usable)
    if most == -math.inf:
        return [0.0] * len(usable)
    return normalised([1.0 if z == most else math.exp((z - most) / temperature) for z in usable])


def processed(
    logits: Sequence[float], temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Law:
    """Temperature, then top-k, then top-p, then min-p; ties at a border are all kept."""
    p = softmax(logits, temperature)
    if 0 < top_k < len(p):
        usable = [-math.inf if math.isnan(z) else z for z in logits]
        border = sorted(usable, reverse=True)[top_k - 1]
        p = normalised([w if z >= border else 0.0 for w, z in zip(p, usable, strict=True)])
    if top_p < 1:
        above = mass_above(p)
        p = normalised([w if above[w] < top_p else 0.0 for w in p])
    least = min_p * max(p)
    return normalised([w if w >= least else 0.0 for w in p])


def mass_above(p: Law) -> dict[float, float]:
    """Of each probability: the mass of the larger ones."""
    count, above, through = Counter(p), {}, 0.0
    for w in sorted(count, reverse=True):
        above[w] = through
        through += w * count[w]
    return above


def argmax(logits: Sequence[float]) -> int:
    """The smallest index among the largest; -1 where there is nothing above -inf."""
    usable = [-math.inf if math.isnan(z) else z for z in logits]
    return usable.index(max(usable)) if max(usable) > -math.inf else -1


def excess(p: Law, q: Law, scale: float = 1.0) -> Law:
    return [max(scale * a - b, 0.0) for a, b in zip(p, q, strict=True)]


# ---- One request ----


@dataclass
class Request:
    tokens: list[int]
    parents: list[int]
    target: list[list[float]]  # logits after each node
    depth: int
    draft: list[Law] | None = None  # the distribution that the children of each node were drawn from
    temperature: float = 1.0
    filters: dict[str, Any] = field(default_factory=dict)  # top_k, top_p, min_p

    def children(self, node: int) -> list[int]:
        """In the order in which they are tried; pads are no children."""
        found = [i for i, parent in enumerate(self.parents) if parent == node]
        return [i for i in found if 0 <= self.tokens[i] < len(self.target[0])]

    def law(self, node: int) -> Law:
        """Of a greedy request, which knows weights in mode relaxed only, at temperature 1."""
        return processed(self.target[node], self.temperature or 1.0, **self.filters)


Result = tuple[list[int], int]  # the accepted nodes after the root, the token after them


def draw(law: Law, otherwise: Law, choose: Choose, level: int) -> int:
    """From ``law``, from ``otherwise`` where rounding left nothing of it, -1 where there is no distribution."""
    for weights in (law, otherwise):
        if math.fsum(weights) > 0:
            return choose(weights, level, 0, TOKEN)
    return -1


def greedy(request: Request) -> Result:
    path, node = [], 0
    while True:
        best = argmax(request.target[node])
        children = request.children(node) if len(path) < request.depth else []
        accepted = next((c for c in children if request.tokens[c] == best), None)
        if accepted is None:
            return path, best
        path.append(accepted)
        node = accepted


def walk(request: Request, choose: Choose, accept: Callable[[Law, list[int], int, int], int | None]) -> Result:
    """``accept`` gets a node's law, its children, the node and the level, and leaves the residual in the law."""
    path, node = [], 0
    while True:
        p = request.law(node)
        residual = list(p)
        children = request.children(node) if len(path) < request.depth else []
        accepted = accept(residual, children, node, len(path)) if sum(p) > 0 else None
        if accepted is None:
            return path, draw(residual, p, choose, len(path))
        path.append(accepted)
        node = accepted


def sample_chosen(request: Request, choose: Choose) -> Result:
    """The drafts are given: one coin over the masses of the children, in their order, and the rest."""

    def accept(p: Law, children: list[int], node: int, level: int) -> int | None:
        masses = []
        for child in children:
            masses.append(p[request.tokens[child]])
            p[request.tokens[child]] = 0.0
        pick = choose([*masses, math.fsum(p)], level, 0, ACCEPT) if children else 0
        return children[pick] if pick < len(children) else None

    return walk(request, choose, accept)


def sample_drawn(request: Request, choose: Choose, without_replacement: bool) -> Result:
    """The drafts were drawn: accept with min(1, p / q), else go on with the residual."""

    def accept(p: Law, children: list[int], node: int, level: int) -> int | None:
        q = list(request.draft[node])
        for index, child in enumerate(children):
            x = request.tokens[child]
            if q[x] == 0:  # drawn by nobody: a rejection tells nothing about p
                continue
            ratio = min(1.0, p[x] / q[x])
            if choose([ratio, 1 - ratio], level, index, ACCEPT) == 0:
                return child
            residual = excess(p, q)
            if sum(residual) == 0:
                return None
            p[:] = normalised(residual)
            if without_replacement:
                q[x] = 0.0
                q = normalised(q)
        return None

    return walk(request, choose, accept)


def block(request: Request, choose: Choose) -> Result:
    """The longest prefix of a chain that its joint test passes (Sun et al.)."""
    path, ratio, kept, ratios, node = [], 1.0, 0, [1.0], 0

    def draft_law(node: int, child: int) -> Law:
        given = [float(v == request.tokens[child]) for v in range(len(request.target[0]))]
        return list(request.draft[node]) if request.draft else given

    def next_of(node: int, level: int) -> int | None:
        return next(iter(request.children(node)), None) if level < request.depth else None

    while ratio > 0 and (child := next_of(node, len(path))) is not None:
        p, q, x = request.law(node), draft_law(node, child), request.tokens[child]
        gain = math.fsum(excess(p, q, ratio))
        h = gain / (gain + 1 - ratio) if gain + 1 - ratio > 0 else 1.0
        if path and choose([h, 1 - h], 0, len(path), BLOCK) == 0:
            kept = len(path)
        ratio = min(ratio * p[x] / q[x], 1.0) if q[x] > 0 else 0.0
        path.append(child)
        ratios.append(ratio)
        node = child
    if ratio > 0 and path and choose([ratio, 1 - ratio], 0, len(path), BLOCK) == 0:
        kept = len(path)
    last = path[kept - 1] if kept else 0
    p, residual = request.law(last), request.law(last)
    if (child := next_of(last, kept)) is not None:
        residual = excess(p, draft_law(last, child), ratios[kept])
    return path[:kept], draw(residual, p, choose, kept)


def typical_threshold(p: Law, epsilon: float, delta: float) -> float:
    entropy = -math.fsum(w * math.log(w + 1e-5) for w in p)
    return min(epsilon, delta * math.exp(-entropy))


def typical(request: Request, choose: Choose, epsilon: float, delta: float) -> Result:
    """The longest path of typical tokens, the likeliest of those, the first of those."""
    paths: dict[int, tuple[list[int], float]] = {0: ([], 1.0)}
    for node in range(len(request.tokens)):
        if node not in paths or len(paths[node][0]) == request.depth:
            continue
        path, likelihood = paths[node]
        p = request.law(node)
        for child in request.children(node):
            probability = p[request.tokens[child]]
            if probability > typical_threshold(p, epsilon, delta):
                paths[child] = ([*path, child], likelihood * probability)
    node = max(paths, key=lambda i: (len(paths[i][0]), paths[i][1], -i))
    p = request.law(node)
    least = min(typical_threshold(p, epsilon, delta), max(p))
    return paths[node][0], draw([w if w >= least else 0.0 for w in p], p, choose, len(paths[node][0]))


def take_neighbours(p: Law, near: Sequence[int], bound: float) -> tuple[list[int], float]:
    """The longest prefix of ``near`` whose mass is within the bound, and that mass."""
    taken: list[int] = []
    mass = 0.0
    for n in near:
        if not 0 <= n < len(p) or n in taken:
            continue
        if mass + p[n] > bound:
            break
        mass += p[n]
        taken.append(n)
    return taken, mass


def relaxed(request: Request, choose: Choose, neighbors: Sequence[Sequence[int]], delta: float) -> Result:
    """A draft stands for its neighbours too; delta bounds the mass moved at a node, or beyond 1 the child's gain."""

    def accept(p: Law, children: list[int], node: int, level: int) -> int | None:
        masses, moved = [], 0.0
        for child in children:
            x = request.tokens[child]
            own, p[x] = p[x], 0.0
            taken, mass = [], 0.0
            if own > 0 and x < len(neighbors):
                bound = (delta - 1) * own if delta > 1 else delta - moved
                taken, mass = take_neighbours(p, neighbors[x], bound)
            for n in taken:
                p[n] = 0.0
            moved += mass
            masses.append(own + mass)
        pick = choose([*masses, math.fsum(p)], level, 0, ACCEPT) if children else 0
        return children[pick] if pick < len(children) else None

    return walk(request, choose, accept)


def relaxed_greedy(request: Request, neighbors: Sequence[Sequence[int]], delta: float) -> Result:
    """A child is accepted when it is the argmax once it has its neighbours' mass."""
    path, node = [], 0
    while True:
        best, p = argmax(request.target[node]), request.law(node)
        accepted = None
        for child in request.children(node) if len(path) < request.depth else []:
            x, changed = request.tokens[child], list(p)
            if p[x] > 0 and x < len(neighbors):
                bound = (delta - 1) * p[x] if delta > 1 else delta
                changed[x] += take_neighbours(p, [n for n in neighbors[x] if n != x], bound)[1]
            if argmax(changed) == x and p[x] > 0:
                accepted = child
                break
        if accepted is None:
            return path, best
        path.append(accepted)
        node = accepted


def verify_request(request: Request, choose: Choose, mode: str = "sample", **options: Any) -> Result:
    if mode == "relaxed" and request.temperature == 0:
        return relaxed_greedy(request, **options)
    if mode == "greedy" or request.temperature == 0:
        return greedy(request)
    if mode == "sample" and request.draft is not None:
        return sample_drawn(request, choose, **options)
    rules = {"sample": sample_chosen, "block": block, "typical": typical, "relaxed": relaxed}
    return rules[mode](request, choose, **options)


# ---- The op ----


def verify_draft(
    target_logits: Tensor,
    draft_tokens: Tensor,
    parents: Tensor,
    *,
    draft_logits: Tensor | None = None,
    mode: str = "greedy",
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    num_nodes: Tensor | None = None,
    neighbors: Tensor | None = None,
    delta: float = 0.1,
    typical_epsilon: float = 0.09,
    typical_delta: float = 0.3,
    without_replacement: bool = False,
    depth: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, nodes, _ = target_logits.shape
    depth = nodes - 1 if depth is None else depth
    tokens, accepted = (torch.full((batch, depth + 1), -1, dtype=torch.int64) for _ in range(2))
    num_accepted = torch.zeros(batch, dtype=torch.int32)
    options: dict[str, Any] = {}
    if mode == "sample" and draft_logits is not None:
        options = {"without_replacement": without_replacement}
    elif mode == "typical":
        options = {"epsilon": typical_epsilon, "delta": typical_delta}
    elif mode == "relaxed":
        options = {"neighbors": neighbors.tolist(), "delta": delta}
    for b in range(batch):
        count = nodes if num_nodes is None else int(num_nodes[b])
        if count == 0:
            continue
        given = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
        request = Request(
            draft_tokens[b, :count].tolist(),
            parents[b, :count].tolist(),
            target_logits[b].double().tolist(),
            depth,
            None if draft_logits is None else [softmax(row) for row in draft_logits[b].double().tolist()],
            1.0 if temperature is None else float(temperature[b]),
            {name: value[b].item() for name, value in given.items() if value is not None},
        )
        choose = philox_choice(0 if seeds is None else int(seeds[b]), 0 if positions is None else int(positions[b]))
        path, last = verify_request(request, choose, mode, **options)
        num_accepted[b] = len(path)
        accepted[b, : len(path) + 1] = torch.tensor([0, *path])
        tokens[b, : len(path) + 1] = torch.tensor([*(request.tokens[i] for i in path), last])
    return tokens, accepted, num_accepted
