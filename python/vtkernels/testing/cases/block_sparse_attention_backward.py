from __future__ import annotations

import torch

from vtkernels.testing.cases import Case
from vtkernels.testing.cases import block_sparse_attention as forward


def _case(of: Case) -> Case:
    def make(random: torch.Generator, dtype: torch.dtype):
        (query, key, value, *lists), options = of.make(random, dtype)
        out, lse = torch.ops.vtk.block_sparse_attention(query, key, value, *lists, **options)
        grad_out = torch.randn(out.shape, generator=random).to(dtype)
        options["grad_lse"] = torch.randn(lse.shape, generator=random)
        return (grad_out, query, key, value, out, lse, *lists), options

    return Case("block_sparse_attention_backward", of.name, make)


CASES = [_case(of) for of in forward.CASES]
