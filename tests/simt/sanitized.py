"""Runs Python with the runtimes of ASan and UBSan, which must be there before Python is.

python -m tests.simt.sanitized -m tests.simt.fuzz cpu block_sparse_attention 0 50
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simt import emulator

ROOT = Path(__file__).parents[2]
BUILT = pytest.mark.skipif(not emulator.OPS_ASAN.exists(), reason="not built (cmake -DVTK_SANITIZE=ON)")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    ask = [["g++", f"-print-file-name=lib{name}.so"] for name in ("asan", "ubsan")]
    environment = os.environ | environment
    environment |= {
        "LD_PRELOAD": " ".join(subprocess.check_output(command, text=True).strip() for command in ask),
        "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0:detect_stack_use_after_return=0",
        "PYTHONPATH": f"{ROOT / 'python'}:{ROOT}",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)


if __name__ == "__main__":
    done = run(*sys.argv[1:])
    print(done.stdout[-2000:], done.stderr[-8000:])
    sys.exit(done.returncode)
