"""Times several callables against each other in one run."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

SETTLE_SECONDS = 0.2


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call: the median over rounds, and the fastest and slowest round."""

    median: float
    fastest: float
    slowest: float
    rounds: int


FLUSH_BYTES = 512 << 20  # several times any L2; reading it takes a GPU over 100 us, in which the host runs ahead
MOST_TIMED_CALLS = 50  # a round on a GPU: each call waits for its flush


@functools.lru_cache(maxsize=1)
def _flush(device: torch.device) -> Callable[[], object]:
    """Empties the L2 by reading: lines that were written would still be on their way out while the call runs."""
    filler, total = torch.ones(FLUSH_BYTES // 4, device=device), torch.empty((), device=device)
    return lambda: torch.sum(filler, dim=0, out=total)


def _cold_seconds(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """The median time of a call on a GPU that finds its inputs in main memory, launch overhead hidden.

    The host enqueues the call while the flush before it runs: what the events see is the device's time, and of the
    host's only what exceeds a flush (a peer of many small launches).
    """
    flush = _flush(device)
    events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(repeats)]
    for start, end in events:
        flush()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize(device)
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


def back_to_back_seconds(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Seconds a call of a CUDA stream of calls: inputs that fit stay in the L2, and the host's overhead counts."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    call()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3 / repeats


def _seconds(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    if device.type == "cuda":
        return _cold_seconds(call, min(repeats, MOST_TIMED_CALLS), device)
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats


def compare_times(
    calls: dict[str, Callable[[], object]],
    device: torch.device | str = "cpu",
    rounds: int = 15,
    round_seconds: float = 0.06,
) -> dict[str, Timing]:
    """Times every callable in interleaved rounds, so that a slow phase of the machine hits all of them alike.

    Each round starts with the next callable: nobody always follows the same neighbour.

    Args:
        calls: name to callable without arguments; each is warmed up first (compilation stays out of the figures).
        device: ``"cuda"`` times each call with events, its inputs out of the caches; a round is a median of calls.
        rounds: interleaved rounds; the median over rounds is the figure.
        round_seconds: how long one callable runs in one round, at least one call.
    """
    device = torch.device(device)
    repeats = {}
    for name, call in calls.items():
        for _ in range(3):
            call()
        repeats[name] = max(1, int(round_seconds / max(_seconds(call, 1, device), 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for first in range(rounds):
        for name in names[first % len(names) :] + names[: first % len(names)]:
            # The callable before may leave its data in the caches and threads that spin for work: onnxruntime's spin
            # for over 50 ms, and on two cores they cost the next callable up to 16 ms a call.
            time.sleep(SETTLE_SECONDS if device.type == "cpu" else 0)
            for _ in range(max(1, repeats[name] // 4)):
                calls[name]()
            samples[name].append(_seconds(calls[name], repeats[name], device) * 1e3)
    return {n: Timing(statistics.median(s), min(s), max(s), rounds) for n, s in samples.items()}
