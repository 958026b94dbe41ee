"""Visual Token Kernels: score, prune, merge and gather the visual tokens of a vision-language model.

The ops live in ``torch.ops.vtk``; this package loads them, documents them, and composes them into the
published pruning methods on Hugging Face models (:mod:`vtkernels.zoo`).
"""

from vtkernels import _library  # noqa: F401  (loads the ops)
from vtkernels._version import VERSION as __version__
from vtkernels.ops.attention import block_sparse_attention
from vtkernels.ops.merge import bipartite_match, bipartite_merge, merge_apply, unmerge
from vtkernels.ops.score import attention_scores
from vtkernels.ops.select import (
    prune_gather,
    prune_gather_attention,
    prune_gather_tensors,
    prune_gather_varlen,
    select_cover,
    select_diverse,
)

__all__ = [
    "__version__",
    "attention_scores",
    "bipartite_match",
    "bipartite_merge",
    "block_sparse_attention",
    "merge_apply",
    "prune_gather",
    "prune_gather_attention",
    "prune_gather_tensors",
    "prune_gather_varlen",
    "select_cover",
    "select_diverse",
    "unmerge",
]
