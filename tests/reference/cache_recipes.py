"""The cache's methods as their papers mean them: plain float64 of one layer, [H, N, D] of one prompt with its padding.

Scales are not rounded to float16 here, so that a code next to a tie may differ.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.reference.merging_after import merge_evicted

PAGE = 128  # what our cache packs at once


def asymmetric(x: Tensor, bits: int) -> Tensor:
    """Groups in the last dimension: scale (max - min) / (2^bits - 1), zero min."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    return torch.where(scale > 0, ((x - low) / scale.where(scale > 0, 1.0)).round() * scale, 0.0) + low


def ternary(x: Tensor) -> Tensor:
    """Sign where |x| is above half the mean of |x|, times the mean of those."""
    large = x.abs() > 0.5 * x.abs().mean(-1, keepdim=True)
    scale = (x.abs() * large).sum(-1, keepdim=True) / large.sum(-1, keepdim=True)
    return scale * x.sign() * large


def sign(x: Tensor) -> Tensor:
    return torch.where(x >= 0, 1.0, -1.0) * x.abs().mean(-1, keepdim=True)


def along_tokens(x: Tensor, group: int, function) -> Tensor:
    """``function`` of the groups of [N, D] that run along the tokens of a channel."""
    groups = x.T.unflatten(1, (-1, group))
    return function(groups).flatten(1).T


def along_channels(x: Tensor, group: int, function) -> Tensor:
    return function(x.unflatten(1, (-1, group))).flatten(1)


def hadamard(n: int) -> Tensor:
    """Orthonormal, of a power of two: entry (i, j) is -1 to the number of bits that i and j share."""
    entries = [[(-1.0) ** (i & j).bit_count() for j in range(n)] for i in range(n)]
    return torch.tensor(entries, dtype=torch.float64) / math.sqrt(n)


def kivi(keys: Tensor, values: Tensor, bits: int, group: int, residual: int) -> tuple[Tensor, Tensor]:
    packed = max(keys.shape[1] - residual, 0) // PAGE * PAGE
    keys, values = keys.clone(), values.clone()
    for head in range(len(keys)):
        keys[head, :packed] = along_tokens(keys[head, :packed], group, lambda x: asymmetric(x, bits))
        values[head, :packed] = along_channels(values[head, :packed], group, lambda x: asymmetric(x, bits))
    return keys, values


def mix(keys: Tensor, group: int, spread: Tensor) -> Tensor:
    """VidKV's 1.5 bits of [N, D]: two for the half of the channels with the largest spread, one for the others."""
    ranked = spread.argsort(descending=True, stable=True)
    half = len(ranked) // 2
    hard, easy = ranked[:half].sort().values, ranked[half:].sort().values
    turn = hadamard(len(easy))
    out = torch.empty_like(keys)
    out[:, hard] = along_tokens(keys[:, hard], group, lambda x: asymmetric(x, 2))
    out[:, easy] = along_tokens(keys[:, easy] @ turn.T, group, sign) @ turn
    return out


def pages(marks: Tensor) -> tuple[list[list[int]], list[list[int]]]:
    """The tokens in pages and in protected pages, item by item, of marks [B, N]: what every item of the batch fills."""
    classes = []
    for wanted in (False, True):
        of_class = [[i for i, mark in enumerate(row) if mark == wanted] for row in marks.tolist()]
        count = min(map(len, of_class)) // PAGE * PAGE
        classes.append([row[:count] for row in of_class])
    return classes[0], classes[1]


def vidkv(keys: Tensor, values: Tensor, group: int, ordinary: list[int], protected: list[int]) -> tuple[Tensor, Tensor]:
    """Of one prompt; keys are alike in both classes."""
    out = keys.clone(), values.clone()
    for head, key in enumerate(keys):
        spread = key.amax(0) - key.amin(0)
        for places, function in ((ordinary, ternary), (protected, lambda x: asymmetric(x, 2))):
            if places:
                out[0][head, places] = mix(key[places], group, spread)
                out[1][head, places] = along_tokens(values[head, places], group, function)
    return out


def about_the_question(tokens: Tensor, words: Tensor, share: float) -> list[int]:
    """Which of the visual tokens [n, C] VidKV protects, given the question's embeddings [m, C]."""
    scores = [sum(float(token @ word) for word in words) / len(words) for token in tokens]
    count = max(32, 32 * round(share * len(tokens) / 32))
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])


def zipvl_important(attention: Tensor, tau: float, probes: list[int]) -> list[int]:
    """Of attention [H, S, S] of a prompt without its padding."""
    mean, length = attention.double().mean(0), attention.shape[-1]
    raw = [sum(float(mean[i, j]) for i in probes) for j in range(length)]
    count, held = 0, 0.0
    for share in sorted(raw, reverse=True):
        count, held = count + 1, held + share
        if held >= tau * sum(raw):
            break
    score = [raw[j] / max(sum(i >= j for i in probes), 1) for j in range(length)]
    return sorted(sorted(range(length), key=lambda j: (-score[j], j))[:count])


def zipvl(keys: Tensor, values: Tensor, group: int, ordinary: list[int], protected: list[int]) -> tuple[Tensor, Tensor]:
    out = keys.clone(), values.clone()
    for head in range(len(keys)):
        for places, bits in ((ordinary, 2), (protected, 4)):
            if places:
                out[0][head, places] = along_tokens(keys[head, places], group, lambda x, bits=bits: asymmetric(x, bits))
                out[1][head, places] = along_channels(
                    values[head, places], group, lambda x, bits=bits: asymmetric(x, bits)
                )
    return out


def lookm_kept(attention: Tensor, visual: list[bool], recent: float, important: float, prior: bool) -> list[list[int]]:
    """Of each key head, given its attention [Hk, S, S], summed over the query heads that share it."""
    length = attention.shape[-1]
    start = length - int(recent * length)
    kept = []
    for head in attention.double():
        score = [float(head[:, j].sum()) for j in range(start)]
        always = [j for j in range(start) if (not visual[j] if prior else j < 4)]
        wanted = max(int(important * length), len(always)) if prior else int(important * length)
        others = sorted((j for j in range(start) if j not in always), key=lambda j: (-score[j], j))
        kept.append(sorted((always + others)[:wanted]) + list(range(start, length)))
    return kept


def lookm(keys: Tensor, values: Tensor, kept: list[list[int]], mode: str, selective: bool) -> tuple[Tensor, Tensor]:
    return merge_evicted(keys, values, kept, mode, selective)
