"""What a GPU machine without a network needs: the libraries as built here, pure packages, and which commit this is."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from bench.checkout import ROOT, UNKNOWN, commit

PACK = ROOT / ".gpu"
SITE, MANIFEST = PACK / "site", PACK / "manifest.json"
LIBRARIES = [ROOT / "python" / "vtkernels" / "lib" / f"libvtk_{name}.so" for name in ("cpu", "cuda")]
PACKAGES = ("pytest", "hypothesis", "typer")  # numpy, torch and Triton are what the machine has
SOURCES = (".py", ".cu", ".cuh", ".h", ".cpp")


def source_digest() -> str:
    """One hash over every source file: it says on the other machine whether the checkout is the one packed."""
    total = hashlib.sha256()
    for folder in ("bench", "csrc", "python", "tests"):
        for path in sorted(p for p in (ROOT / folder).rglob("*") if p.suffix in SOURCES):
            total.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return total.hexdigest()


def library_digests() -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in LIBRARIES if path.exists()}


def identify() -> str:
    """The commit under test, "+changes-<digest>" when the sources are not exactly its sources.

    Raises:
        RuntimeError: no git here, and no manifest that fits the libraries.
    """
    here, digest = commit(), source_digest()
    if here != UNKNOWN:
        return f"{here}-{digest[:8]}" if here.endswith("+changes") else here
    if not MANIFEST.exists():
        raise RuntimeError("no git here and no .gpu/manifest.json: carry what `python -m bench.gpu pack` made")
    manifest = json.loads(MANIFEST.read_text())
    if manifest["libraries"] != library_digests():
        raise RuntimeError("the libraries are not those of .gpu/manifest.json: run `python -m bench.gpu pack` again")
    base = manifest["commit"].removesuffix("+changes")
    same = manifest["sources"] == digest and base == manifest["commit"]
    return base if same else f"{base}+changes-{digest[:8]}"


def pack(python: str) -> list[str]:
    """Fills .gpu/ for that Python version; returns the paths to carry, relative to the checkout."""
    missing = [path.name for path in LIBRARIES if not path.exists()]
    if missing:
        raise RuntimeError(f"not built: {', '.join(missing)}")
    pinned = [f"{name}=={importlib.metadata.version(name)}" for name in PACKAGES]
    shutil.rmtree(PACK, ignore_errors=True)
    with tempfile.TemporaryDirectory() as wheels:
        # NOTE: downloaded, not copied from here: hypothesis has a compiled part for each Python.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", "--dest", wheels]
        target = ["--python-version", python, "--implementation", "cp", "--platform", "manylinux2014_x86_64"]
        subprocess.run([*command, *target, *pinned], check=True)
        for wheel in sorted(Path(wheels).glob("*.whl")):
            zipfile.ZipFile(wheel).extractall(SITE)
    facts = {"commit": commit(), "sources": source_digest(), "libraries": library_digests(), "packages": pinned}
    MANIFEST.write_text(json.dumps(facts | {"python": python}, indent=1) + "\n")
    return [str(path.relative_to(ROOT)) for path in (*LIBRARIES, PACK)]
