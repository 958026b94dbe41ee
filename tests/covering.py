"""Combinations of options that are worth a test each."""

from __future__ import annotations

from itertools import combinations, product
from typing import Any


def pairwise(*factors: list[Any]) -> list[tuple[Any, ...]]:
    """A few rows, one value of each factor in each, in which every two values of two factors stand together once."""

    def pairs(row: tuple[int, ...]) -> set:
        return set(combinations(enumerate(row), 2))

    every = list(product(*(range(len(factor)) for factor in factors)))
    rows, missing = [], set().union(*map(pairs, every))
    while missing:
        rows.append(max(every, key=lambda row: len(missing & pairs(row))))
        missing -= pairs(rows[-1])
    return [tuple(factor[at] for factor, at in zip(factors, row, strict=True)) for row in rows]
