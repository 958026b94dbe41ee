"""Draft trees: every encoding back to parents, each against loops, and what is refused."""

from __future__ import annotations

import doctest

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtkernels.speculative import trees

QUICK = settings(max_examples=30, deadline=None)


@st.composite
def forests(draw, most=70):
    """int32 [B, n]: trees of one batch, some of them with unused nodes."""
    batch, nodes = draw(st.integers(1, 3)), draw(st.integers(1, most))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    narrow = draw(st.integers(1, nodes))  # 1: chains
    parents = torch.full((batch, nodes), -1, dtype=torch.int32)
    for row in parents:
        used = [0]
        for node in range(1, nodes):
            if torch.rand((), generator=random) < 0.9:
                row[node] = used[-1 - int(torch.randint(min(narrow, len(used)), (), generator=random))]
                used.append(node)
    return parents


def way(row: list[int], node: int) -> list[int]:
    """From the root, or an unused node, down to the node."""
    return [node] if row[node] < 0 else [*way(row, row[node]), node]


@QUICK
@given(forests())
def test_ancestors(parents):
    words = trees.ancestors_of_parents(parents)
    assert words.shape == (*parents.shape, -(-parents.shape[1] // 64)) and words.dtype == torch.int64
    for row, bits, depth in zip(parents.tolist(), words.tolist(), trees.depths(parents).tolist(), strict=True):
        for node in range(len(row)):
            value = sum((word & (2**64 - 1)) << (64 * index) for index, word in enumerate(bits[node]))
            assert value == sum(1 << above for above in way(row, node))
            assert depth[node] == len(way(row, node)) - 1
    assert torch.equal(trees.matrix_of_ancestors(words), trees.ancestor_matrix(parents))
    assert torch.equal(trees.parents_of_ancestors(words), parents)


@QUICK
@given(forests())
def test_siblings(parents):
    first, following = trees.siblings_of_parents(parents)
    for row, child, after in zip(parents.tolist(), first.tolist(), following.tolist(), strict=True):
        for node in range(len(row)):
            children, walked = [c for c in range(len(row)) if row[c] == node], []
            at = child[node]
            while at >= 0:
                walked.append(at)
                at = after[at]
            assert walked == children
    assert torch.equal(trees.parents_of_siblings(first, following), parents)


def test_siblings_in_any_order():
    first, following = torch.tensor([[3, -1, -1, -1]]), torch.tensor([[-1, -1, 1, 2]])
    assert trees.parents_of_siblings(first, following).tolist() == [[-1, 0, 0, 0]]


@QUICK
@given(forests())
def test_paths(parents):
    paths = trees.paths_of_parents(parents)
    for row, ways in zip(parents.tolist(), paths.tolist(), strict=True):
        leaves = [n for n in range(len(row)) if n not in row and (n == 0 or row[n] >= 0)]
        expected = [way(row, leaf) for leaf in leaves]
        assert [[node for node in path if node >= 0] for path in ways] == expected + [[]] * (len(ways) - len(leaves))
    assert torch.equal(trees.parents_of_paths(paths, parents.shape[1]), parents)


def test_chain():
    parents = trees.chain(2, 130)
    assert torch.equal(trees.ancestor_matrix(parents), torch.ones(130, 130).tril().bool().expand(2, -1, -1))
    assert trees.depths(parents).tolist() == [list(range(130))] * 2
    assert trees.paths_of_parents(parents).shape == (2, 1, 130)


@QUICK
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 5), st.integers(1, 40))
def test_build_tree_keeps_the_likeliest(seed, top_k, depth, nodes):
    random = torch.Generator().manual_seed(seed)
    tokens, scores, parents = candidates(random, 2, top_k, depth)
    root = torch.tensor([1000, 1001])
    drafted, tree, chosen = trees.build_tree(root, tokens, scores, parents, nodes)
    count = min(nodes - 1, tokens.shape[1])
    assert drafted.shape == tree.shape == (2, count + 1)
    trees.check_parents(tree)
    for row in range(2):
        order = sorted(range(tokens.shape[1]), key=lambda c: (-scores[row, c].item(), c))
        best = sorted(order[:count])
        assert chosen[row].tolist() == best
        assert drafted[row].tolist() == [root[row].item(), *tokens[row, best].tolist()]
        above = [-1 if parents[row, c] < 0 else best.index(int(parents[row, c])) for c in best]
        assert tree[row].tolist() == [-1, *(a + 1 for a in above)]


