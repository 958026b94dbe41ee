from __future__ import annotations

from collections.abc import Callable

import torch

from vtkernels.testing.cases import Case

BATCH, NODES, VOCAB = 3, 6, 70


def _call(mode: str, **given: bool) -> Callable[[torch.Generator, torch.dtype], tuple[tuple, dict]]:
    def make(random: torch.Generator, dtype: torch.dtype):
        logits = torch.randn(NODES, BATCH, VOCAB + 3, generator=random).to(dtype).transpose(0, 1)[:, :, :VOCAB]
        tokens = torch.randint(-1, VOCAB, (BATCH, NODES), generator=random)
        tokens[:, 1:3] = logits.argmax(-1)[:, :1]
        chain = torch.arange(-1, NODES - 1, dtype=torch.int32)
        tree = torch.tensor([-1, 0, 0, 1, 1, 2], dtype=torch.int32)
        options: dict[str, object] = {"mode": mode}
        if mode != "greedy":
            options["seeds"] = torch.arange(BATCH)
            options["temperature"] = torch.tensor([1.0, 0.0, 0.6])
        if given.get("draft"):
            options["draft_logits"] = torch.randn(BATCH, NODES - 1, VOCAB, generator=random).to(dtype)
        if given.get("filters"):
            options["top_k"] = torch.tensor([20, 0, 5], dtype=torch.int32)
            options["top_p"] = torch.tensor([0.9, 0.5, 1.0])
            options["min_p"] = torch.tensor([0.0, 0.1, 0.01])
        if given.get("ragged"):
            options["num_nodes"] = torch.tensor([0, 1, 5], dtype=torch.int32)
            options["depth"] = 2
        if mode == "relaxed":
            options["neighbors"] = torch.randint(VOCAB, (VOCAB, 8), generator=random, dtype=torch.int32)
        return (logits, tokens, (chain if mode == "block" else tree).expand(BATCH, NODES)), options

    return make


CASES = [
    Case("verify_draft", "greedy, ragged", _call("greedy", ragged=True)),
    Case("verify_draft", "sample, filters", _call("sample", filters=True)),
    Case("verify_draft", "sample, drawn", _call("sample", draft=True)),
    Case("verify_draft", "block, drawn", _call("block", draft=True)),
    Case("verify_draft", "typical", _call("typical", ragged=True)),
    Case("verify_draft", "relaxed", _call("relaxed")),
]
