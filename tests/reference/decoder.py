"""A language model of Llama's form in plain float64, one prompt at a time and without a cache, of which tokens leave
between the layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tests.reference.merging_after import fold_dropped, nearest
from tests.reference.recipes import top

# (hidden states [N, C] of the visual tokens, attention [N] that they got) -> their states, and which ones stay.
Rule = Callable[[Tensor, list[float]], tuple[Tensor, list[int]]]


def rotated(x: Tensor, positions: list[int], theta: float) -> Tensor:
    """[H, n, D]: the pairs (i, i + D / 2) turned by ``position * theta^(-2 i / D)``."""
    half = x.shape[-1] // 2
    angle = torch.tensor([[p * theta ** (-i / half) for i in range(half)] for p in positions], dtype=x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)


def attend(attention, h: Tensor, positions: list[int], theta: float) -> tuple[Tensor, Tensor]:
    """[n, C], and the probabilities [H, n, n]."""
    query, key, value = (
        getattr(attention, name)(h).unflatten(-1, (-1, attention.head_dim)).transpose(0, 1)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    group = len(query) // len(key)
    query, key = rotated(query, positions, theta), rotated(key, positions, theta).repeat_interleave(group, 0)
    logits = query @ key.transpose(1, 2) / math.sqrt(attention.head_dim)
    future = torch.ones(len(h), len(h), dtype=torch.bool).triu(1)
    weights = logits.masked_fill(future, -math.inf).softmax(-1)
    mixed = weights @ value.repeat_interleave(group, 0)
    return attention.o_proj(mixed.transpose(0, 1).flatten(1)), weights


def run(
    model, embeds: Tensor, visual: list[int], last: int, rules: dict[int, Rule]
) -> tuple[dict[int, Tensor], dict[int, list[int]]]:
    """The logits at each place that is left, and the visual tokens (counted among themselves) left at each rule.

    ``model``: a float64 causal model's ``model`` and ``lm_head``. ``last``: the place of the prompt's last token.
    """
    theta = model.model.config.rope_parameters["rope_theta"]
    places, x, weights, left = list(range(len(embeds))), embeds, torch.empty(0), {}
    for index, layer in enumerate(model.model.layers):
        if index in rules and visual:
            at = [i for i, place in enumerate(places) if place in visual]
            row = places.index(last)
            scores = [sum(float(head[row, i].detach()) for head in weights) / len(weights) for i in at]
            states, kept = rules[index](x[at], scores)
            gone = {i for number, i in enumerate(at) if number not in kept}
            x = x.clone()
            for state, number in zip(states, kept, strict=True):
                x[at[number]] = state
            x = x[[i for i in range(len(places)) if i not in gone]]
            places = [place for i, place in enumerate(places) if i not in gone]
            left[index] = [visual.index(place) for place in places if place in visual]
        out, weights = attend(layer.self_attn, layer.input_layernorm(x), places, theta)
        x = x + out
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    logits = model.lm_head(model.model.norm(x))
    return dict(zip(places, logits, strict=True)), left


def holitom_inner(inner: float, fold: str) -> Rule:
    def rule(states: Tensor, scores: list[float]) -> tuple[Tensor, list[int]]:
        kept = sorted(top(scores, max(1, round(len(scores) * (1 - inner)))))
        if fold == "sequential":
            return fold_dropped(states, kept), kept
        groups = [[j] for j in kept]
        for j in range(len(states)):
            if j not in kept:
                groups[nearest(states, j, kept)].append(j)
        return torch.stack([states[group].mean(0) for group in groups]), kept

    return rule
