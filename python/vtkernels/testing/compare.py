"""Tolerances that come from arithmetic, not from what passes."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_close(out: Tensor, reference: Tensor, native: Tensor, absolute: float = 1e-6) -> None:
    """The error of ``out`` is at most twice that of plain torch at the same dtype.

    ``max|out - reference| <= 2 max|native - reference| + absolute`` with ``reference`` in float64 and ``native`` the
    same formula in torch at the dtype of the inputs. NaN and infinity must stand in the same places. The rule is
    FlashAttention's.
    """
    assert out.shape == reference.shape, f"shape {tuple(out.shape)}, expected {tuple(reference.shape)}"
    out, native, reference = out.double().cpu(), native.double().cpu(), reference.double().cpu()
    finite = torch.isfinite(reference)
    assert torch.equal(torch.isfinite(out), finite), "NaN or infinity in other places than in the reference"
    error = (out - reference)[finite].abs().max().item() if finite.any() else 0.0
    native_error = (native - reference)[finite & torch.isfinite(native)].abs()
    allowed = 2 * (native_error.max().item() if native_error.numel() else 0.0) + absolute
    assert error <= allowed, f"error {error:.3e} above {allowed:.3e} (twice plain torch's, plus {absolute:.0e})"


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    """Bitwise equality, NaN included."""
    assert a.dtype == b.dtype and a.shape == b.shape, f"{a.dtype} {tuple(a.shape)} against {b.dtype} {tuple(b.shape)}"
    different = (a.contiguous().view(torch.uint8) != b.contiguous().view(torch.uint8)).flatten()
    assert not different.any(), f"{int(different.sum())} bytes differ, the first at {int(different.nonzero()[0])}"
