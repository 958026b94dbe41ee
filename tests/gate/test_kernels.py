"""The gate over libvtk_cuda.so, and the gate itself: everything it must catch is planted here."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from . import __main__ as command
from . import ptxas
from .kernels import HOT, KERNELS, Allowed

ROOT = Path(__file__).parents[2]
PLANTED = Path(__file__).parent / "planted" / "kernels.cu"
PLANTED_SOURCE = PLANTED.relative_to(ROOT).as_posix()
PLANTED_CLASSES = {PLANTED_SOURCE: {"planted_spill": HOT, "planted_stack": HOT}}
NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(not NVCC, reason="no nvcc on this machine")
needs_library = pytest.mark.skipif(not command.LIBRARY.exists(), reason="libvtk_cuda.so is not built: no nvcc")


@needs_library
def test_every_kernel_keeps_its_rules():
    assert not ptxas.problems(ptxas.read(command.LIBRARY), KERNELS)


@needs_library
def test_every_cuda_source_is_in_the_library():
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.cu")}
    assert sources == set(ptxas.read(command.LIBRARY).seconds)


def test_the_published_table_names_every_kernel():
    published = {line.split(" | ")[0].removeprefix("| ") for line in command.PAGE.read_text().splitlines()[6:]}
    published -= {"kernel", "---"}
    assert published == {name for names in KERNELS.values() for name in names}, "python -m tests.gate kernels --write"


def compile_planted(folder: Path, *flags: str) -> Path:
    """Through the launcher, as the build does."""
    target = folder / "planted.o"
    launcher = [sys.executable, ROOT / "cmake" / "keep_ptxas.py", "objcopy", "planted"]
    architectures = [f"-gencode=arch=compute_{a[3:]},code={a}" for a in ptxas.ARCHITECTURES]
    nvcc = [NVCC, "-Xptxas=-v", *architectures, *flags, "-x", "cu", "-c", PLANTED, "-o", target]
    subprocess.run(list(map(str, launcher + nvcc)), check=True)
    return target


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> ptxas.Report:
    return ptxas.read(compile_planted(tmp_path_factory.mktemp("planted"), "-DVTK_PLANTED"))


@needs_nvcc
@pytest.mark.parametrize("architecture", ptxas.ARCHITECTURES)
@pytest.mark.parametrize(
    ("kernel", "what"),
    [("planted_spill", "spill stores"), ("planted_spill", "spill loads"), ("planted_stack", "stack frame")],
)
def test_a_planted_fault_is_named_with_its_figure(planted, kernel, what, architecture):
    attribute = {"stack frame": "stack"}.get(what, what.replace(" ", "_"))
    (usage,) = (u for u in planted.usages if kernel in u.symbol and u.architecture == architecture)
    assert getattr(usage, attribute) > 0
    expected = f"{kernel} on {architecture} ({PLANTED_SOURCE}): {getattr(usage, attribute)} bytes {what}, at most 0"
    assert any(problem.startswith(expected) for problem in ptxas.problems(planted, PLANTED_CLASSES))


@needs_nvcc
def test_the_clean_twin_passes(tmp_path):
    report = ptxas.read(compile_planted(tmp_path))
    assert len(report.kernels) == 2 and len(report.usages) == 4
    assert not ptxas.problems(report, PLANTED_CLASSES)


@needs_nvcc
def test_an_object_built_without_the_launcher_is_caught(tmp_path):
    target = tmp_path / "planted.o"
    subprocess.run([NVCC, "-arch=sm_80", "-c", PLANTED, "-o", target], check=True)
    found = ptxas.problems(ptxas.read(target), PLANTED_CLASSES)
    for kernel in ("planted_spill", "planted_stack"):
        for architecture in ptxas.ARCHITECTURES:
            assert f"{kernel}: no ptxas report for {architecture}" in found


@needs_nvcc
def test_a_compiler_error_is_an_error(tmp_path):
    with pytest.raises(subprocess.CalledProcessError):
        compile_planted(tmp_path, "-include", "no_such_header.h")


LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z6kernelIfEvPT_' for '{architecture}'
ptxas info    : Function properties for _Z6kernelIfEvPT_
    {stack} bytes stack frame, {spill} bytes spill stores, {spill} bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 1040 bytes smem, 376 bytes cmem[0], 8 bytes cmem[2]
ptxas info    : Function properties for _Z6calledf
    {called} bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Compile time = 1.000 ms
"""
CLASSES = {"a.cu": {"kernel": HOT, "called": HOT}}


def report(stack=0, spill=0, called=0) -> ptxas.Report:
    logs = (LOG.format(architecture=a, stack=stack, spill=spill, called=called) for a in ptxas.ARCHITECTURES)
    usages = [usage for log in logs for usage in ptxas.parse("a.cu", log)]
    return ptxas.Report(usages, {"a.cu": 5.0}, "13.0", frozenset({"_Z6kernelIfEvPT_"}))


def test_the_table():
    assert ptxas.rows(report()) == [
        ("called", "sm_80", "1", "0", "0", "0", "0", "0"),
        ("called", "sm_90a", "1", "0", "0", "0", "0", "0"),
        ("kernel", "sm_80", "1", "40", "1040", "0", "0", "0"),
        ("kernel", "sm_90a", "1", "40", "1040", "0", "0", "0"),
    ]
    assert ptxas.rows(report(), every_instance=True)[-1][0] == "kernel<float>"
    assert not ptxas.problems(report(), CLASSES)


def test_a_function_that_is_not_inlined_keeps_the_rules_too():
    assert any("called on sm_90a (a.cu): 16 bytes stack frame" in p for p in ptxas.problems(report(called=16), CLASSES))


def test_an_exception_has_a_limit():
    classes = {"a.cu": {"kernel": Allowed(stack=32, spill=8, reason="cold"), "called": HOT}}
    assert not ptxas.problems(report(stack=32, spill=8), classes)
    assert len(ptxas.problems(report(stack=40, spill=8), classes)) == len(ptxas.ARCHITECTURES)


def test_a_kernel_without_a_class_and_a_class_without_a_kernel_are_caught():
    found = ptxas.problems(report(), {"a.cu": {"kernel": HOT, "gone": HOT}})
    assert any(p.startswith("called on sm_80 (a.cu): not classed") for p in found)
    assert any(p.startswith("gone (a.cu): classed in tests/gate/kernels.py but not") for p in found)


def test_a_missing_architecture_is_caught():
    whole = report()
    half = dataclasses.replace(whole, usages=[u for u in whole.usages if u.architecture == "sm_80"])
    assert ptxas.problems(half, CLASSES) == ["kernel<float>: no ptxas report for sm_90a"]


def test_a_slow_source_is_caught():
    slow = dataclasses.replace(report(), seconds={"a.cu": 105.0})
    assert ptxas.problems(slow, CLASSES) == ["a.cu: 105 s to compile, at most 90; split it or drop instances"]


def test_an_exception_says_why():
    assert all(a is HOT or a.reason for names in KERNELS.values() for a in names.values())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "void vtk::(anonymous namespace)::scores_kernel<float, (int)8>(vtk::Params, int)",
            "scores_kernel<float, (int)8>",
        ),
        ("void f<a::B<c::D> >(a::B<c::D>)", "f<a::B<c::D> >"),
        ("kernel(float*)", "kernel"),
    ],
)
def test_short_names(name, expected):
    assert ptxas.short(name) == expected
