"""Draft trees in the encodings that drafting, attention and verification use, and EAGLE-2's choice of a tree.

The canonical one is ``parents``: int32 ``[B, n]``, node 0 the root (the last verified token) with parent -1, every
parent before its children. Trees of one batch may have different sizes: another node of parent -1 is unused.

All of it is torch: a tree has at most some hundred nodes, and an op of our own would save microseconds of a model's
pass. Nothing waits for a GPU but :func:`paths_of_parents`, whose result has a shape that depends on the tree. Arguments
are checked on the CPU, as those of the ops are: on a GPU a check would wait too.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 64  # nodes of a word of ancestors


def check_parents(parents: Tensor) -> None:
    """Raises ``ValueError`` unless ``parents`` is a batch of trees, which excludes cycles and forward references.

    Args:
        parents: integers ``[B, n]``, ``n >= 1``.
    """
    if parents.dim() != 2 or parents.shape[1] == 0 or parents.is_floating_point():
        raise ValueError(f"parents: expected integers [B, n >= 1], got {parents.dtype} {list(parents.shape)}")
    node = torch.arange(parents.shape[1], device=parents.device)
    _check((parents[:, 0] == -1).all(), "parents: expected -1 for node 0, the root")
    _check((parents >= -1).all(), "parents: expected node numbers, or -1 for an unused node")
    _check((parents < node.clamp(min=1)).all(), "parents: expected every parent before its children")
    _check(_used(parents).gather(1, parents.clamp(min=0).long()).all(), "parents: expected no child of an unused node")


def chain(batch: int, nodes: int, device: torch.device | str = "cpu") -> Tensor:
    """The parents of ``batch`` chains of ``nodes``.

    >>> chain(1, 4).tolist()
    [[-1, 0, 1, 2]]
    """
    return torch.arange(-1, nodes - 1, dtype=torch.int32, device=device).repeat(batch, 1)


def ancestor_matrix(parents: Tensor) -> Tensor:
    """bool ``[B, n, n]``: whether node ``j`` is on the way from node ``i`` to the root, ``i`` itself included."""
    check_parents(parents)
    batch, nodes = parents.shape
    matrix = torch.eye(nodes, dtype=torch.bool, device=parents.device).repeat(batch, 1, 1)
    step = parents.long()
    for _ in range((nodes - 1).bit_length()):  # ways of one, two, four, ... edges
        onward, at = step >= 0, step.clamp(min=0)
        matrix |= matrix.gather(1, at.unsqueeze(-1).expand_as(matrix)) & onward.unsqueeze(-1)
        step = step.gather(1, at).where(onward, -1)
    return matrix


def ancestors_of_parents(parents: Tensor) -> Tensor:
    """The ancestor bits of each node: int64 ``[B, n, ceil(n / 64)]``, bit ``j % 64`` of word ``j / 64`` for node ``j``.

    >>> ancestors_of_parents(torch.tensor([[-1, 0, 0, 1]])).tolist()
    [[[1], [3], [5], [11]]]
    """
    matrix = ancestor_matrix(parents)
    nodes = matrix.shape[-1]
    padded = torch.nn.functional.pad(matrix, (0, -nodes % _WORD)).unflatten(-1, (-1, _WORD))
    return (padded.long() << torch.arange(_WORD, device=parents.device)).sum(-1)


def matrix_of_ancestors(ancestors: Tensor) -> Tensor:
    """bool ``[B, n, n]`` of ancestor bits ``[B, n, ceil(n / 64)]``."""
    nodes = ancestors.shape[1]
    bits = ancestors.unsqueeze(-1) >> torch.arange(_WORD, device=ancestors.device) & 1
    return bits.flatten(-2)[..., :nodes].bool()


def parents_of_ancestors(ancestors: Tensor) -> Tensor:
    """The parents of trees given by ancestor bits: of a node's ancestors the last is its parent."""
    words = -(-ancestors.shape[1] // _WORD)
    if ancestors.dim() != 3 or ancestors.shape[2] != words or ancestors.dtype != torch.int64:
        raise ValueError(
            f"ancestors: expected int64 [B, n, ceil(n / 64)] with words for n = {ancestors.shape[1]}, got "
            f"{ancestors.dtype} {list(ancestors.shape)}"
        )
    matrix = matrix_of_ancestors(ancestors)
    node = torch.arange(matrix.shape[1], device=ancestors.device)
    parents = node.where(matrix & (node != node.unsqueeze(1)), -1).amax(-1).int()
    _check((ancestor_matrix(parents) == matrix).all(), "ancestors: expected each node's bit, and its parent's bits")
    return parents


def depths(parents: Tensor) -> Tensor:
    """int64 ``[B, n]``: the edges from each node to the root; 0 for an unused node. A token's position in its sequence
    is the root's plus its depth.
    """
    return ancestor_matrix(parents).sum(-1) - 1


def siblings_of_parents(parents: Tensor) -> tuple[Tensor, Tensor]:
    """First child and next sibling of each node, int32 ``[B, n]``, -1 for none; siblings in ascending order.

    >>> first, following = siblings_of_parents(torch.tensor([[-1, 0, 0, 1]]))
    >>> first.tolist(), following.tolist()
    ([[1, 3, -1, -1]], [[-1, 2, -1, -1]])
    """
    check_parents(parents)
    nodes = parents.shape[1]
    parent, order = parents.long().sort(stable=True)
    follows = (parent[:, 1:] == parent[:, :-1]) & (parent[:, 1:] >= 0)
    following = torch.full_like(order, -1).scatter(1, order[:, :-1], order[:, 1:].where(follows, -1))
    first = torch.full_like(order, nodes)
    first = first.scatter_reduce(1, parent.clamp(min=0), order.where(parent >= 0, nodes), "amin")
    return first.where(first < nodes, -1).int(), following.int()


def parents_of_siblings(first_child: Tensor, next_sibling: Tensor) -> Tensor:
    """The parents of trees given by first children and next siblings, in any order of siblings."""
    if first_child.shape != next_sibling.shape or first_child.dim() != 2:
        raise ValueError(
            f"next_sibling: expected [B, n] as first_child, got {list(first_child.shape)} and "
            f"{list(next_sibling.shape)}"
        )
    nodes = first_child.shape[1]
    for name, link in (("first_child", first_child), ("next_sibling", next_sibling)):
        _check(((link >= -1) & (link < nodes)).all(), f"{name}: expected node numbers, or -1 for none")
    before, before_count = _inverse(next_sibling)
    above, above_count = _inverse(first_child)
    _check((before_count + above_count <= 1).all(), "next_sibling: expected every node in one place")
    for _ in range(nodes.bit_length()):  # each node finds the first of its siblings
        before = before.gather(1, before)
    parents = above.gather(1, before)
    known = above_count.gather(1, before).bool()
    _check((known | (before_count == 0)).all(), "next_sibling: expected siblings of a first child")
    parents = parents.where(known, -1).int()
    check_parents(parents)
    return parents


def paths_of_parents(parents: Tensor) -> Tensor:
    """The way from the root to each leaf: int64 ``[B, paths, depth + 1]``, -1 behind its end, by ascending leaf.

    Rows with fewer leaves than others end with paths of -1 alone.

    >>> paths_of_parents(torch.tensor([[-1, 0, 0, 1]])).tolist()
    [[[0, 2, -1], [0, 1, 3]]]
    """
    matrix = ancestor_matrix(parents)
    nodes = matrix.shape[-1]
    node = torch.arange(nodes, device=parents.device)
    leaf = _used(parents) & (matrix.sum(1) == 1)  # nobody's ancestor but its own
    ways = node.where(matrix, nodes).sort(-1).values
    ways = ways.where((ways < nodes) & leaf.unsqueeze(-1), -1)
    order = node.where(leaf, nodes).argsort(dim=1, stable=True)
    ways = ways.gather(1, order.unsqueeze(-1).expand_as(ways))
    return ways[:, : int(leaf.sum(1).amax()), : int((ways >= 0).sum(-1).amax())]


def parents_of_paths(paths: Tensor, nodes: int) -> Tensor:
    """The parents of trees of ``nodes`` given by the ways to their leaves; nodes on no path are unused."""
    if paths.dim() != 3 or paths.is_floating_point():
        raise ValueError(f"paths: expected integers [B, paths, depth + 1], got {paths.dtype} {list(paths.shape)}")
    _check((paths < nodes).all(), f"paths: expected node numbers below nodes = {nodes}")
    _check((paths[:, :, 0] <= 0).all(), "paths: expected every path to begin at node 0")
    upper, lower = paths[:, :, :-1].flatten(1), paths[:, :, 1:].flatten(1)
    on = lower >= 0
    _check((~on | (upper >= 0) & (upper < lower)).all(), "paths: expected ascending nodes, -1 behind them")
    parents = paths.new_full((len(paths), nodes + 1), -1)  # the last column takes what is behind the paths
    parents.scatter_(1, lower.where(on, nodes), upper.where(on, -1))
    told = parents.gather(1, lower.where(on, nodes))
    _check((~on | (told == upper)).all(), "paths: expected one parent for each node")
    return parents[:, :nodes].int()


def expand(scores: Tensor, logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The ``top_k`` likeliest children of each node of a level, with the log-probability of the way to them.

    ``child = scores + log_softmax(logits)``.

    Args:
        scores: float32 ``[B, k]``, the same of the nodes; 0 for the root.
        logits: ``[B, k, V]`` behind each node.

    Returns:
        ``tokens`` int64 and ``scores`` float32, ``[B, k, top_k]``, best first.
    """
    best = logits.float().log_softmax(-1).topk(top_k, dim=-1)
    return best.indices, scores.unsqueeze(-1) + best.values


def build_tree(root: Tensor, tokens: Tensor, scores: Tensor, parents: Tensor, nodes: int) -> tuple[Tensor, ...]:
    """The best tree of candidates: of all of them the ``nodes - 1`` likeliest, at their places.

    A candidate's score is the log-probability of its way from the root, which never grows along it: with a node its
    ancestors are chosen. Ties: the earlier candidate wins.

    Args:
        root: int64 ``[B]``, the last verified token.
        tokens: int64 ``[B, C]``, candidates, parents before children.
        scores: float32 ``[B, C]``.
        parents: integers ``[B, C]``, the candidate before each; -1 for children of the root.
        nodes: of the tree with its root; fewer if there are fewer candidates.

    Returns:
        ``tokens`` int64 ``[B, n]`` with the root first, ``parents`` int32 ``[B, n]`` and ``chosen`` int64
        ``[B, n - 1]``, the candidates that became nodes ``1 ... n - 1``.

    Raises:
        ValueError: ``nodes`` below 1; on the CPU scores that grow along a way.

    Example:
        >>> tokens, parents = torch.tensor([[5, 6, 7]]), torch.tensor([[-1, -1, 0]])
        >>> scores = torch.tensor([[-0.1, -2.0, -0.5]])
        >>> build_tree(torch.tensor([9]), tokens, scores, parents, nodes=3)[1].tolist()
        [[-1, 0, 1]]

    The dynamic tree of EAGLE-2 (arXiv 2406.16858).
    """
    if nodes < 1:
        raise ValueError(f"nodes: expected at least 1, got {nodes}")
    batch, candidates = tokens.shape
    above = scores.gather(1, parents.clamp(min=0).long())
    _check(((parents < 0) | (scores <= above)).all(), "scores: expected log-probabilities that fall along every way")
    ranked = scores.sort(dim=1, descending=True, stable=True).indices
    chosen = ranked[:, : nodes - 1].sort(dim=1).values
    node = torch.arange(1, chosen.shape[1] + 1, device=tokens.device).expand_as(chosen)
    node_of = chosen.new_zeros(batch, candidates + 1).scatter(1, chosen, node)  # the last column: the root
    tree = node_of.gather(1, (parents % (candidates + 1)).long().gather(1, chosen))
    tree = torch.nn.functional.pad(tree, (1, 0), value=-1).int()
    return torch.cat([root.unsqueeze(1), tokens.gather(1, chosen)], dim=1), tree, chosen


def _used(parents: Tensor) -> Tensor:
    """bool [B, n]: the root, and what has a parent."""
    return (parents >= 0) | (torch.arange(parents.shape[1], device=parents.device) == 0)


def _inverse(link: Tensor) -> tuple[Tensor, Tensor]:
    """Who links to each node, itself if nobody does, and how many do: int64 [B, n]."""
    batch, nodes = link.shape
    node = torch.arange(nodes, device=link.device).expand(batch, -1)
    target = link.long().where(link >= 0, nodes)
    who = torch.cat([node, node[:, :1]], dim=1).scatter(1, target, node)
    count = node.new_zeros(batch, nodes + 1).scatter_add(1, target, torch.ones_like(target))
    return who[:, :nodes], count[:, :nodes]


def _check(condition: Tensor | bool, message: str) -> None:
    if isinstance(condition, Tensor) and condition.device.type != "cpu":
        return
    if not condition:
        raise ValueError(message)
