"""What a bug report needs: ``python -m vtkernels.collect_env`` or ``vtk env``."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import sys

import torch

from vtkernels import _library


def collect() -> dict[str, str]:
    """Versions, processor, instruction set, GPU and the op libraries, as text."""
    libraries = _library.LIBRARIES
    target = ".".join(map(str, _library.TARGET_TORCH))
    facts = {
        "vtkernels": _version("vtkernels"),
        "python": f"{sys.version.split()[0]} on {platform.platform()}",
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "instruction set": f"{_library.cpu_isa()} (threads: {torch.get_num_threads()})",
        "GPU": _gpu(),
        "libvtk_cpu": str(libraries.cpu),
        "libvtk_cuda": str(libraries.cuda or f"not loaded: {libraries.cuda_reason}"),
        "stable ABI target": f"torch {target} and later",
    }
    return facts


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none" if torch.version.cuda is None else f"none visible (torch has CUDA {torch.version.cuda})"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} (sm_{major}{minor}, CUDA {torch.version.cuda})"


if __name__ == "__main__":
    for name, value in collect().items():
        print(f"{name}: {value}")
