"""Speculative decoding: draft trees in all their encodings, and who drafts."""
