from __future__ import annotations

import torch

from vtkernels.testing.cases import Case


def _tensors(random: torch.Generator, dtype: torch.dtype, rows: int, keys: int, heads: int, key_heads: int):
    shapes = [(rows, heads), (keys, key_heads), (keys, key_heads)]
    made = [torch.randn(2, n, h * 24, generator=random).to(dtype) for n, h in shapes]
    return [x.unflatten(-1, (-1, 24)).transpose(1, 2) for x in made]


def _streaming(random: torch.Generator, dtype: torch.dtype):
    return (*_tensors(random, dtype, 70, 90, 2, 1), torch.tensor([[4, 20, 1, 0, 0]], dtype=torch.int32)), {}


def _everything(random: torch.Generator, dtype: torch.dtype):
    rule = torch.tensor([[0, 1, 64, 2, 0], [0, 1, 64, 2, 1], [3, 2, 10, 0, 0], [70, 9, 1, 0, 0]], dtype=torch.int32)
    options = {"key_bias": torch.randn(2, 200, generator=random), "scale": 0.1}
    options |= {"starts_k": torch.tensor([0, 7], dtype=torch.int32)}
    options |= {"seqlens_k": torch.tensor([200, 150], dtype=torch.int32)}
    return (*_tensors(random, dtype, 20, 200, 4, 2), rule), options


def _decoding(random: torch.Generator, dtype: torch.dtype):
    return (*_tensors(random, dtype, 1, 200, 4, 1), torch.tensor([[64, 1, 64, 0, 0]], dtype=torch.int32)), {}


CASES = [
    Case("rule_attention", "sink and window, strided heads", _streaming),
    Case("rule_attention", "strided blocks, chunks, bias, starts, lengths", _everything),
    Case("rule_attention", "one query", _decoding),
]
