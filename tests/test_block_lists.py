"""Lists from masks, BSR matrices and FlexAttention's BlockMask, and back."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from vtkernels.attention import lists


def blocks(random, batch=2, heads=3, down=3, across=4):
    return torch.rand(batch, heads, down, across, generator=random) < 0.5


def qkv(random, rows, keys, batch=2, heads=3, depth=16):
    return [torch.randn(batch, heads, n, depth, generator=random) for n in (rows, keys, keys)]


def dense_out(tensors, mask):
    return torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask=mask).nan_to_num(0.0)


def test_blocks_come_back(random):
    chosen = blocks(random)
    made = lists.from_blocks(chosen)
    assert torch.equal(made.blocks(4), chosen)
    assert torch.equal(made.transposed(4).blocks(3), chosen.mT)
    for row, count in zip(made.indices.flatten(0, 2).tolist(), made.counts.flatten().tolist(), strict=True):
        assert row[:count] == sorted(row[:count])


@pytest.mark.parametrize("causal", [False, True])
def test_a_mask_is_what_is_attended(random, causal):
    rows, keys = 150, 230
    mask = blocks(random, down=3, across=4).repeat_interleave(64, 2).repeat_interleave(64, 3)[:, :, :rows, :keys]
    if causal:
        mask = mask & torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)
    made = lists.from_mask(mask, block_q=64, block_k=64, causal=causal)
    tensors = qkv(random, rows, keys)
    torch.testing.assert_close(made.attend(*tensors)[0], dense_out(tensors, mask), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="set whole"):
        lists.from_mask(mask ^ (torch.arange(keys) == 3), block_q=64, block_k=64, causal=causal)


def test_all_blocks(random):
    tensors = qkv(random, 100, 300)
    out, _ = lists.dense(100, 300, causal=True).attend(*tensors)
    mask = torch.ones(100, 300, dtype=torch.bool).tril(200)
    torch.testing.assert_close(out, dense_out(tensors, mask), rtol=1e-4, atol=1e-5)


def test_block_sparse_rows(random):
    chosen = blocks(random, batch=1)
    one = chosen[0, 0].nonzero()[:, 1]
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), chosen[0, 0].sum(-1).cumsum(0)])
    assert torch.equal(lists.from_bsr(indptr, one).blocks(4), chosen[:, :1])
    every = chosen[0].nonzero()[:, 2]
    ends = chosen[0].sum(-1).flatten().cumsum(0).view(3, 3)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), ends.flatten()[:-1]]).view(3, 3)
    indptr = torch.cat([starts, ends[:, -1:]], 1)
    assert torch.equal(lists.from_bsr(indptr, every).blocks(4), chosen)
    assert lists.from_bsr(torch.zeros(4, dtype=torch.int64), one[:0]).counts.sum() == 0


# The uncompiled form, which says on every call that it is not compiled.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def causal_mod(b, h, q, k):
    return q >= k


def every_other_block(b, h, q, k):
    return (q // 128 + k // 128 + h) % 2 == 0


def both(b, h, q, k):
    return causal_mod(b, h, q, k) & every_other_block(b, h, q, k)


@pytest.mark.parametrize("mask_mod", [causal_mod, every_other_block, both])
@pytest.mark.parametrize(
    ("length", "block_size"), [(256, (128, 128)), (300, (128, 128)), (300, (64, 128)), (150, (128, 64))]
)
def test_a_block_mask_gives_flex_attentions_output(random, mask_mod, length, block_size):
    tensors = qkv(random, length, length)
    block_mask = create_block_mask(mask_mod, 2, 3, length, length, device="cpu", BLOCK_SIZE=block_size)
    made = lists.from_block_mask(block_mask)
    assert (made.block_q, made.block_k) == block_size
    assert made.causal == (mask_mod is not every_other_block)
    out, lse = made.attend(*tensors)
    expected, aux = flex_attention(*tensors, block_mask=block_mask, return_aux=AuxRequest(lse=True))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, aux.lse, rtol=1e-4, atol=1e-5)
    back = lists.to_block_mask(made, length, length)
    torch.testing.assert_close(flex_attention(*tensors, block_mask=back), expected, rtol=1e-4, atol=1e-5)


def test_other_masks_are_refused(random):
    sliding = create_block_mask(lambda b, h, q, k: (q >= k) & (q - k < 50), 1, 1, 256, 256, device="cpu")
    with pytest.raises(ValueError, match="partial blocks are masked causally or not at all"):
        lists.from_block_mask(sliding)
    with pytest.raises(ValueError, match="blocks of 64 or 128, got 32 x 128"):
        lists.from_block_mask(create_block_mask(causal_mod, 1, 1, 256, 256, BLOCK_SIZE=(32, 128), device="cpu"))
    with pytest.raises(ValueError, match=r"mask as bool \[B, H, Q, N\], got torch.float32"):
        lists.from_mask(torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match=r"blocks as bool \[B, H, Mq, Nk\]"):
        lists.from_blocks(torch.zeros(4, 4, dtype=torch.bool))