def candidates(random, batch, top_k, depth):
    """What a draft of a vocabulary of ten tokens, few of them distinct in likelihood, grows level by level."""
    tokens, scores, parents = [], [], []
    level, nodes = torch.zeros(batch, 1), torch.full((batch, 1), -1)
    for _ in range(depth):
        logits = torch.randint(0, 3, (batch, level.shape[1], 10), generator=random).float()
        token, score = trees.expand(level, logits, top_k)
        begin = sum(part.shape[1] for part in tokens)
        tokens.append(token.flatten(1))
        scores.append(score.flatten(1))
        parents.append(nodes.repeat_interleave(top_k, dim=1))
        best = scores[-1].sort(dim=1, descending=True, stable=True).indices[:, :top_k]
        level, nodes = scores[-1].gather(1, best), best + begin
    return torch.cat(tokens, 1), torch.cat(scores, 1), torch.cat(parents, 1)


def test_expand():
    logits = torch.tensor([[[0.0, 1.0, 3.0], [5.0, 5.5, 0.0]]])
    tokens, scores = trees.expand(torch.tensor([[0.0, -1.0]]), logits, 2)
    assert tokens.tolist() == [[[2, 1], [1, 0]]]
    expected = logits.log_softmax(-1)
    assert torch.allclose(scores, torch.stack([expected[0, 0, [2, 1]], expected[0, 1, [1, 0]] - 1]).unsqueeze(0))


def ints(*rows):
    return torch.tensor([list(rows)])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: trees.check_parents(torch.zeros(2, 0, dtype=torch.int32)), "parents: expected integers"),
        (lambda: trees.check_parents(torch.zeros(2, 3)), "parents: expected integers"),
        (lambda: trees.check_parents(ints(0, 0)), "parents: expected -1 for node 0"),
        (lambda: trees.check_parents(ints(-1, -2)), "parents: expected node numbers"),
        (lambda: trees.check_parents(ints(-1, 1)), "parents: expected every parent before"),  # a cycle of one
        (lambda: trees.check_parents(ints(-1, 2, 1)), "parents: expected every parent before"),  # a cycle of two
        (lambda: trees.check_parents(ints(-1, 2, 0)), "parents: expected every parent before"),  # a forward reference
        (lambda: trees.check_parents(ints(-1, -1, 1)), "parents: expected no child of an unused"),
        (lambda: trees.ancestors_of_parents(ints(-1, 7)), "parents: expected every parent before"),
        (lambda: trees.parents_of_ancestors(torch.zeros(1, 2, 2).long()), "ancestors: expected int64"),
        (lambda: trees.parents_of_ancestors(ints([1], [3], [6])), "ancestors: expected each node's bit"),
        (lambda: trees.parents_of_ancestors(ints([1], [1])), "ancestors: expected each node's bit"),
        (lambda: trees.parents_of_siblings(ints(1, 2), ints(1)), "next_sibling: expected .B, n. as first_child"),
        (lambda: trees.parents_of_siblings(ints(2, -1), ints(-1, -1)), "first_child: expected node numbers"),
        (lambda: trees.parents_of_siblings(ints(1, 1), ints(-1, -1)), "next_sibling: expected every node in one"),
        (lambda: trees.parents_of_siblings(ints(-1, -1, -1), ints(-1, 2, 1)), "next_sibling: expected siblings of"),
        (lambda: trees.parents_of_siblings(ints(-1, 2, 1), ints(-1, -1, -1)), "parents: expected every parent"),
        (lambda: trees.parents_of_paths(ints([0, 3]), 3), "paths: expected node numbers below"),
        (lambda: trees.parents_of_paths(ints([1, 2]), 3), "paths: expected every path to begin"),
        (lambda: trees.parents_of_paths(ints([0, 2, 1]), 3), "paths: expected ascending"),
        (lambda: trees.parents_of_paths(ints([0, -1, 1]), 3), "paths: expected ascending"),
        (lambda: trees.parents_of_paths(ints([0, 1, 2], [0, 2, -1]), 3), "paths: expected one parent"),
        (lambda: trees.build_tree(ints(1)[0], ints(2), torch.zeros(1, 1), ints(-1), 0), "nodes: expected at least 1"),
        (lambda: trees.build_tree(ints(1)[0], ints(2, 3), torch.tensor([[-1.0, 0.0]]), ints(-1, 0), 3), "scores"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_docstring_examples():
    result = doctest.testmod(trees)
    assert result.attempted > 0 and result.failed == 0
