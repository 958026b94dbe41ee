"""Block lists: which key blocks each block of queries attends to, and where such lists come from.

Everything here is plain torch on the lists' own device; :func:`vtkernels.block_sparse_attention` executes them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vtkernels.ops.attention import block_sparse_attention

_CHUNK = 1 << 24  # elements of a mask function that are evaluated at once


@dataclass(frozen=True)
class BlockLists:
    """Lists of key blocks, as :func:`vtkernels.block_sparse_attention` takes them.

    Attributes:
        counts: int32 ``[B | 1, H | 1, Mq]``, entries of each list.
        indices: int32 ``[B | 1, H | 1, Mq, capacity]``, block numbers; of these blocks a query attends to what
            ``causal`` lets it see.
        full_counts, full_indices: the same, to which ``causal`` does not apply; None: none.
        block_q, block_k: block sizes, 64 or 128.
        causal: whether the lists mean the causal mask in their partial blocks.
    """

    counts: Tensor
    indices: Tensor
    full_counts: Tensor | None = None
    full_indices: Tensor | None = None
    block_q: int = 128
    block_k: int = 128
    causal: bool = False

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """``block_sparse_attention`` over these lists: out and lse. ``options``: scale, key_bias, seqlens_k, ..."""
        return block_sparse_attention(
            query,
            key,
            value,
            self.counts,
            self.indices,
            full_counts=self.full_counts,
            full_indices=self.full_indices,
            block_q=self.block_q,
            block_k=self.block_k,
            causal=self.causal,
            **options,
        )

    def blocks(self, num_blocks: int) -> Tensor:
        """bool ``[B | 1, H | 1, Mq, num_blocks]``: the blocks that are listed, partial or full."""
        listed = _scatter(self.counts, self.indices, num_blocks)
        if self.full_counts is None or self.full_indices is None:
            return listed
        return listed | _scatter(self.full_counts, self.full_indices, num_blocks)

    def transposed(self, num_blocks: int) -> BlockLists:
        """The same pairs by key block: of each of ``num_blocks`` key blocks, the query blocks that list it.

        What a backward pass for key and value walks. ``block_q`` and ``block_k`` change places.
        """
        counts, indices = _compact(_scatter(self.counts, self.indices, num_blocks).mT)
        turned = replace(self, counts=counts, indices=indices, block_q=self.block_k, block_k=self.block_q)
        if self.full_counts is None or self.full_indices is None:
            return turned
        full_counts, full_indices = _compact(_scatter(self.full_counts, self.full_indices, num_blocks).mT)
        return replace(turned, full_counts=full_counts, full_indices=full_indices)


def dense(num_queries: int, num_keys: int, *, causal: bool = False, device: Any = None) -> BlockLists:
    """Lists of all blocks, shared by batch and heads: dense attention."""
    down, across = -(-num_queries // 128), -(-num_keys // 128)
    counts = torch.full((1, 1, down), across, dtype=torch.int32, device=device)
    indices = torch.arange(across, dtype=torch.int32, device=device).expand(1, 1, down, across)
    return BlockLists(counts, indices, causal=causal)


def from_blocks(blocks: Tensor, *, block_q: int = 128, block_k: int = 128, causal: bool = False) -> BlockLists:
    """Lists of the blocks that are set in bool ``[B | 1, H | 1, Mq, Nk]``, ascending.

    Example:
        >>> lists = from_blocks(torch.tensor([[[[True, False, True]]]]))
        >>> lists.counts.tolist(), lists.indices.tolist()
        ([[[2]]], [[[[0, 2, 1]]]])
    """
    _expect(blocks.dim() == 4 and blocks.dtype == torch.bool, f"blocks as bool [B, H, Mq, Nk], got {_text(blocks)}")
    counts, indices = _compact(blocks)
    return BlockLists(counts, indices, block_q=block_q, block_k=block_k, causal=causal)


def from_mask(mask: Tensor, *, block_q: int = 128, block_k: int = 128, causal: bool = False) -> BlockLists:
    """Lists that attend exactly where bool ``mask [B | 1, H | 1, Q, N]`` is set.

    Args:
        mask: every block must be set whole, not at all or, with ``causal``, exactly where the causal mask (the last
            query sees all keys) sets it.

    Raises:
        ValueError: a block that is set in another way: lists cannot say that.
    """
    _expect(mask.dim() == 4 and mask.dtype == torch.bool, f"mask as bool [B, H, Q, N], got {_text(mask)}")
    rows, keys = mask.shape[2:]
    set_, size = _block_counts(mask, block_q, block_k), _block_counts(torch.ones_like(mask[:1, :1]), block_q, block_k)
    full = set_ == size
    partial = (set_ > 0) & ~full
    if causal:
        seen = torch.ones(rows, keys, dtype=torch.bool, device=mask.device).tril(keys - rows)[None, None]
        other = _block_counts(mask != seen, block_q, block_k) > 0
    else:
        other = torch.ones_like(full)
    _expect(
        not (partial & other).any(),
        "a mask whose blocks are set whole, not at all" + (" or causally" if causal else " (see causal)"),
    )
    counts, indices = _compact(partial)
    full_counts, full_indices = _compact(full)
    return BlockLists(counts, indices, full_counts, full_indices, block_q, block_k, causal)


def from_bsr(indptr: Tensor, indices: Tensor, *, block_q: int = 128, block_k: int = 128, causal: bool = False):
    """Lists from the rows of a block-sparse matrix (BSR), as FlashInfer's block-sparse wrapper takes them.

    Args:
        indptr: integers ``[Mq + 1]``, or ``[H, Mq + 1]`` with one pattern a head, all into ``indices``.
        indices: integers ``[nnz]``, block columns.
    """
    _expect(indptr.dim() in (1, 2) and indices.dim() == 1, f"indptr [Mq + 1] or [H, Mq + 1], got {_text(indptr)}")
    starts = indptr.view(1, -1, indptr.shape[-1])
    counts = starts.diff(dim=-1)
    capacity = int(counts.max()) if counts.numel() else 0
    slot = torch.arange(capacity, device=indices.device)
    at = (starts[..., :-1, None] + slot).clamp(max=max(indices.numel() - 1, 0))
    entries = indices[at] if indices.numel() else at.new_zeros(at.shape)
    entries = torch.where(slot < counts[..., None], entries, 0)
    return BlockLists(counts.int(), entries.int(), block_q=block_q, block_k=block_k, causal=causal)


def from_block_mask(block_mask: Any) -> BlockLists:
    """Lists from a FlexAttention ``BlockMask``, of which the lists are taken as they are.

    Its ``mask_mod`` is evaluated on the partial blocks, which must be masked causally (the query's number at least the
    key's) or not at all: lists know no other mask.

    Raises:
        ValueError: another ``mask_mod``, or block sizes other than 64 and 128.
    """
    block_q, block_k = block_mask.BLOCK_SIZE
    _expect(block_q in (64, 128) and block_k in (64, 128), f"blocks of 64 or 128, got {block_q} x {block_k}")
    lists = BlockLists(
        block_mask.kv_num_blocks,
        block_mask.kv_indices,
        block_mask.full_kv_num_blocks,
        block_mask.full_kv_indices,
        block_q,
        block_k,
    )
    rows, keys = block_mask.seq_lengths
    masked = causal = True
    for allowed, seen, real in _partial_elements(block_mask.mask_mod, lists, rows, keys):
        masked = masked and bool((allowed | ~real).all())
        causal = causal and bool(((allowed == seen) | ~real).all())
    _expect(masked or causal, "a BlockMask whose partial blocks are masked causally or not at all")
    _expect(masked or rows == keys, f"a causal BlockMask over as many keys as queries, got {rows} queries, {keys} keys")
    return replace(lists, causal=not masked)


def to_block_mask(lists: BlockLists, num_queries: int, num_keys: int) -> Any:
    """A FlexAttention ``BlockMask`` of the same lists, whose ``mask_mod`` says the same, element by element."""
    from torch.nn.attention.flex_attention import BlockMask

    _expect(not lists.causal or num_queries == num_keys, "causal lists over as many keys as queries")
    across = -(-num_keys // lists.block_k)
    partial, full = _scatter(lists.counts, lists.indices, across), None
    if lists.full_counts is not None and lists.full_indices is not None:
        full = _scatter(lists.full_counts, lists.full_indices, across)

    def listed(blocks: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return blocks[b % blocks.shape[0], h % blocks.shape[1], q // lists.block_q, k // lists.block_k]

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        allowed = listed(partial, b, h, q, k)
        if lists.causal:
            allowed = allowed & (q >= k)
        return allowed if full is None else allowed | listed(full, b, h, q, k)

    return BlockMask.from_kv_blocks(
        lists.counts,
        lists.indices,
        lists.full_counts,
        lists.full_indices,
        BLOCK_SIZE=(lists.block_q, lists.block_k),
        mask_mod=mask_mod,
        seq_lengths=(num_queries, num_keys),
    )


def _partial_elements(mask_mod: Callable[..., Tensor], lists: BlockLists, rows: int, keys: int):
    """Of each partial block: where mask_mod allows, where the causal mask does, and which elements exist."""
    capacity = lists.indices.shape[-1]
    valid = torch.arange(capacity, device=lists.counts.device) < lists.counts[..., None]
    b, h, row, slot = valid.nonzero(as_tuple=True)
    column = lists.indices[b, h, row, slot].long()
    evaluate = torch.vmap(torch.vmap(torch.vmap(mask_mod, (None, None, None, 0)), (None, None, 0, None)), (0, 0, 0, 0))
    step = max(1, _CHUNK // (lists.block_q * lists.block_k))
    for first in range(0, len(b), step):
        part = slice(first, first + step)
        q = row[part, None] * lists.block_q + torch.arange(lists.block_q, device=row.device)
        k = column[part, None] * lists.block_k + torch.arange(lists.block_k, device=row.device)
        real = (q < rows)[..., None] & (k < keys)[:, None]
        yield evaluate(b[part], h[part], q, k), q[..., None] >= k[:, None], real


def _compact(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and ascending indices of the set blocks of each row; the rest of a row follows, as in a BlockMask."""
    order = torch.argsort(blocks.int(), dim=-1, descending=True, stable=True)
    return blocks.sum(-1).int(), order.int()


def _scatter(counts: Tensor, indices: Tensor, num_blocks: int) -> Tensor:
    """The blocks of lists as bool ``[B | 1, H | 1, Mq, num_blocks]``."""
    valid = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    shape = torch.broadcast_shapes(valid.shape, indices.shape)
    blocks = torch.zeros(*shape[:-1], num_blocks + 1, dtype=torch.bool, device=indices.device)
    spare = torch.where(valid, indices, num_blocks).long().expand(shape)
    return blocks.scatter_(-1, spare, True)[..., :num_blocks]


def _block_counts(mask: Tensor, block_q: int, block_k: int) -> Tensor:
    """How many elements of each block are set: ``[B, H, Mq, Nk]``."""
    rows, keys = mask.shape[2:]
    padded = F.pad(mask, (0, -keys % block_k, 0, -rows % block_q))
    return padded.unflatten(3, (-1, block_k)).unflatten(2, (-1, block_q)).sum((3, 5))


def _text(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def _expect(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"vtkernels.attention: expected {what}")
