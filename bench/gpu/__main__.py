"""``python -m bench.gpu``: docs/gpu-run.md. The standard library alone: a bare machine may have nothing else."""

from __future__ import annotations

import argparse
import datetime
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.checkout import ROOT
from bench.gpu import pack, plan
from bench.gpu.record import FAILED, PASSED, SECTIONS, SKIPPED, Record
from bench.gpu.supervise import Job, supervise

GPU_RESULTS = ROOT / "bench" / "results" / "gpu"
DRY_RESULTS = ROOT / "build" / "gpu-dry"  # never committed
COMPLETE, FAILURES, UNFINISHED = 0, 1, 3  # exit codes
SPARE_SECONDS = 10  # of the budget, for the last words


def execute(phases: list[plan.Phase], record: Record, deadline: float, only: str = "") -> None:
    """Runs what the record does not have yet, until ``deadline`` (of time.monotonic)."""
    for phase in phases:
        waiting = [job for job in phase.jobs if only in job.name and job.name not in record.data["jobs"]]
        with ThreadPoolExecutor(phase.width) as pool:
            list(pool.map(lambda job: _run(job, record, deadline), waiting))
        if phase.name == "facts" and record.count("facts", FAILED):
            break  # not the machine that the plan is for
    record.data["complete"] = all(job.name in record.data["jobs"] for phase in phases for job in phase.jobs)
    record.save()


def _run(job: Job, record: Record, deadline: float) -> None:
    if time.monotonic() > deadline:
        return
    begin = time.monotonic()
    ended = supervise(job, record, deadline)
    state = record.data["jobs"][job.name].splitlines()[0] if ended else "to be continued"
    print(f"  {job.name}: {state}, {time.monotonic() - begin:.0f} s", flush=True)


def report(record: Record) -> int:
    """Prints the run's last page; returns the exit code."""
    data = record.data
    for result in data["results"]:
        ours = result["ours"]["median"]
        peers = ", ".join(
            f"{name} {peer['median'] / ours:.2f}x" if isinstance(peer, dict) else f"{name}: {peer}"
            for name, peer in result["peers"].items()
        )
        print(f"{result['op']} {result['name']}: {ours:.4f} ms, {result['floor_fraction']:.0%} of the floor; {peers}")
    for name, rate in data["ceilings"].items():
        print(f"{name}: {rate:.4g}")
    for name, text in record.failures().items():
        print(f"FAILED {name}\n{text.strip()}\n")
    for section in SECTIONS:
        counts = {outcome: record.count(section, outcome) for outcome in (PASSED, FAILED, SKIPPED)}
        print(f"{section}: " + ", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    if warning := data.get("warning"):
        print(f"{warning}. Cut: {data['cut']}.")
    print(f"{data['environment']['commit']}: {record.paths[-1]}")
    if not data["complete"] and not record.count("facts", FAILED):
        print("not complete: the same command continues, given this file in the folder that the first line names")
        return UNFINISHED
    # Where everything was skipped, nothing was proven.
    return FAILURES if record.failures() or not record.count("tests", PASSED) else COMPLETE


def gpu_name() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description="Tests, sanitizers and benchmarks on a GPU."
    )
    parser.add_argument("command", nargs="?", choices=["run", "pack"], default="run", help="pack: fill .gpu/ to carry.")
    parser.add_argument("--dry", action="store_true", help="The same path on CPU and emulation, cut to minutes.")
    parser.add_argument("--budget-s", type=float, default=540, help="Seconds; what is left waits for the next call.")
    parser.add_argument("--out", type=Path, help="Also write the JSON into this folder.")
    parser.add_argument("--fresh", action="store_true", help="Forget what an earlier call recorded.")
    parser.add_argument("--only", default="", help="Run the jobs whose name contains this text.")
    parser.add_argument("--python", default="3.12", help="pack: the other machine's Python.")
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends at once, as SIGTERM does: the record is whole, children follow
    deadline = time.monotonic() + options.budget_s - SPARE_SECONDS
    if options.command == "pack":
        print("carry:", *pack.pack(options.python))
        return 0
    gpu = gpu_name()
    if gpu is None and not options.dry:
        parser.error("no GPU here (nvidia-smi names none): --dry runs the whole path without one")
    commit = pack.identify()
    environment = {"commit": commit, "date": datetime.datetime.now().isoformat(timespec="seconds")}
    name = "dry" if options.dry else re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    digest = commit.partition("+")[2]
    path = (DRY_RESULTS if options.dry else GPU_RESULTS) / f"{name}-{commit[:9]}{digest and '-' + digest}.json"
    if options.fresh:
        path.unlink(missing_ok=True)
    kind, cut = ("dry", plan.DRY_CUT) if options.dry else ("gpu", "")
    record = Record(path, kind, environment, cut, options.out)
    print(f"{kind} run of {commit} -> {path}", flush=True)
    execute(plan.dry() if options.dry else plan.gpu(), record, deadline, options.only)
    return report(record)


if __name__ == "__main__":
    sys.exit(main())
