"""The exact law of the verification rules: every random decision of the reference enumerated, drafts included.

The op makes the same decisions from the same numbers (test_verify_draft.py), so these are its laws too.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch

from tests.reference.verify_draft import (
    ACCEPT,
    Law,
    Request,
    draw,
    excess,
    normalised,
    outcomes,
    processed,
    sample_chosen,
    take_neighbours,
    typical,
    typical_threshold,
    verify_request,
    walk,
)

CHAIN = [-1, 0, 1, 2]
SIBLINGS = [-1, 0, 0, 0]
TREE = [-1, 0, 0, 1, 1]
LATER_BRANCH = [-1, 0, 0, 2, 2]


class World:
    """A target and a drafter: a random law after every prefix, some tokens impossible."""

    def __init__(self, seed: int, vocab: int, **filters: Any):
        self.random = torch.Generator().manual_seed(seed)
        self.vocab, self.filters = vocab, filters
        self.logits: dict[tuple, list[float]] = {}

    def row(self, *key: Any) -> list[float]:
        if key not in self.logits:
            row = torch.randn(self.vocab, generator=self.random, dtype=torch.float64) * 1.5
            if torch.rand((), generator=self.random) < 0.4:
                row[int(torch.randint(self.vocab, (), generator=self.random))] = -math.inf
            self.logits[key] = row.tolist()
        return self.logits[key]

    def target(self, prefix: tuple[int, ...]) -> Law:
        filters = dict(self.filters)
        return processed(self.row("target", prefix), filters.pop("temperature", 1.0), **filters)

    def draft(self, prefix: tuple[int, ...]) -> Law:
        return processed(self.row("draft", prefix), 1.0)


def drafted(world: World, parents: list[int], drawing: str, choose: Callable) -> Request:
    """A tree whose tokens are ``chosen`` at will, or drawn from the drafter, ``independent``ly or ``distinct``."""
    tokens, prefixes = [0], [()]
    for node, parent in enumerate(parents[1:], start=1):
        siblings = [i for i in range(1, node) if parents[i] == parent]
        if drawing == "chosen":
            token = (node + len(prefixes[parent])) % world.vocab
        else:
            q = world.draft(prefixes[parent])
            if drawing == "distinct":
                q = [0.0 if v in {tokens[i] for i in siblings} else w for v, w in enumerate(q)]
            token = choose(q, node, 0, 2) if sum(q) > 0 else -1
        tokens.append(token)
        prefixes.append((*prefixes[parent], token))
    filters = dict(world.filters)
    return Request(
        tokens,
        parents,
        [world.row("target", prefix) for prefix in prefixes],
        len(parents) - 1,
        None if drawing == "chosen" else [world.draft(prefix) for prefix in prefixes],
        filters.pop("temperature", 1.0),
        filters,
    )


def emitted_law(world: World, parents: list[int], drawing: str, verify: Callable) -> dict[tuple[int, ...], float]:
    law: dict[tuple[int, ...], float] = defaultdict(float)

    def run(choose: Callable) -> tuple[int, ...]:
        request = drafted(world, parents, drawing, choose)
        path, last = verify(request, choose)
        return (*(request.tokens[i] for i in path), last)

    for tokens, probability in outcomes(run):
        law[tokens] += probability
    return law


def deviation(world: World, parents: list[int], drawing: str, verify: Callable, length: int) -> float:
    """The most by which the probability of a text of this length differs from the target's, once the target has
    written what the verification left open."""
    law = emitted_law(world, parents, drawing, verify)
    assert sum(law.values()) == pytest.approx(1, abs=1e-12)
    worst = 0.0
    for text in product(range(world.vocab), repeat=length):
        steps = [world.target(text[:i])[text[i]] for i in range(length)]
        got = sum(law[text[:i]] * math.prod(steps[i:]) for i in range(1, length + 1) if text[:i] in law)
        worst = max(worst, abs(got - math.prod(steps)))
    return worst


def rule(mode: str, **options: Any) -> Callable:
    return lambda request, choose: verify_request(request, choose, mode, **options)


DRAWN = {"independent": rule("sample", without_replacement=False), "distinct": rule("sample", without_replacement=True)}
FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6, "top_k": 2},
    {"temperature": 1.4, "top_p": 0.7},
    {"min_p": 0.3, "top_p": 0.95},
]


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("parents", [CHAIN, SIBLINGS, TREE, LATER_BRANCH])
@pytest.mark.parametrize("drawing", ["chosen", "independent", "distinct"])
def test_sample_has_the_law_of_the_target(drawing, parents, filters):
    depth = 3 if parents == CHAIN else 1 if parents == SIBLINGS else 2
    verify = DRAWN.get(drawing, rule("sample"))
    for seed in range(2):
        assert deviation(World(seed, 3, **filters), parents, drawing, verify, depth + 1) < 1e-12


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("drawing", ["chosen", "independent"])
def test_block_has_the_law_of_the_target(drawing, filters):
    for seed in range(3):
        assert deviation(World(seed, 3, **filters), CHAIN, drawing, rule("block"), 4) < 1e-12


@pytest.mark.parametrize("drawing", ["chosen", "independent"])
def test_larger_vocabulary(drawing):
    verify = DRAWN.get(drawing, rule("sample"))
    assert deviation(World(5, 6), [-1, 0, 0, 1], drawing, verify, 3) < 1e-12
    assert deviation(World(6, 8), [-1, 0, 1], drawing, rule("block"), 3) < 1e-12


def test_block_accepts_more_than_tokens_one_by_one():
    def mean_length(world: World, verify: Callable) -> float:
        return sum(len(tokens) * p for tokens, p in emitted_law(world, CHAIN, "independent", verify).items())

    gains = [mean_length(World(s, 3), rule("block")) - mean_length(World(s, 3), DRAWN["independent"]) for s in range(4)]
    assert min(gains) > -1e-12 and max(gains) > 0.01


# ---- The check catches a biased rule ----


def without_residual(request: Request, choose: Callable):
    """A known mistake: every sibling is tested against the node's own law, as if none had been rejected before."""

    def accept(p: Law, children: list[int], node: int, level: int) -> int | None:
        q = request.draft[node]
        for index, child in enumerate(children):
            x = request.tokens[child]
            ratio = min(1.0, p[x] / q[x]) if q[x] > 0 else 0.0
            if choose([ratio, 1 - ratio], level, index, ACCEPT) == 0:
                return child
        p[:] = normalised(excess(p, q))
        return None

    return walk(request, choose, accept)


