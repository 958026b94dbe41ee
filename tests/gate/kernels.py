"""Every CUDA kernel by source file, each in its class: HOT (no spill, no stack frame) or Allowed with its reason.

A kernel that is not here fails the gate, and so does an entry whose kernel is gone.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Allowed:
    """The most that a kernel's worst instance may use, in bytes a thread, and why that is all right."""

    stack: int = 0
    spill: int = 0  # stores and loads, each
    reason: str = ""


HOT = Allowed()

KERNELS: dict[str, dict[str, Allowed]] = {
    "csrc/attention/block_sparse_attention.cu": {"attend_kernel": HOT, "merge_parts_kernel": HOT},
    "csrc/attention/block_sparse_attention_backward.cu": {
        "delta_kernel": HOT,
        "mark_kernel": HOT,
        "query_gradient_kernel": HOT,
        "key_gradients_kernel": HOT,
    },
    "csrc/kv/kv_compact.cu": {"kv_compact_kernel": HOT},
    "csrc/kv/kv_pack.cu": {"kv_pack_kernel": HOT},
    "csrc/kv/kv_unpack.cu": {"kv_unpack_kernel": HOT},
    "csrc/kv/packed_attention.cu": {"packed_mma_kernel": HOT, "packed_float_kernel": HOT, "packed_merge_kernel": HOT},
    "csrc/merge/bipartite_match.cu": {"bipartite_match_kernel": HOT},
    "csrc/merge/cluster_dpc_knn.cu": {
        "prepare_kernel": HOT,
        "density_kernel": HOT,
        "delta_kernel": HOT,
        "choose_kernel": HOT,
        "assign_kernel": HOT,
    },
    "csrc/merge/cluster_kmedoids.cu": {"cluster_kmedoids_kernel": HOT},
    "csrc/merge/merge_apply.cu": {"merge_apply_kernel": HOT},
    "csrc/merge/nearest_match.cu": {
        "nearest_prepare_kernel": HOT,
        "nearest_match_kernel": HOT,
        "nearest_finish_kernel": HOT,
    },
    "csrc/merge/temporal_segments.cu": {"temporal_segments_kernel": HOT},
    "csrc/merge/unmerge.cu": {"unmerge_kernel": HOT},
    "csrc/score/attention_scores.cu": {
        "few_logits_kernel": HOT,
        "few_scores_kernel": HOT,
        "normalisers_kernel": HOT,
        "scores_kernel": HOT,
        "finish_kernel": HOT,
    },
    "csrc/score/energy_scores.cu": {"prepare_kernel": HOT, "energy_kernel": HOT, "finish_kernel": HOT},
    "csrc/select/prune_gather.cu": {"prune_gather_kernel": HOT},
    "csrc/select/select_cover.cu": {"select_cover_kernel": HOT},
    "csrc/select/select_diverse.cu": {"select_diverse_kernel": HOT},
    "csrc/speculative/compact_accepted.cu": {"compact_accepted_kernel": HOT},
    "csrc/speculative/sample_stats.cu": {"sample_stats_kernel": HOT},
    "csrc/speculative/verify_draft.cu": {"verify_draft_kernel": HOT},
}
