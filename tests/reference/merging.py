"""Merging inside a vision transformer, in plain loops over float64, one image at a time, from the papers' formulas.

A token is its vector, how many patches it stands for as far as the method tells, and which input tokens it holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Token:
    x: Tensor
    size: float
    members: frozenset[int]


def cosines(metric: Tensor) -> list[list[float]]:
    unit = (metric / metric.norm(dim=-1, keepdim=True)).detach()
    return (unit @ unit.T).tolist()


def together(tokens: list[Token], weighted: bool) -> Token:
    """The mean of several, weighted by size or plain; without weights sizes stay 1."""
    total = sum(token.size for token in tokens)
    x = sum(token.x * token.size for token in tokens) / total
    return Token(x, total if weighted else 1.0, frozenset().union(*(token.members for token in tokens)))


def nearest(similar: list[float], destinations: list[int]) -> tuple[float, int]:
    return max(((similar[d], d) for d in destinations), key=lambda edge: (edge[0], -edge[1]))


def tome(tokens: list[Token], metric: Tensor, r: int, prefix: int, weighted: bool = True) -> list[Token]:
    """Even positions into odd ones, the r best edges; unmerged even tokens, then the odd ones, the prefix first."""
    free, similar = range(prefix, len(tokens)), cosines(metric)
    odd = [i for i in free if i % 2 == 1]
    edges = {i: nearest(similar[i], odd) for i in free if i % 2 == 0}
    best = sorted(edges, key=lambda i: (-edges[i][0], i))
    groups = {d: [d, *(i for i in best[:r] if edges[i][1] == d)] for d in odd}
    unmerged = sorted(best[r:]) if prefix else best[r:]
    merged = [together([tokens[i] for i in sorted(groups[d])], weighted) for d in odd]
    return tokens[:prefix] + [tokens[i] for i in unmerged] + merged


def energies(metric: Tensor, margin: float, alpha: float = 1.0) -> list[float]:
    result = []
    for similar in cosines(metric):
        gaps = [s - margin for s in similar]
        result.append(sum(g if g > 0 else alpha * (math.exp(g) - 1) for g in gaps) / len(gaps))
    return result


def pitome(
    tokens: list[Token], metric: Tensor, r: int, prefix: int, margin: float, bsm: bool = False, alpha: float = 1.0
) -> list[Token]:
    """By energy: all sources among the first 2r, or (``bsm``) the r best edges of a split of all tokens."""
    energy = energies(metric[prefix:], margin, alpha)
    ranked = [prefix + i for i in sorted(range(len(energy)), key=lambda i: (-energy[i], i))]
    split = ranked if bsm else ranked[: 2 * r]
    sources, destinations = split[::2], split[1::2]
    similar = cosines(metric)
    edges = {i: nearest(similar[i], destinations) for i in sources}
    best = sorted(sources, key=lambda i: (-edges[i][0], i))
    left = best[r:] if bsm else ranked[2 * r :]
    groups = {d: [d, *(i for i in best[:r] if edges[i][1] == d)] for d in destinations}
    merged = [together([tokens[i] for i in sorted(groups[d])], True) for d in destinations]
    return tokens[:prefix] + [tokens[i] for i in left] + merged


@dataclass
class Layer:
    """The modules of one pre-norm layer, whatever they are called."""

    norm1: nn.Module
    query: Callable[[Tensor], Tensor]
    key: Callable[[Tensor], Tensor]
    value: Callable[[Tensor], Tensor]
    out: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    heads: int

    def attend(self, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """x [n, C] after the attention's residual, and the keys [H, n, D]."""
        h = self.norm1(x)
        query, key, value = (
            project(h).unflatten(-1, (self.heads, -1)).transpose(0, 1) for project in (self.query, self.key, self.value)
        )
        logits = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5 + size.log()
        mixed = (logits.softmax(-1) @ value).transpose(0, 1).flatten(1)
        return x + self.out(mixed), key


def transformers_layers(tower: nn.Module) -> list[Layer]:
    return [
        Layer(
            norm1=layer.layer_norm1,
            query=layer.self_attn.q_proj,
            key=layer.self_attn.k_proj,
            value=layer.self_attn.v_proj,
            out=layer.self_attn.out_proj,
            norm2=layer.layer_norm2,
            mlp=layer.mlp,
            heads=layer.self_attn.num_heads,
        )
        for layer in tower.encoder.layers
    ]


def timm_layers(model: nn.Module) -> list[Layer]:
    def part(block: nn.Module, index: int) -> Callable[[Tensor], Tensor]:
        return lambda h: block.attn.qkv(h).chunk(3, dim=-1)[index]

    return [
        Layer(
            norm1=block.norm1,
            query=part(block, 0),
            key=part(block, 1),
            value=part(block, 2),
            out=nn.Sequential(block.attn.proj, block.ls1),
            norm2=block.norm2,
            mlp=nn.Sequential(block.mlp, block.ls2),
            heads=block.attn.num_heads,
        )
        for block in model.blocks
    ]


def run(
    layers: list[Layer],
    x: Tensor,
    schedule: list[int],
    merge: Callable[[int, list[Token], Tensor, int], list[Token]],
    *,
    weighs_keys: bool,
    after_mlp: bool = False,
) -> list[Token]:
    """The tokens of one image, x [n, C], after the layers of ``schedule``; ``merge(layer, tokens, metric, r)``."""
    tokens = [Token(row, 1.0, frozenset([i])) for i, row in enumerate(x)]

    def step(index: int, x: Tensor, metric: Tensor) -> Tensor:
        nonlocal tokens
        tokens = [Token(row, token.size, token.members) for row, token in zip(x, tokens, strict=True)]
        if schedule[index] > 0:
            tokens = merge(index, tokens, metric, schedule[index])
        return torch.stack([token.x for token in tokens])

    for index in range(len(schedule)):
        layer = layers[index]
        size = torch.tensor([token.size if weighs_keys else 1.0 for token in tokens], dtype=torch.float64)
        x, key = layer.attend(x, size)
        if after_mlp:
            x = x + layer.mlp(layer.norm2(x))
            x = step(index, x, x)
        else:
            x = step(index, x, key.mean(0))
            x = x + layer.mlp(layer.norm2(x))
    return [Token(row, token.size, token.members) for row, token in zip(x, tokens, strict=True)]


def by_first_patch(tokens: list[Token]) -> list[Token]:
    return sorted(tokens, key=lambda token: min(token.members))


def owner_map(tokens: list[Token], count: int) -> list[int]:
    """The output row of each of ``count`` input tokens."""
    row = {member: index for index, token in enumerate(tokens) for member in token.members}
    return [row[i] for i in range(count)]