def test_siblings_without_residual_are_caught():
    p, q = [0.3, 0.3, 0.4], [0.6, 0.4, 0.0]
    row = [math.log(x) for x in p]
    request = Request([0, 0, 1], [-1, 0, 0], [row] * 3, 1, [q] * 3)

    def law_of(verify: Callable) -> list[float]:
        law = [0.0] * 3
        for (path, last), probability in outcomes(lambda choose: verify(request, choose)):
            law[request.tokens[path[0]] if path else last] += probability
        return law

    assert law_of(without_residual) == pytest.approx([0.5, 0.375, 0.125])
    assert law_of(sample_chosen) == pytest.approx(p)
    assert deviation(World(0, 3), SIBLINGS, "independent", without_residual, 2) > 0.01


# ---- Relaxed and typical ----


def no_draw(*_key: Any) -> int:
    pytest.fail("a random number where none is needed")


def first_token_law(request: Request, mode: str, **options: Any) -> list[float]:
    law = [0.0] * len(request.target[0])
    for (path, last), probability in outcomes(lambda choose: verify_request(request, choose, mode, **options)):
        law[request.tokens[path[0]] if path else last] += probability
    return law


@pytest.mark.parametrize("delta", [0.0, 0.1, 0.5, 1.0, 1.3, 3.0])
@pytest.mark.parametrize("seed", range(4))
def test_relaxed_stays_within_its_bound(seed, delta):
    vocab, random = 8, torch.Generator().manual_seed(seed)
    world = World(seed, vocab)
    near = [[v for v in torch.randperm(vocab, generator=random).tolist() if v != x][:4] for x in range(vocab)]
    tokens = [0, *torch.randint(vocab, (3,), generator=random).tolist()]
    request = Request(tokens, SIBLINGS, [world.row("target", i) for i in range(4)], 1)
    p, law = request.law(0), first_token_law(request, "relaxed", neighbors=near, delta=delta)
    distance = sum(abs(a - b) for a, b in zip(law, p, strict=True)) / 2
    children = set(tokens[1:])
    assert all(a == 0 for a, b in zip(law, p, strict=True) if b == 0), "an impossible token was emitted"
    assert all(law[v] <= p[v] + 1e-12 for v in range(vocab) if v not in children), "only drafts gain"
    if delta <= 1:
        assert distance <= delta + 1e-12
    else:
        assert all(law[v] <= delta * p[v] + 1e-12 for v in children)
    if delta == 0:
        assert law == pytest.approx(p, abs=1e-12)


