"""Visual Token Kernels: score, prune and gather the visual tokens of a vision-language model.

The ops live in ``torch.ops.vtk``; this package loads them, documents them, and composes them into the
published pruning methods on Hugging Face models (:mod:`vtkernels.zoo`).
"""

from vtkernels import _library
from vtkernels.ops.score import attention_scores
from vtkernels.ops.select import (
    prune_gather,
    prune_gather_attention,
    prune_gather_tensors,
    prune_gather_varlen,
    select_cover,
    select_diverse,
)

__version__ = _library.VERSION

__all__ = [
    "attention_scores",
    "prune_gather",
    "prune_gather_attention",
    "prune_gather_tensors",
    "prune_gather_varlen",
    "select_cover",
    "select_diverse",
]
