"""Compiler launcher of nvcc: keeps what ptxas says about a .cu inside the object made of it.

    keep_ptxas.py OBJCOPY NVCC_VERSION nvcc ... -c source.cu -o object

The report becomes one line of JSON in the section .vtk.ptxas. The linker joins the sections of all objects, so a
library carries the report of exactly the code that is in it, however it was built; nothing of it is loaded at run time.
tests/gate reads it. Only Python's standard library: every build runs this, a user's as well.
"""

import json
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECTION = ".vtk.ptxas"
# A line of -v, or the indented figures below one; a numbered remark, "ptxas info : (C7510) ...", is for the reader.
FIGURES = re.compile(r"ptxas info\s+: (?!\(C)|\s+\d+ bytes stack frame")


def split(output: str) -> tuple[str, str]:
    """(what ptxas reports of its kernels, everything else): the first is kept, the second is for the reader."""
    report, rest = [], []
    for line in output.splitlines(keepends=True):
        (report if FIGURES.match(line) else rest).append(line)
    return "".join(report), "".join(rest)


def main(objcopy: str, nvcc_version: str, *command: str) -> int:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    # CPU time, not elapsed time: a busy machine must not look like a slow kernel file.
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    report, rest = split(done.stdout)
    sys.stderr.write(rest)
    if done.returncode:
        return done.returncode
    source = Path(command[command.index("-c") + 1]).resolve()
    record = {
        "source": source.relative_to(ROOT).as_posix() if source.is_relative_to(ROOT) else source.name,
        "nvcc": nvcc_version,
        "seconds": round(used.ru_utime + used.ru_stime, 1),
        "ptxas": report,
    }
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        target = command[command.index("-o") + 1]
        return subprocess.run([objcopy, "--add-section", f"{SECTION}={file.name}", target]).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
