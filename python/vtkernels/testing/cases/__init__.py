"""Small valid inputs of every registered op: one module an op, each with a list ``CASES``.

opcheck, the determinism tests, the registry test and the sanitizer run all walk these.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Case:
    """One call: ``make(random, dtype)`` returns (args, kwargs) on the CPU; ``random`` is a seeded torch.Generator."""

    overload: str  # "prune_gather" or "prune_gather.varlen"
    name: str
    make: Callable[[torch.Generator, torch.dtype], tuple[tuple, dict]]


def all_cases() -> dict[str, list[Case]]:
    """Overload name to its cases."""
    found: dict[str, list[Case]] = {}
    for module in pkgutil.iter_modules(__path__):
        for case in importlib.import_module(f"{__name__}.{module.name}").CASES:
            found.setdefault(case.overload, []).append(case)
    return found
