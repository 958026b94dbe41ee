"""Video-XL-2's two levels as plain loops over one layer of one prompt, float64."""

from __future__ import annotations

import torch
from torch import Tensor


def units_of(visual: list[bool]) -> list[list[int]]:
    """Places of the visual tokens, run by run."""
    units: list[list[int]] = []
    for place, is_visual in enumerate(visual):
        if is_visual:
            if place == 0 or not visual[place - 1]:
                units.append([])
            units[-1].append(place)
    return units


def pooled_units(attention: Tensor, visual: list[bool], chunk: int, relevant: float) -> list[list[int]]:
    """``attention`` [H, N, N] of the prompt's rows."""
    units = units_of(visual)
    chunks = [units[i : i + chunk] for i in range(0, len(units), chunk)]
    question = range(units[-1][-1] + 1, len(visual))
    scored = []
    for number, members in enumerate(chunks[1:-1]):
        places = [place for unit in members for place in unit]
        given = attention[:, list(question)][:, :, places].double().mean()
        scored.append((-float(given), number, members))
    dense = round(relevant * len(scored))
    return sorted(unit for _, _, members in sorted(scored)[dense:] for unit in members)


def bilevel(x: Tensor, pooled: list[list[int]], pool: int) -> Tensor:
    """Keys or values [H, N, D] to those of the cache."""
    rows, place = [], 0
    starts = {unit[0]: unit for unit in pooled}
    while place < x.shape[1]:
        unit = starts.get(place)
        if unit is None:
            rows.append(x[:, place])
            place += 1
            continue
        for first in range(0, len(unit), pool):
            rows.append(x[:, unit[first : first + pool]].mean(1))
        place += len(unit)
    return torch.stack(rows, dim=1)
