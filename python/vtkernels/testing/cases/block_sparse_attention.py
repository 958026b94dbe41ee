from __future__ import annotations

import torch

from vtkernels.testing.cases import Case


def _tensors(random: torch.Generator, dtype: torch.dtype, rows: int, keys: int, heads: int, key_heads: int):
    shapes = [(rows, heads), (keys, key_heads), (keys, key_heads)]
    made = [torch.randn(2, n, h * 24, generator=random).to(dtype) for n, h in shapes]
    return [x.unflatten(-1, (-1, 24)).transpose(1, 2) for x in made]


def _blocks(random: torch.Generator, dtype: torch.dtype):
    counts = torch.tensor([[[2, 1]]], dtype=torch.int32)
    indices = torch.tensor([[[[1, 0], [1, 0]]]], dtype=torch.int32)
    options = {"block_q": 64, "block_k": 64, "causal": True}
    return (*_tensors(random, dtype, 70, 90, 2, 1), counts, indices), options


def _everything(random: torch.Generator, dtype: torch.dtype):
    counts = torch.randint(0, 3, (2, 4, 1), generator=random, dtype=torch.int32)
    indices = torch.randint(0, 90, (2, 4, 1, 2), generator=random, dtype=torch.int32)
    columns = torch.randint(0, 90, (1, 4, 1, 9), generator=random, dtype=torch.int32)
    options = {"token_offsets": True, "full_counts": counts[:1], "full_indices": indices[:1]}
    options |= {"column_counts": torch.full((1, 1, 1), 9, dtype=torch.int32), "column_indices": columns}
    options |= {"key_bias": torch.randn(2, 90, generator=random), "scale": 0.1, "block_k": 64}
    options |= {"seqlens_k": torch.tensor([90, 40], dtype=torch.int32)}
    return (*_tensors(random, dtype, 20, 90, 4, 2), counts, indices), options


def _decoding(random: torch.Generator, dtype: torch.dtype):
    counts, indices = torch.full((1, 1, 1), 2, dtype=torch.int32), torch.arange(2, dtype=torch.int32).view(1, 1, 1, 2)
    return (*_tensors(random, dtype, 1, 200, 4, 1), counts, indices), {"causal": True}


CASES = [
    Case("block_sparse_attention", "blocks, causal, strided heads", _blocks),
    Case("block_sparse_attention", "unaligned blocks, columns, bias, lengths", _everything),
    Case("block_sparse_attention", "one query", _decoding),
]
