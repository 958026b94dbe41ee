"""The zoo's methods in plain loops over float64, one image at a time, each written from its paper's formula.

``attention`` is one encoder layer's probabilities [heads, queries, keys] of one image, [CLS] first where there is one.
Every function returns the kept patch numbers, ascending.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def top(scores: list[float], keep: int, among: set[int] | None = None) -> list[int]:
    """The ``keep`` largest; ties: the lower index."""
    candidates = sorted(range(len(scores)) if among is None else among)
    return sorted(candidates, key=lambda j: (-scores[j], j))[:keep]


def cls_scores(attention: Tensor) -> list[float]:
    heads, _, keys = attention.shape
    return [sum(float(attention[h, 0, j]) for h in range(heads)) / heads for j in range(1, keys)]


def received(attention: Tensor, has_cls: bool, reduce=lambda values: sum(values) / len(values)) -> list[float]:
    """What each patch receives from all query rows on average; ``reduce`` joins the heads."""
    heads, queries, keys = attention.shape
    return [
        reduce([sum(float(attention[h, i, j]) for i in range(queries)) / queries for h in range(heads)])
        for j in range(1 if has_cls else 0, keys)
    ]


def fastervlm(attention: Tensor, keep: int) -> list[int]:
    return sorted(top(cls_scores(attention), keep))


def vtc_cls(attentions: list[Tensor], start: int, keep: int) -> list[int]:
    layers = [cls_scores(attention) for attention in attentions[start:-1]]
    return sorted(top([sum(column) for column in zip(*layers, strict=True)], keep))


def fopru(scores: list[float], width: int, keep: int, strategy: str) -> list[int]:
    if strategy == "rank":
        return sorted(top(scores, keep))
    height = len(scores) // width
    rows = [sum(scores[r * width : (r + 1) * width]) / width for r in range(height)]
    best = top(rows, round(keep / len(scores) * height))
    return sorted(r * width + c for r in best for c in range(width))


def hiprune(middle: list[float], deep: list[float], width: int, keep: int, alpha: float, wrap: bool) -> list[int]:
    n = len(deep)
    chosen = set()
    for anchor in top(middle, round(keep * alpha / 5)):
        chosen.add(anchor)
        r, c = divmod(anchor, width)
        if wrap:
            chosen |= {min(max(j, 0), n - 1) for j in (anchor - 1, anchor + 1, anchor - width, anchor + width)}
        else:
            around = [(r, c - 1), (r, c + 1), (r - 1, c), (r + 1, c)]
            chosen |= {y * width + x for y, x in around if 0 <= y < n // width and 0 <= x < width}
    registers = top(deep, keep - len(chosen), among=set(range(n)) - chosen)
    return sorted(chosen | set(registers))


def cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.detach(), b.detach()
    return float(a @ b) / (math.sqrt(float(a @ a)) * math.sqrt(float(b @ b)))


def todre(tokens: Tensor, pivot: int, keep: int, mode: str) -> list[int]:
    selected = [pivot]
    while len(selected) < keep:
        rest = [c for c in range(len(tokens)) if c not in selected]
        similar = {c: [cosine(tokens[c], tokens[s]) for s in selected] for c in rest}
        if mode == "max_sum":
            selected.append(min(rest, key=lambda c: (sum(similar[c]), c)))
        else:
            selected.append(max(rest, key=lambda c: (min(1 - s for s in similar[c]), -c)))
    return sorted(selected)


def _softmax(values: list[float]) -> list[float]:
    peak = max(values)
    exp = [math.exp(value - peak) for value in values]
    return [e / sum(exp) for e in exp]


def mmtok(words: Tensor, tokens: Tensor, features: Tensor, keep: int, alpha=0.5, tau_tv=0.02, tau_vv=0.2) -> list[int]:
    n = len(tokens)
    cover = [[p / len(words) for p in _softmax([cosine(z, x) / tau_tv for x in tokens])] for z in words]
    cover += [[alpha * q / n for q in _softmax([cosine(c, d) / tau_vv for d in features])] for c in features]
    best = [0.0] * len(cover)
    selected: list[int] = []
    for _ in range(keep):
        gains = [sum(max(line[j] - b, 0.0) for line, b in zip(cover, best, strict=True)) for j in range(n)]
        selected.append(top(gains, 1, among=set(range(n)) - set(selected))[0])
        best = [max(b, line[selected[-1]]) for line, b in zip(cover, best, strict=True)]
    return sorted(selected)


def encoder_attention(model: torch.nn.Module, pixel_values: Tensor) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """All layers' attention probabilities [images, H, S, S] and all hidden states, of an eager float64 LLaVA."""
    tower = model.model.vision_tower
    output = tower(pixel_values.double(), output_attentions=True, output_hidden_states=True, return_dict=True)
    return [attention.double() for attention in output.attentions], output.hidden_states
