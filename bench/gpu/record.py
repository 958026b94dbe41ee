"""The run's JSON: every outcome of every job, and the state from which a second call continues.

kind          "gpu", or "dry" with a ``warning``: nothing in a dry record is a GPU's
environment   commit, device, driver, torch, Python, ...; beside it ``ceilings``: copy, matrix product, launch
tests         backend -> op -> dtype -> {"passed": [tests], "failed": {test: text}, "skipped": {test: reason}}
sanitizers    tool -> op -> the same, for the process as a whole
benchmarks    the same; the figures are ``results``, in the form of ``python -m bench --out``
facts         the same; the facts are in ``environment`` and ``ceilings``
jobs          job -> "done" or "failed: why"; ``complete`` when every job of the plan is there
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

DRY_WARNING = "dry run without a GPU: CPU kernels and emulated CUDA sources; no figure in here is a GPU's"
SECTIONS = ("facts", "tests", "sanitizers", "benchmarks")
OUTCOMES = PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
TEXT_LIMIT = 4000  # characters kept of a failure


class Record:
    """Read from ``path`` when it is there; :meth:`save` also writes a copy into ``copies``."""

    def __init__(self, path: Path, kind: str, environment: dict, cut: str = "", copies: Path | None = None):
        self.paths = [path] + ([copies / path.name] if copies else [])
        self._lock = threading.RLock()
        if path.exists():
            self.data = json.loads(path.read_text())
            return
        self.data = {
            "kind": kind,
            **({"warning": DRY_WARNING} if kind == "dry" else {}),
            "cut": cut,
            "complete": False,
            "environment": environment,
            "ceilings": {},
            "jobs": {},
            **{section: {} for section in SECTIONS},
            "results": [],
        }

    def save(self) -> None:
        with self._lock:
            text = json.dumps(self.data, indent=1) + "\n"
            for path in self.paths:
                path.parent.mkdir(parents=True, exist_ok=True)
                partial = path.with_name(path.name + ".partial")
                partial.write_text(text)
                os.replace(partial, path)

    def end_job(self, name: str, state: str) -> None:
        with self._lock:
            self.data["jobs"][name] = state
            self.save()

    def add(self, section: str, item: str, group: list[str], outcome: str, text: str = "", result: object = None):
        """Notes how one item of a section ended. ``result``: a benchmark's figures, or facts to merge."""
        with self._lock:
            place = self.data[section]
            for name in group:
                place = place.setdefault(name, {})
            if outcome != PASSED:
                place.setdefault(outcome, {})[item] = text[-TEXT_LIMIT:]
                return
            place.setdefault(PASSED, []).append(item)
            if section == "benchmarks":
                self.data["results"].append(result)
            if section == "facts":
                for name, facts in result.items():
                    self.data[name].update(facts)

    def done(self, section: str) -> list[str]:
        """The items of a section that need not run again, failed ones among them."""
        with self._lock:
            leaves = [leaf for _, leaf in _leaves(self.data[section])]
            return [item for leaf in leaves for outcome in OUTCOMES for item in leaf.get(outcome, ())]

    def count(self, section: str, outcome: str) -> int:
        return sum(len(leaf.get(outcome, ())) for _, leaf in _leaves(self.data[section]))

    def failures(self) -> dict[str, str]:
        """Everything that went wrong, by name."""
        found = {f"job {name}": state for name, state in self.data["jobs"].items() if state != "done"}
        for section in SECTIONS:
            for group, leaf in _leaves(self.data[section]):
                for item, text in leaf.get(FAILED, {}).items():
                    found[f"{section} {' '.join(group)}: {item}"] = text
        return found


def _leaves(tree: dict, group: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict]]:
    """The innermost dicts, those that hold outcomes, with the names that lead there."""
    if any(outcome in tree for outcome in OUTCOMES):
        yield group, tree
        return
    for name, branch in tree.items():
        yield from _leaves(branch, (*group, name))
