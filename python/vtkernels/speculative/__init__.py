"""Speculative decoding: draft trees in all their encodings, and who drafts."""

from vtkernels.speculative.drafts import ChainDraft, Draft, PromptLookup, Proposal, Sampling, TreeDraft

__all__ = ["ChainDraft", "Draft", "PromptLookup", "Proposal", "Sampling", "TreeDraft"]
