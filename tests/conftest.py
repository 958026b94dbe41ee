"""The three backends that one test body runs on.

cpu   the CPU kernels, torch.ops.vtk on CPU tensors
simt  the CUDA sources under the host emulation, torch.ops.vtk_simt on CPU tensors
cuda  the CUDA kernels, torch.ops.vtk on CUDA tensors
"""

from __future__ import annotations

import datetime
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import harness
from bench.checkout import commit
from tests import verification
from tests.simt import emulator
from vtkernels import _library

NO_GPU = "no GPU on this machine"
NO_EMULATION = "libvtk_simt.so is not built (cmake -DVTK_SIMT=ON)"


@dataclass(frozen=True)
class Backend:
    name: str
    device: torch.device
    ops: Any  # torch.ops.vtk or torch.ops.vtk_simt

    @property
    def checks_values(self) -> bool:
        """The CPU reports contradictory values; CUDA sources clamp them, because a report needs a sync."""
        return self.name == "cpu"

    def put(self, *tensors: torch.Tensor):
        moved = [t.to(self.device) for t in tensors]
        return moved[0] if len(moved) == 1 else moved


def _cuda_missing() -> str | None:
    if not torch.cuda.is_available():
        return NO_GPU
    return None if _library.LIBRARIES.cuda else f"libvtk_cuda.so is not loaded: {_library.LIBRARIES.cuda_reason}"


def pytest_generate_tests(metafunc):
    """Every backend once; the emulation as often as --simt-seeds says."""
    if "backend" not in metafunc.fixturenames:
        return
    params = [pytest.param(("cpu", 0), id="cpu"), pytest.param(("cuda", 0), id="cuda", marks=pytest.mark.cuda)]
    for again in range(metafunc.config.getoption("--simt-seeds")):
        name = f"simt-again{again}" if again else "simt"
        params.insert(-1, pytest.param(("simt", again), id=name, marks=pytest.mark.simt))
    metafunc.parametrize("backend", params, indirect=True)


@pytest.fixture
def backend(request) -> Iterator[Backend]:
    name, again = request.param
    if name == "cpu":
        yield Backend("cpu", torch.device("cpu"), torch.ops.vtk)
    elif name == "simt":
        if not emulator.OPS.exists():
            pytest.skip(NO_EMULATION)
        torch.ops.load_library(str(emulator.OPS))
        # A schedule of its own for every test, so that one run of the suite sees all kinds.
        test = request.node.nodeid.replace(f"simt-again{again}", "simt")
        with emulator.schedule(emulator.OPS, (zlib.crc32(test.encode()) + again) % len(emulator.SEEDS)):
            yield Backend("simt", torch.device("cpu"), torch.ops.vtk_simt)
    else:
        if missing := _cuda_missing():
            pytest.skip(missing)
        yield Backend("cuda", torch.device("cuda"), torch.ops.vtk)


@pytest.fixture
def random() -> torch.Generator:
    return torch.Generator().manual_seed(20260)


@pytest.fixture(autouse=True)
def _restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def pytest_addoption(parser):
    parser.addoption("--record", action="store_true", help="Note the outcomes for docs/verification.md.")
    parser.addoption("--simt-seeds", type=int, default=1, help="Schedules each test of the emulation sees.")


def pytest_collection_modifyitems(items):
    """What a test is about rides on its reports, from the workers of xdist too."""
    for item in items:
        item.user_properties.append(("subject", list(verification.subject(item))))


def _record(stats) -> list[Path]:
    reports = [(report, kind) for kind in ("passed", "skipped", "failed", "error") for report in stats.get(kind, [])]
    subjects = [(dict(report.user_properties).get("subject"), kind) for report, kind in reports]
    outcomes = [
        (verification.Subject(*about), "failed" if kind == "error" else kind) for about, kind in subjects if about
    ]
    facts = {"torch": torch.__version__, "commit": commit()}
    facts["date"] = datetime.datetime.now().isoformat(timespec="seconds")
    hardware = {"cpu": harness.processor(), "simt": harness.processor()}
    if torch.cuda.is_available():
        hardware["cuda"] = torch.cuda.get_device_name()
    return verification.record(outcomes, hardware, facts)


def pytest_terminal_summary(terminalreporter, config):
    """Says how much is unproven here: a skipped backend is a fact about the run, not noise."""
    if config.getoption("--record"):
        for path in _record(terminalreporter.stats):
            terminalreporter.write_line(f"recorded {path.name}")
    reasons = [report.longrepr[2] for report in terminalreporter.stats.get("skipped", [])]
    for reason in (NO_GPU, NO_EMULATION):
        if count := sum(reason in text for text in reasons):
            terminalreporter.write_line(f"{count} tests wait: {reason}")
