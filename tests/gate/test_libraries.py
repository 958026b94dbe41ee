"""The stable ABI of the op libraries and the contents of a wheel, and faults planted in both."""

from __future__ import annotations

import os
import subprocess
import zipfile
from pathlib import Path

import pytest

from vtkernels._library import TARGET_TORCH

from . import abi, wheel

LIBRARY_FOLDER = wheel.PACKAGE / "lib"
UNSTABLE = Path(__file__).parent / "planted" / "unstable.cpp"
CUDA = (LIBRARY_FOLDER / "libvtk_cuda.so").exists()
LIBRARIES = [
    LIBRARY_FOLDER / "libvtk_cpu.so",
    pytest.param(
        LIBRARY_FOLDER / "libvtk_cuda.so",
        marks=pytest.mark.skipif(not CUDA, reason="libvtk_cuda.so is not built: no nvcc"),
    ),
]
needs_audit = pytest.mark.skipif(not abi.AUDIT.exists(), reason="torch-abi-audit is not installed: Python 3.10")


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.stem)
def test_library_keeps_to_the_stable_abi(library):
    assert not abi.problems(library)


@needs_audit
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.stem)
def test_torch_abi_audit_agrees(library):
    assert not abi.audit_problems(library, TARGET_TORCH)


@needs_audit
def test_a_symbol_newer_than_the_oldest_torch_is_caught():
    (found,) = abi.audit_problems(LIBRARY_FOLDER / "libvtk_cpu.so", (2, 9))
    assert found.startswith("torch-abi-audit: needs torch 2.10.0 for torch_")


def compile_library(target: Path, source: str | Path, *flags: str) -> Path:
    compiler = os.environ.get("CXX", "c++")
    subprocess.run([compiler, "-shared", "-fPIC", *flags, "-o", target, source], check=True)
    return target


@pytest.fixture(scope="module")
def unstable(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unstable")
    compile_library(folder / "libcudart.so.13", os.devnull, "-xc++", "-Wl,-soname,libcudart.so.13")
    flags = ("-Wl,--no-as-needed", str(folder / "libcudart.so.13"), "-Wl,-rpath,/home/somebody/build")
    return compile_library(folder / "libunstable.so", UNSTABLE, *flags)


def test_planted_symbols_are_named(unstable):
    found = abi.symbol_problems(unstable)
    assert "undefined symbol outside the stable ABI: at::get_num_threads()" in found
    assert "undefined symbol outside the stable ABI: Py_IsInitialized" in found
    assert "aoti_torch_get_current_cuda_stream must be weak" in found
    assert len(found) == 3


def test_planted_dependency_and_path_are_named(unstable):
    found = abi.linkage_problems(unstable)
    assert "needs libcudart.so.13" in found
    assert "does not need libtorch_cpu.so: torch's symbols stay unresolved" in found
    assert any("/home/somebody/build: a path of the build machine" in problem for problem in found)


@needs_audit
def test_torch_abi_audit_names_the_planted_symbol(unstable):
    assert any("at::get_num_threads" in problem for problem in abi.audit_problems(unstable, TARGET_TORCH))


INFO = f"vtkernels-0.1.0+{'cu130' if CUDA else 'cpu'}.dist-info"


@pytest.fixture
def files() -> dict[str, bytes]:
    """A wheel as it should be: name -> bytes."""
    contents = {name: b"" for name in wheel.expected(INFO, CUDA)}
    contents |= {name: (wheel.PACKAGE.parent / name).read_bytes() for name in wheel.libraries(CUDA)}
    return contents | {f"{INFO}/WHEEL": f"Root-Is-Purelib: false\nTag: {wheel.TAG}\n".encode()}


def pack(folder: Path, files: dict[str, bytes], tag: str = wheel.TAG) -> Path:
    path = folder / f"{INFO.removesuffix('.dist-info')}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def test_a_proper_wheel_passes(tmp_path, files):
    assert not wheel.problems(pack(tmp_path, files))


@pytest.mark.parametrize(
    "intruder",
    [
        "vtkernels/lib/libvtk_simt.so",
        "vtkernels/lib/simt_native.so",
        "tests/conftest.py",
        "csrc/common/check.h",
        "vtkernels/ops/__pycache__/select.cpython-311.pyc",
    ],
)
def test_what_does_not_belong_is_named(tmp_path, files, intruder):
    assert wheel.problems(pack(tmp_path, files | {intruder: b""})) == [f"does not belong: {intruder}"]


@pytest.mark.parametrize("name", ["vtkernels/lib/libvtk_cpu.so", "vtkernels/py.typed", f"{INFO}/licenses/LICENSE"])
def test_what_is_missing_is_named(tmp_path, files, name):
    del files[name]
    assert wheel.problems(pack(tmp_path, files)) == [f"missing: {name}"]


def test_a_wrong_tag_is_named(tmp_path, files):
    (found,) = wheel.problems(pack(tmp_path, files, "cp311-cp311-linux_x86_64"))
    assert "the tag is not py3-none-linux" in found


def test_a_library_is_checked_inside_the_wheel(tmp_path, files, unstable):
    found = wheel.problems(pack(tmp_path, files | {"vtkernels/lib/libvtk_cpu.so": unstable.read_bytes()}))
    assert "vtkernels/lib/libvtk_cpu.so: undefined symbol outside the stable ABI: at::get_num_threads()" in found


def test_a_wheel_that_grew_is_named(tmp_path, files, monkeypatch):
    monkeypatch.setattr(wheel, "MAX_BYTES", 1 << 10)
    (found,) = wheel.problems(pack(tmp_path, files))
    assert found.endswith("MiB, at most 0")
