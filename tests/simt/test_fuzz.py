"""Ops under arguments that nobody should pass, with ASan and UBSan (see fuzz.py)."""

from __future__ import annotations

import pytest

from tests.simt import fuzz, sanitized

CASES = {"cpu": 200, "simt": 80}


@sanitized.BUILT
@pytest.mark.parametrize("op", fuzz.OPS)
@pytest.mark.parametrize("library", ["cpu", pytest.param("simt", marks=pytest.mark.simt)])
def test_garbage_is_refused_or_passed_over(library, op):
    done = sanitized.run("-m", "tests.simt.fuzz", library, op, "0", str(CASES[library]))
    assert done.returncode == 0, done.stdout[-30:] + done.stderr[-4000:]
    assert "clean" in done.stdout
