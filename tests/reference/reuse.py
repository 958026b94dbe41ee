"""Vision encoder layers that reuse a reference frame's results: plain loops over frames, layers and tokens, float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.reference.merging import Layer
from tests.reference.recipes import cosine, top


def stale(key: Tensor, cached: Tensor, count: int, metric: str) -> list[int]:
    """One frame's tokens [n, C] whose keys changed most."""
    change = {
        "cosine": lambda a, b: -cosine(a, b),
        "dot": lambda a, b: -float(a @ b),
        "l1": lambda a, b: float((a - b).abs().sum()),
        "l2": lambda a, b: math.sqrt(float(((a - b) ** 2).sum())),
    }[metric]
    return sorted(top([change(a, b) for a, b in zip(key, cached, strict=True)], count))


def attended(layer: Layer, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One token's attention output [C]."""
    heads = []
    for q, k, v in zip(query.chunk(layer.heads), keys.chunk(layer.heads, 1), values.chunk(layer.heads, 1), strict=True):
        heads.append((k @ q / math.sqrt(len(q))).softmax(0) @ v)
    return layer.out(torch.cat(heads))


def stc_cacher(
    layers: list[Layer], frames: Tensor, count: int, interval: int, metric: str, prefix: int
) -> tuple[Tensor, list[list[list[int]]]]:
    """The tower's output [F, n, C] of a video's embeddings, and by layer the stale patches of the other frames."""
    cache: list[dict[str, Tensor]] = [{} for _ in layers]
    chosen_by_layer: list[list[list[int]]] = [[] for _ in layers]
    outputs = []
    for number, x in enumerate(frames):
        for layer, held, chosen in zip(layers, cache, chosen_by_layer, strict=True):
            keys = layer.key(layer.norm1(x))
            if number % interval == 0:
                held.clear()
                held.update(key=keys, value=torch.zeros_like(x), attention=torch.zeros_like(x), mlp=torch.zeros_like(x))
                tokens = list(range(len(x)))
            else:
                patches = stale(keys[prefix:], held["key"][prefix:], count, metric)
                chosen.append(patches)
                tokens = [*range(prefix), *(patch + prefix for patch in patches)]
            now = {name: rows.clone() for name, rows in held.items()}
            for i in tokens:
                now["value"][i] = layer.value(layer.norm1(x[i]))
            for i in tokens:
                now["attention"][i] = attended(layer, layer.query(layer.norm1(x[i])), keys, now["value"])
            x = x + now["attention"]
            for i in tokens:
                now["mlp"][i] = layer.mlp(layer.norm2(x[i]))
            x = x + now["mlp"]
            if number % interval == 0:
                held.update(now)
        outputs.append(x)
    return torch.stack(outputs), chosen_by_layer
