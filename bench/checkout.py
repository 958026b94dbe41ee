"""Which commit is under test. No torch here: the GPU run asks before anything heavy is imported."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
UNKNOWN = "unknown"


def commit() -> str:
    """The commit of the checkout, "+changes" when its sources differ (records of runs and pages are no sources)."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--", ".", ":!bench/results", ":!docs")
        return git("rev-parse", "HEAD") + ("+changes" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN
