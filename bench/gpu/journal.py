"""How a child tells what it is doing: one JSON line when an item starts, one when it ends, flushed at once.

A process that hangs or dies leaves the name of the item that it was at, and everything before it.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.gpu.record import FAILED, PASSED

START_AGAIN = 75  # a child's exit code: the device context is lost, continue in a new process


def end_with_run(locked: str) -> None:
    """Kills this process's group as soon as the run is gone, however it went: nobody else would free the device.

    The run holds a lock on the file as long as it lives. A parent-death signal would not pass the sanitizers: between
    the run and this process they have processes of their own.
    """

    def wait() -> None:
        with open(locked) as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


class Journal:
    """Built from the two options that every child has: ``--journal`` to write, ``--context`` to read."""

    def __init__(self, options: argparse.Namespace):
        end_with_run(options.context)
        self._file = Path(options.journal).open("a", buffering=1)  # noqa: SIM115 (as long as the process)
        context = json.loads(Path(options.context).read_text())
        self.done, self.ceilings = set(context["done"]), context["ceilings"]

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--journal", required=True)
        parser.add_argument("--context", required=True)

    def _write(self, **event: object) -> None:
        self._file.write(json.dumps(event) + "\n")

    def start(self, item: str, group: list[str]) -> None:
        self._write(event="start", item=item, group=group)

    def end(self, item: str, group: list[str], outcome: str, text: str = "", result: object = None) -> None:
        self._write(event="end", item=item, group=group, outcome=outcome, text=text, result=result)

    @contextmanager
    def item(self, item: str, *group: str) -> Iterator[dict]:
        """Around one item; what the block puts into the dict under "result" goes along. An exception is a failure."""
        self.start(item, list(group))
        box: dict = {}
        try:
            yield box
        except Exception:
            self.end(item, list(group), FAILED, traceback.format_exc())
            if context_is_lost():
                raise SystemExit(START_AGAIN) from None
        else:
            self.end(item, list(group), PASSED, result=box.get("result"))


def context_is_lost() -> bool:
    """After an illegal access every later CUDA call of the process fails, whatever it does."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
        return False
    except Exception:
        return True
