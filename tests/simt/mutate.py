"""Breaks a CUDA source in one place at a time and asks whether the op's own tests notice.

    python -m tests.simt.mutate select/prune_gather device/radix_select.cuh --tests tests/test_prune_gather.py

Each barrier is removed and each loop bound and guard `a < b` widened to `a <= b`; the emulation is rebuilt with that
mutant and the tests run on the simt backend until the first failure. Prints one line a mutant and the survivors.
The build folder must hold an up-to-date build with VTK_SIMT=ON.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
BARRIER = re.compile(r"__syncthreads\(\);|__syncwarp\(\);")
BOUND = re.compile(r"(?<= )<(?= [\w(])")


def mutants(text: str):
    """(line number, what changed, mutated text) for code lines, comments left alone."""
    lines = text.split("\n")
    for number, line in enumerate(lines):
        code = line.split("//")[0]
        for pattern, replacement in ((BARRIER, ""), (BOUND, "<=")):
            for match in pattern.finditer(code):
                changed = line[: match.start()] + replacement + line[match.end() :]
                yield (
                    number + 1,
                    changed.strip() or f"removed {match[0]}",
                    "\n".join([*lines[:number], changed, *lines[number + 1 :]]),
                )


def build(kernel: str, tree: Path, build_folder: Path, out: Path) -> bool:
    """Links libvtk_simt.so with the kernel of `tree` in place of the built one."""
    commands = subprocess.check_output(
        ["ninja", "-C", build_folder, "-t", "commands", "vtk_simt"], text=True
    ).splitlines()
    source = f"simt/csrc/{kernel}.cu.cpp"
    compile_command = next(c for c in commands if f"{source} " in c + " " and " -c " in c)
    object_file = re.search(r" -o (\S+)", compile_command)[1]
    mutated = out.with_suffix(".o")
    command = compile_command.replace(f"-I{ROOT}/csrc", f"-I{tree}/csrc").split(" -c ")[0]
    command = re.sub(r" -M\S+( \S+\.(d|o))?", "", command).split(" -o ")[0]
    command += f" -w -x c++ -c {tree}/csrc/{kernel}.cu -o {mutated}"
    if subprocess.run(command, shell=True, cwd=build_folder, capture_output=True).returncode:
        return False
    link = next(c for c in commands if "-shared" in c and " -o libvtk_simt.so" in c)
    link = link.replace(object_file, str(mutated)).replace("-o libvtk_simt.so", f"-o {out}")
    subprocess.run(link, shell=True, cwd=build_folder, check=True, capture_output=True)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernel", help="family/op")
    parser.add_argument("sources", nargs="*", help="files under csrc to mutate; default the kernel itself")
    parser.add_argument("--tests", nargs="+", required=True)
    parser.add_argument("--select", default="simt", help="pytest -k")
    parser.add_argument("--build", type=Path, default=ROOT / "build/dev")
    options = parser.parse_args()
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        shutil.copytree(ROOT / "csrc", tree / "csrc")
        shutil.copytree(ROOT / "python", tree / "python")
        environment = os.environ | {"PYTHONPATH": f"{tree / 'python'}:{ROOT}"}
        test = [sys.executable, "-m", "pytest", "-xq", "-k", options.select, *options.tests]
        for source in options.sources or [f"{options.kernel}.cu"]:
            path = tree / "csrc" / source
            original = path.read_text()
            for line, change, text in mutants(original):
                path.write_text(text)
                if build(options.kernel, tree, options.build, tree / "python/vtkernels/lib/libvtk_simt.so"):
                    run = subprocess.run(test, cwd=ROOT, env=environment, capture_output=True, text=True)
                    reason = next((o for o in run.stdout.splitlines() if o.startswith("E  ")), "E")[1:].strip()[:150]
                    verdict = "survived" if run.returncode == 0 else f"caught: {reason}"
                else:
                    verdict = "does not compile"
                print(f"{source}:{line}: {change}\n    {verdict}", flush=True)
                if verdict == "survived":
                    survivors.append(f"{source}:{line}: {change}")
            path.write_text(original)
    print(f"{len(survivors)} survived", *survivors, sep="\n  ")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
