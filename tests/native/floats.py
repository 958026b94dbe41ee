"""16-bit floats as numpy sees them: their bits."""

from __future__ import annotations

import numpy as np

EVERY_BITS = np.arange(1 << 16, dtype=np.uint16)


def to_float32(bits: np.ndarray, bfloat16: bool) -> np.ndarray:
    if bfloat16:
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(np.float16).astype(np.float32)
