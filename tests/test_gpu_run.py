"""``python -m bench.gpu``: what happens when a child hangs, dies or fails, that a run resumes, and the dry path."""

from __future__ import annotations

import json
import os
import select
import shlex
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from bench import harness
from bench.gpu import __main__ as gpu_run
from bench.gpu import pack, plan
from bench.gpu.record import Record
from bench.gpu.supervise import Job, supervise
from tests import verification
from tests.simt import emulator
from vtkernels.testing import timer

CHILD = """
import argparse, os, pathlib, sys, time
from bench.gpu.journal import START_AGAIN, Journal

parser = argparse.ArgumentParser()
Journal.add_options(parser)
parser.add_argument("items", nargs="*")
options = parser.parse_args()
journal = Journal(options)
group = ["cuda", "prune_gather", "float32"]
for item in options.items:
    if item in journal.done:
        continue
    if item == "exits":
        sys.exit("bad news")
    if item == "silent":
        time.sleep(60)
    if item == "loses the context":
        journal.start(item, group)
        journal.end(item, group, "failed", "illegal access")
        sys.exit(START_AGAIN)
    with journal.item(item, *group):
        if item == "fails":
            raise ValueError("wrong values")
        if item == "hangs":
            time.sleep(60)
        if item == "holds":
            os.write(9, b"here")
            time.sleep(60)
        if item == "dies":
            os.abort()
        print("ran", item)
print("SUMMARY: 0 errors")
"""

RUN = """
import pathlib, sys
from bench.gpu import __main__ as run, plan
from bench.gpu.supervise import Job

run.DRY_RESULTS, command = pathlib.Path(sys.argv[1]), sys.argv[2:]
plan.dry = lambda: [plan.Phase("tests", 1, [Job("job", "tests", command, item_seconds=60)])]
sys.argv[1:] = ["--dry"]
run.main()
"""


@pytest.fixture
def record(tmp_path) -> Record:
    environment = {"commit": "0123456789", "date": "2026-01-01", "gpu": "NVIDIA X", "torch": "2.11", "processor": "Y"}
    return Record(tmp_path / "run.json", "gpu", environment, copies=tmp_path / "out")


@pytest.fixture
def job(tmp_path):
    """A job whose items say what becomes of them."""
    (tmp_path / "child.py").write_text(CHILD)

    def make(*items: str, **options) -> Job:
        command = [sys.executable, str(tmp_path / "child.py"), *items]
        return Job(**({"name": "job", "section": "tests", "item_seconds": 1, "command": command} | options))

    return make


def soon(seconds: float = 60) -> float:
    return time.monotonic() + seconds


def test_one_bad_item_does_not_take_the_others_along(job, record):
    assert supervise(job("first", "fails", "hangs", "dies", "loses the context", "last"), record, soon())
    outcomes = record.data["tests"]["cuda"]["prune_gather"]["float32"]
    assert outcomes["passed"] == ["first", "last"]
    reasons = {"fails": "wrong values", "hangs": "timed out", "dies": "exit code -6", "loses the context": "illegal"}
    assert outcomes["failed"].keys() == reasons.keys()
    assert all(reason in outcomes["failed"][item] for item, reason in reasons.items())
    assert record.data["jobs"] == {"job": "done"}
    assert len(record.failures()) == 4


def test_a_run_continues_where_its_time_ended(job, record):
    work = job("first", "hangs", "last", item_seconds=30)
    assert not supervise(work, record, soon(2))
    again = Record(record.paths[0], "gpu", {})
    assert again.data == record.data and again.done("tests") == ["first"] and not again.data["jobs"]
    assert supervise(job("first", "hangs", "last"), again, soon())
    outcomes = again.data["tests"]["cuda"]["prune_gather"]["float32"]
    assert outcomes["passed"] == ["first", "last"] and list(outcomes["failed"]) == ["hangs"]
    assert json.loads(record.paths[0].read_text()) == again.data


@pytest.mark.parametrize(("item", "quiet", "why"), [("exits", 30, "bad news"), ("silent", 1, "nothing for 1 s")])
def test_a_process_that_fails_between_items(job, record, item, quiet, why):
    assert supervise(job(item, quiet_seconds=quiet), record, soon())
    assert why in record.data["jobs"]["job"] and record.failures()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_children_end_with_the_run(tmp_path, job, how):
    """Under a shell, which stands between the run and the child as a sanitizer does."""
    held = tmp_path / "held"  # a pipe that the shell and the child hold open as long as they live
    os.mkfifo(held)
    tool = ["sh", "-c", f'exec 9>{held}; {shlex.join(job("holds").command)} "$@"; true', "sh"]
    run = subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path), *tool], cwd=verification.ROOT)
    with held.open("rb", buffering=0) as pipe:
        assert pipe.read(4) == b"here"
        run.send_signal(how)
        assert select.select([pipe], [], [], 2)[0] and pipe.read() == b""
    assert run.wait() == -how


