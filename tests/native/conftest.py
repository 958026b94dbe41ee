"""``native``: the device vocabulary over numpy arrays (module.cpp), under several schedules of the emulation."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest

from tests.simt import emulator


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent.name == "native":
            item.add_marker(pytest.mark.simt)


@pytest.fixture(scope="module", params=[0, 1, 2], ids="seed{}".format)
def native(request) -> ModuleType:
    if not emulator.NATIVE.exists():
        pytest.skip("simt_native.so is not built (cmake -DVTK_SIMT=ON, with pybind11)")
    with emulator.schedule(emulator.NATIVE, request.param, capability=90, spins=500_000):
        spec = importlib.util.spec_from_file_location("simt_native", emulator.NATIVE)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
