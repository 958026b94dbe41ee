"""A thin driver of CMake: compiles csrc/ into python/vtkernels/lib and tags the wheel. See pyproject.toml for the rest.

CMAKE_ARGS adds arguments to the configure step, for example ``CMAKE_ARGS=-DVTK_CUDA=OFF pip install .``.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
VERSION = re.search(r'VERSION = "(.+)"', (ROOT / "python/vtkernels/_version.py").read_text())[1]
CMAKE_ARGS = shlex.split(os.environ.get("CMAKE_ARGS", ""))


def cuda_version() -> str | None:
    """The nvcc that CMake will find, as "13.0"; None when there is none or CUDA is switched off."""
    if "-DVTK_CUDA=OFF" in CMAKE_ARGS:
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = os.environ.get("CUDACXX") or (home and str(Path(home, "bin", "nvcc"))) or shutil.which("nvcc")
    if not nvcc or not shutil.which(nvcc):
        return None
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", text)[1]


CUDA = cuda_version()


class CMakeBuild(build_ext):
    """Builds both op libraries; an editable build puts them next to the sources."""

    def run(self) -> None:
        package = (
            ROOT / "python" / "vtkernels" if self.editable_mode or self.inplace else Path(self.build_lib, "vtkernels")
        )
        folder = ROOT / "build" / ("cuda" if CUDA else "cpu")
        what = f"nvcc {CUDA}: CPU and CUDA libraries" if CUDA else "no nvcc: the CPU library only"
        print(f"vtkernels {VERSION}: {what}", file=sys.stderr, flush=True)
        configure = ["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
        # Said each time: the build folder remembers what an earlier build for the tests was given.
        configure += ["-DVTK_SIMT=OFF", "-DVTK_SANITIZE=OFF", f"-DVTK_CUDA={'ON' if CUDA else 'OFF'}", *CMAKE_ARGS]
        subprocess.run(list(map(str, configure)), check=True)
        subprocess.run(["cmake", "--build", str(folder)], check=True)
        subprocess.run(["cmake", "--install", str(folder), "--prefix", str(package.resolve())], check=True)

    def get_outputs(self) -> list[str]:
        return []  # the libraries are package files, not extension modules


class PlatformWheel(bdist_wheel):
    """The libraries use no Python C API at all: one wheel for every Python 3, for one platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    version=VERSION + (f"+cu{CUDA.replace('.', '')}" if CUDA else "+cpu"),
    ext_modules=[Extension("vtkernels.lib", sources=[])],  # makes setuptools run build_ext and tag the platform
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
