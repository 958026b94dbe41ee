"""Runs one job: child processes that journal their items, killed when an item hangs, begun again after a crash.

Every process ends at least one item (the one that it hung or died in counts as failed), so a job comes to its end.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from bench.checkout import ROOT
from bench.gpu.journal import START_AGAIN
from bench.gpu.record import FAILED, PASSED, SKIPPED, Record

POLL_SECONDS = 0.1
SAVE_SECONDS = 10
TAIL = 3000  # characters of a dead child's output that its failure shows


@dataclass(frozen=True)
class Job:
    """``command`` gets ``--journal`` and ``--context``; ``section`` is where the record keeps its items.

    With ``group`` the process has one outcome, filed there, for all its items: a sanitizer speaks at the end.
    """

    name: str
    section: str
    command: list[str]
    item_seconds: float  # an item that takes longer hangs
    quiet_seconds: float = 180  # so does a process that is between items this long: imports, collection
    environment: dict[str, str] = field(default_factory=dict)
    group: list[str] = field(default_factory=list)
    expected: str = ""  # what the output of a process with a group says when all is well
    unsupported: str = ""  # and what it says when it cannot work here
    skip: str = ""  # why there is nothing to run


class _Process:
    """One child, its journal and what it is at."""

    def __init__(self, job: Job, record: Record, folder: Path):
        self.job, self.record = job, record
        self.journal, context, self.log = (folder / name for name in ("journal", "context", "log"))
        self.journal.write_text("")
        context.write_text(json.dumps({"done": record.done(job.section), "ceilings": record.data["ceilings"]}))
        self.alive = context.open()
        fcntl.flock(self.alive, fcntl.LOCK_EX)  # until this process ends: journal.end_with_run
        path = os.pathsep.join([str(ROOT / "python"), str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        with self.log.open("w") as log:
            self.child = subprocess.Popen(
                [*job.command, "--journal", str(self.journal), "--context", str(context)],
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": path} | job.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a group of its own: its children are killed with it
            )
        self.read = 0
        self.item: dict | None = None
        self.since = time.monotonic()
        self.passed, self.failed = 0, []

    def follow(self) -> None:
        """Takes over what the journal says since the last look."""
        with self.journal.open() as file:
            file.seek(self.read)
            while (line := file.readline()).endswith("\n"):
                self.read = file.tell()
                event = json.loads(line)
                self.item = event if event.pop("event") == "start" else None
                self.since = time.monotonic()
                if self.item is None:
                    self._take(event)

    def _take(self, event: dict) -> None:
        if not self.job.group:
            self.record.add(self.job.section, **event)
        elif event["outcome"] == FAILED:
            self.failed.append(f"{event['item']}: {event['text']}")
        else:
            self.passed += 1

    def kill(self) -> None:
        # NOTE: a process stuck in the driver dies when the kernel on the device ends; do not wait for it.
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(self.child.pid, signal.SIGKILL)
            self.child.wait(timeout=20)
        self.alive.close()

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-TAIL:]

    def fail_item(self, why: str) -> str:
        """The item at hand hung or died with the process. Returns how the job goes on."""
        text = f"{why}\n{self.tail()}"
        if self.job.group:
            return self.end_group(f"{self.item['item']}: {text}")
        self.record.add(self.job.section, self.item["item"], self.item["group"], FAILED, text)
        return "again"

    def end_group(self, why: str) -> str:
        """The one outcome of a process with a group; ``why`` it failed, empty when it did not."""
        calls, output = f"{self.passed} calls", self.log.read_text(errors="replace")
        if self.job.unsupported and self.job.unsupported in output:
            self.record.add(self.job.section, calls, self.job.group, SKIPPED, self.tail())
        elif why or self.failed or self.job.expected not in output:
            text = "\n".join([*self.failed, why or self.tail()])
            self.record.add(self.job.section, calls, self.job.group, FAILED, text)
        else:
            self.record.add(self.job.section, calls, self.job.group, PASSED)
        return "done"


def supervise(job: Job, record: Record, deadline: float) -> bool:
    """Runs the job as far as ``deadline`` (of time.monotonic) lets it; True when it has ended, well or badly."""
    if job.skip:
        record.add(job.section, job.name, job.group, SKIPPED, job.skip)
        record.end_job(job.name, "done")
        return True
    while True:
        before = len(record.done(job.section))
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            state = _run_process(_Process(job, record, Path(folder)), deadline)
        if state == "again" and len(record.done(job.section)) == before:
            state = "failed: a new process came no further"
        if state == "out of time":
            record.save()
            return False
        if state != "again":
            record.end_job(job.name, state)
            return True


def _run_process(process: _Process, deadline: float) -> str:
    """Returns "done", "again" (more items wait for a new process), "out of time", or "failed: why"."""
    job, saved = process.job, time.monotonic()
    try:
        while process.child.poll() is None:
            time.sleep(POLL_SECONDS)
            process.follow()
            now = time.monotonic()
            if now > deadline:
                return "out of time"
            if now - process.since > (job.item_seconds if process.item else job.quiet_seconds):
                process.kill()
                process.follow()
                if process.item is None:
                    return f"failed: nothing for {job.quiet_seconds:g} s\n{process.tail()}"
                return process.fail_item(f"timed out after {job.item_seconds:g} s")
            if now - saved > SAVE_SECONDS:
                process.record.save()
                saved = now
    finally:
        process.kill()
    process.follow()
    return _verdict(process)


def _verdict(process: _Process) -> str:
    """What the exit of a process means."""
    code = process.child.returncode
    if process.item is not None:
        return process.fail_item(f"the process died, exit code {code}")
    if process.job.group:
        return process.end_group(f"exit code {code}\n{process.tail()}" if code else "")
    if code == START_AGAIN:
        return "again"
    return "done" if code == 0 else f"failed: exit code {code}\n{process.tail()}"