def test_relaxed_moves_the_longest_prefix_of_neighbours():
    p = [0.4, 0.3, 0.15, 0.1, 0.05]
    assert take_neighbours(p, [4, 3, 2, 1], 0.2) == ([4, 3], pytest.approx(0.15))
    assert take_neighbours(p, [1, 4], 0.2) == ([], 0.0), "a prefix: the heavy first one ends it"
    assert take_neighbours(p, [4, 4, -1, 9, 3], 0.2) == ([4, 3], pytest.approx(0.15))
    request = Request([0, 2], [-1, 0], [[math.log(x) for x in p]] * 2, 1)
    law = first_token_law(request, "relaxed", neighbors=[[]] * 2 + [[4, 3, 1]], delta=0.2)
    assert law == pytest.approx([0.4, 0.3, 0.3, 0, 0])


def test_relaxed_greedy_accepts_what_its_neighbours_make_the_largest():
    row = [math.log(x) for x in (0.4, 0.35, 0.15, 0.1)]
    near = [[], [3, 2], [], []]

    def result(delta: float):
        request = Request([0, 1], [-1, 0], [row] * 2, 1, temperature=0.0)
        return verify_request(request, no_draw, "relaxed", neighbors=near, delta=delta)

    assert result(0.12) == ([1], 0), "0.35 + 0.1 > 0.4"
    assert result(0.05) == ([], 0)


def test_typical_takes_the_longest_then_the_likeliest_path():
    row = [math.log(x) for x in (0.5, 0.3, 0.15, 0.05)]
    #        root  two children; three leaves at depth 2, the last the likeliest
    request = Request([0, 1, 0, 1, 2, 1], [-1, 0, 0, 1, 1, 2], [row] * 6, 5)
    ends = {}
    for (path, last), probability in outcomes(lambda choose: typical(request, choose, 0.09, 0.3)):
        ends[tuple(path), last] = probability
    assert {path for path, _ in ends} == {(2, 5)}
    assert {last: p for (_, last), p in ends.items()} == pytest.approx({0: 0.5 / 0.95, 1: 0.3 / 0.95, 2: 0.15 / 0.95})
    entropy = -sum(p * math.log(p + 1e-5) for p in (0.5, 0.3, 0.15, 0.05))
    assert typical_threshold([0.5, 0.3, 0.15, 0.05], 0.9, 0.3) == pytest.approx(0.3 * math.exp(-entropy))


# ---- Distributions ----


def test_processed_keeps_ties_at_the_border():
    logits = [math.log(x) for x in (0.2, 0.2, 0.4, 0.1, 0.1)]
    assert processed(logits, 1.0, top_k=2) == pytest.approx([0.25, 0.25, 0.5, 0, 0])
    assert processed(logits, 1.0, top_p=0.5) == pytest.approx([0.25, 0.25, 0.5, 0, 0])
    assert processed(logits, 1.0, top_p=0.4) == pytest.approx([0, 0, 1, 0, 0])
    assert processed(logits, 1.0, top_p=1e-9) == pytest.approx([0, 0, 1, 0, 0])
    assert processed(logits, 1.0, min_p=0.5) == pytest.approx([0.25, 0.25, 0.5, 0, 0])
    assert processed([math.nan, -math.inf, 1.0, 1.0], 0.5) == pytest.approx([0, 0, 0.5, 0.5])
    assert processed([math.inf, 0.0, math.inf], 1.0) == [0.5, 0, 0.5]
    assert processed([math.nan, -math.inf], 1.0) == [0, 0]


def test_nothing_to_draw_from():
    assert draw([0.0, 0.0], [0.0, 0.0], no_draw, 0) == -1
