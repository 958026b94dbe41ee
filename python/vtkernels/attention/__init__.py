"""Attention over listed key blocks or by a rule: the lists, the rules, and attention implementations for transformers.

Importing this module registers ``"vtk"`` and ``"vtk_sparse"`` with transformers, where that is installed::

    import vtkernels.attention
    model.set_attn_implementation("vtk")
"""

import importlib.util

from vtkernels.attention.lists import (
    BlockLists,
    dense,
    from_block_mask,
    from_blocks,
    from_bsr,
    from_mask,
    to_block_mask,
)
from vtkernels.attention.rules import Rule

__all__ = ["BlockLists", "Rule", "dense", "from_block_mask", "from_blocks", "from_bsr", "from_mask", "to_block_mask"]

if importlib.util.find_spec("transformers") is not None:
    from vtkernels.attention.implementations import draft_tree, register, sparse
    from vtkernels.attention.recording import Pass, recording

    __all__ += ["Pass", "draft_tree", "recording", "register", "sparse"]
    register()