@pytest.mark.parametrize(
    ("items", "options", "outcome", "text"),
    [
        (["first", "last"], {"expected": "SUMMARY: 0 "}, "passed", ""),
        (["first"], {"expected": "no leaks"}, "failed", "SUMMARY: 0"),
        (["first", "exits"], {}, "failed", "exit code 1"),
        (["exits"], {"unsupported": "bad news"}, "skipped", "bad news"),
        (["hangs"], {}, "failed", "timed out"),
        (["dies"], {}, "failed", "exit code -6"),
        (["fails", "last"], {}, "failed", "wrong values"),
        ([], {"skip": "no such tool"}, "skipped", "no such tool"),
    ],
)
def test_a_sanitizer_has_one_outcome(job, record, items, options, outcome, text):
    assert supervise(job(*items, section="sanitizers", group=["memcheck", "op"], **options), record, soon())
    found = record.data["sanitizers"]["memcheck"]["op"]
    assert list(found) == [outcome]
    assert text in (found[outcome][0] if outcome == "passed" else next(iter(found[outcome].values())))


def test_exit_codes_and_copies(job, record, capsys):
    phases = [plan.Phase("tests", 2, [job("a", name="one"), job("b", name="two")])]
    gpu_run.execute(phases, record, soon(), only="one")
    assert gpu_run.report(record) == gpu_run.UNFINISHED
    gpu_run.execute(phases, record, soon(-1))
    assert gpu_run.report(record) == gpu_run.UNFINISHED
    gpu_run.execute(phases, record, soon())
    assert gpu_run.report(record) == gpu_run.COMPLETE
    assert "dry" not in capsys.readouterr().out
    assert len(record.paths) == 2 and record.paths[0].read_text() == record.paths[1].read_text()
    gpu_run.execute([plan.Phase("tests", 1, [job("fails", name="three")])], record, soon())
    assert gpu_run.report(record) == gpu_run.FAILURES
    assert "wrong values" in capsys.readouterr().out


@pytest.mark.skipif(not emulator.OPS.exists(), reason="libvtk_simt.so is not built (cmake -DVTK_SIMT=ON)")
def test_dry_run(tmp_path):
    facts = {"commit": "0123456789", "date": "2026-01-01T12:00:00"}
    record = Record(tmp_path / "dry.json", "dry", facts, cut="a few")
    tests = plan.tests(["cpu", "simt"], 1, 1, paths=("tests/test_select_cover.py::test_special_values",))
    sanitizers = plan.emulated_sanitizers(["select_cover"], 1)
    benchmarks = plan.benchmarks(["score"], "cpu", "--quick")
    gpu_run.execute([plan.facts("cpu", "--quick"), tests, sanitizers, benchmarks], record, soon(120))
    assert gpu_run.report(record) == gpu_run.COMPLETE

    data = json.loads((tmp_path / "dry.json").read_text())
    assert (
        data["kind"] == "dry" and "no figure in here is a GPU's" in data["warning"] and "gpu" not in data["environment"]
    )
    assert data["environment"].keys() >= {"commit", "date", "torch", "python", "processor"}
    assert data["ceilings"].keys() == {"copy_bandwidth", "matmul_rate", "launch"}
    assert data["sanitizers"]["emulation"]["select_cover"] == {"passed": ["9 calls"]}
    assert data["sanitizers"]["memcheck"]["select_cover"] == {"skipped": {"memcheck select_cover": plan.NO_GPU}}
    [result] = [row for row in data["results"] if row["op"] == "attention_scores"]
    assert result["peers"]["eager"]["median"] > 0
    assert result["floor"] > 0 and result["floor_fraction"] == pytest.approx(result["floor"] / result["ours"]["median"])

    page = verification.table([tmp_path / "dry.json"])
    assert "| select_cover | simt | passed |" in page and "dry run" in page
    assert "| select_cover | cuda | not run yet |" in page and "compute-sanitizer" not in page
    data["tests"]["cuda"] = data["tests"]["simt"]
    (tmp_path / "dry.json").write_text(json.dumps(data))
    assert verification.table([tmp_path / "dry.json"]) == page


