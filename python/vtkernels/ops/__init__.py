"""One module a family: the public function, its docstring, its fake (meta) kernel and its autograd.

``PUBLIC`` maps every registered overload to its public function; tests/test_registry.py holds it to that.
"""

from vtkernels.ops import attention, merge, score, select

PUBLIC = {
    "attention_scores": score.attention_scores,
    "prune_gather": select.prune_gather,
    "prune_gather.attention": select.prune_gather_attention,
    "prune_gather.varlen": select.prune_gather_varlen,
    "prune_gather.tensors": select.prune_gather_tensors,
    "select_diverse": select.select_diverse,
    "select_cover": select.select_cover,
    "block_sparse_attention": attention.block_sparse_attention,
    "bipartite_match": merge.bipartite_match,
    "merge_apply": merge.merge_apply,
    "unmerge": merge.unmerge,
    "bipartite_merge": merge.bipartite_merge,
}