def test_the_table_says_failed(record, tmp_path):
    for test, outcome in (("a", "passed"), ("b", "failed"), ("c", "skipped")):
        record.add("tests", test, ["cuda", "prune_gather", "bfloat16"], outcome)
    record.add("sanitizers", "3 calls", ["racecheck", "prune_gather"], "failed", "a hazard")
    record.save()
    page = verification.table([tmp_path / "run.json"])
    assert "| prune_gather | cuda | **failed** | | | **1 of 2 failed** | | NVIDIA X, not complete | 2.11 |" in page
    assert "| prune_gather | racecheck | **failed** | NVIDIA X |" in page
    later = record.data | {"environment": record.data["environment"] | {"date": "2026-01-02"}, "complete": True}
    later["tests"] = {"cuda": {"prune_gather": {"float32": {"passed": ["a"]}}}}
    (tmp_path / "later.json").write_text(json.dumps(later))
    assert "| prune_gather | cuda | passed | 1 | | | | NVIDIA X | 2.11 |" in verification.table(
        [tmp_path / "later.json"]
    )


@pytest.mark.parametrize("dtype", [torch.float16])
def test_subject_of_a_test(request, dtype):
    assert verification.subject(request.node) == ("", verification.OTHER, "float16")


def test_the_manifest_names_the_commit_where_git_is_not(tmp_path, monkeypatch):
    facts = {"commit": "abc", "sources": pack.source_digest(), "libraries": {"libvtk_cuda.so": "1"}}
    monkeypatch.setattr(pack, "commit", lambda: pack.UNKNOWN)
    monkeypatch.setattr(pack, "library_digests", lambda: {"libvtk_cuda.so": "1"})
    monkeypatch.setattr(pack, "MANIFEST", tmp_path / "manifest.json")
    with pytest.raises(RuntimeError, match="python -m bench"):
        pack.identify()
    pack.MANIFEST.write_text(json.dumps(facts))
    assert pack.identify() == "abc"
    pack.MANIFEST.write_text(json.dumps(facts | {"sources": "of another checkout"}))
    assert pack.identify() == f"abc+changes-{pack.source_digest()[:8]}"
    pack.MANIFEST.write_text(json.dumps(facts | {"libraries": {"libvtk_cuda.so": "2"}}))
    with pytest.raises(RuntimeError, match="libraries"):
        pack.identify()


def test_gpu_timing_flushes_before_every_call(monkeypatch):
    """The device's clock played by the host's, and "cuda" by a plain object: what is enqueued, in which order."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self):
            self.at = time.perf_counter()
            log.append("event")

        def elapsed_time(self, end) -> float:
            return (end.at - self.at) * 1e3

    monkeypatch.setattr(timer.torch, "device", lambda device: device)
    monkeypatch.setattr(timer.torch.cuda, "Event", Event)
    monkeypatch.setattr(timer.torch.cuda, "synchronize", lambda device: log.append("wait"))
    monkeypatch.setattr(timer, "_flush", lambda device: lambda: log.append("flush"))
    device = SimpleNamespace(type="cuda")
    timing = timer.compare_times({"call": lambda: (log.append("call"), time.sleep(0.002))}, device, 3, 0.01)["call"]
    assert 2 <= timing.median < 10
    timed = log[log.index("flush") :]
    assert timed[:5] == ["flush", "event", "call", "event", "wait"]
    assert timed.count("event") == 2 * timed.count("flush")


def test_a_peer_that_breaks_is_a_row_and_a_wrong_one_an_error(monkeypatch):
    x = torch.randn(1000)

    def broken():
        raise OSError("libnuma.so.1 not found")

    def check(ours, peer):
        torch.testing.assert_close(ours, peer)

    ceilings = harness.Ceilings(copy_bandwidth=8e9, matmul_rate=1e9)
    peers = {"same": lambda: lambda: x + 1, "broken": lambda: broken}
    monkeypatch.setattr(timer, "SETTLE_SECONDS", 0)
    case = harness.Case("op", "name", lambda: x + 1, peers, check, bytes=8000, flops=3000)
    result = harness.run_case(case, torch.device("cpu"), ceilings, rounds=1)
    assert result.peers["broken"] == "failed: OSError: libnuma.so.1 not found"
    assert result.peers["same"].median > 0 and result.floor == pytest.approx(3e-3)
    case.peers = {"wrong": lambda: lambda: x + 2}
    with pytest.raises(AssertionError):
        harness.run_case(case, torch.device("cpu"), ceilings, rounds=1)
