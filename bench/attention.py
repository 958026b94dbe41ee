"""block_sparse_attention and rule_attention against SDPA and FlexAttention."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from bench.harness import Case
from vtkernels.attention import BlockLists, Rule, dense, from_blocks

OPS = ["block_sparse_attention", "block_sparse_attention_backward", "rule_attention"]
BLOCK = 128
SINK, WINDOW = 64, 1024


def tensors(shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """shape = (H, Hk, Q, N, D) -> query, key, value of one batch item."""
    heads, key_heads, rows, keys, depth = shape
    random = torch.Generator(device).manual_seed(0)
    return [
        torch.randn(1, h, n, depth, generator=random, device=device).to(dtype)
        for h, n in ((heads, rows), (key_heads, keys), (key_heads, keys))
    ]


def causal_lists(blocks: int, heads: int, density: float, device: torch.device) -> BlockLists:
    """Of the blocks up to the diagonal that share, own lists a head: always the first and the diagonal."""
    random = torch.Generator(device).manual_seed(1)
    lower = torch.ones(blocks, blocks, dtype=torch.bool, device=device).tril()
    forced = torch.eye(blocks, dtype=torch.bool, device=device)
    forced[:, 0] = True
    wanted = round(density * int(lower.sum())) * heads - int(forced.sum()) * heads
    score = torch.rand(heads, blocks, blocks, generator=random, device=device).masked_fill(~lower | forced, -1.0)
    chosen = forced.expand(heads, -1, -1).clone()
    chosen.view(-1)[score.flatten().topk(max(wanted, 0)).indices] = True
    return from_blocks(chosen[None], causal=True)


def compiled_flex() -> Callable[..., Tensor]:
    torch._dynamo.reset()  # it compiles one function eight times, then runs it as it is
    return torch.compile(flex_attention, dynamic=False)


def flex(lists: BlockLists, rows: int) -> Callable[..., Tensor]:
    """Compiled FlexAttention on the same blocks, its lists ready."""
    mask = BlockMask.from_kv_blocks(
        lists.counts, lists.indices, BLOCK_SIZE=BLOCK, mask_mod=lambda b, h, q, k: q >= k, seq_lengths=(rows, rows)
    )
    attend = compiled_flex()
    return lambda q, k, v: attend(q, k, v, block_mask=mask, enable_gqa=True)


def close(dtype: torch.dtype) -> Callable[[object, object], None]:
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2

    def check(ours: object, peer: object) -> None:
        assert isinstance(ours, tuple)
        if isinstance(peer, Tensor):  # a tuple is dense attention, timed against sparse lists: it computes more
            torch.testing.assert_close(ours[0], peer, rtol=tolerance, atol=tolerance)

    return check


def prefill_case(depth: int, dtype: torch.dtype, density: float, target: dict, device: torch.device) -> Case:
    heads, key_heads, length = 8, 2, 4096
    q, k, v = tensors((heads, key_heads, length, length, depth), dtype, device)
    all_blocks = density == 1.0
    lists = (
        dense(length, length, causal=True, device=device)
        if all_blocks
        else causal_lists(length // BLOCK, heads, density, device)
    )

    def sdpa() -> object:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out if all_blocks else (out,)

    def flex_peer() -> Callable[[], object]:
        attend = flex(lists, length)
        return lambda: attend(q, k, v)

    return Case(
        "block_sparse_attention",
        f"S{length} H{heads}/{key_heads} D{depth} {str(dtype).removeprefix('torch.')} causal {density:.0%} of blocks",
        lambda: lists.attend(q, k, v),
        {"sdpa dense": lambda: sdpa, "flex": flex_peer},
        close(dtype),
        bytes=k.nbytes + v.nbytes + 2 * q.nbytes,
        flops=int(2 * heads * length * (length + 1) * depth * density),
        target=target,
    )


def decode_case(device: torch.device) -> Case:
    dtype = torch.bfloat16
    q, k, v = tensors((32, 8, 1, 32768, 128), dtype, device)
    lists = dense(1, 32768, device=device)
    return Case(
        "block_sparse_attention",
        "decode S32768 H32/8 D128 bfloat16",
        lambda: lists.attend(q, k, v),
        {"sdpa": lambda: lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)},
        close(dtype),
        bytes=k.nbytes + v.nbytes,
        flops=4 * 32 * 32768 * 128,
        target={},
    )


def training_case(depth: int, dtype: torch.dtype, density: float, target: dict, device: torch.device) -> Case:
    """Forward and backward."""
    heads, key_heads, length = 8, 2, 4096
    inputs = [x.requires_grad_() for x in tensors((heads, key_heads, length, length, depth), dtype, device)]
    grad_out = torch.randn(inputs[0].shape, generator=torch.Generator(device).manual_seed(2), device=device).to(dtype)
    all_blocks = density == 1.0
    lists = (
        dense(length, length, causal=True, device=device)
        if all_blocks
        else causal_lists(length // BLOCK, heads, density, device)
    )

    def ours() -> object:
        return torch.autograd.grad(lists.attend(*inputs)[0], inputs, grad_out)

    def sdpa() -> object:
        out = F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
        return torch.autograd.grad(out, inputs, grad_out)

    def check(ours: object, peer: object) -> None:
        tolerance = 1e-4 if dtype == torch.float32 else 3e-2
        if all_blocks:  # dense attention computes something else than sparse lists
            torch.testing.assert_close(ours, peer, rtol=tolerance, atol=tolerance)

    query, key, _ = inputs
    return Case(
        "block_sparse_attention_backward",
        f"training S{length} H{heads}/{key_heads} D{depth} {str(dtype).removeprefix('torch.')} causal "
        f"{density:.0%} of blocks",
        ours,
        {"sdpa dense": lambda: sdpa},
        check,
        bytes=4 * key.nbytes + 4 * query.nbytes,
        flops=int((2 + 5) * heads * length * (length + 1) * depth * density),
        target=target,
    )


def streaming_case(rows: int, keys: int, dtype: torch.dtype, device: torch.device) -> Case:
    """Sinks and a sliding window, token by token. The peers' masks are made before the clock runs."""
    heads, key_heads, depth, before = 32 if rows == 1 else 8, 8 if rows == 1 else 2, 128, keys - rows
    q, k, v = tensors((heads, key_heads, rows, keys, depth), dtype, device)
    rule = Rule.streaming(SINK, WINDOW, device=device)

    def sees(b: Tensor, h: Tensor, row: Tensor, col: Tensor) -> Tensor:
        return (col <= row + before) & ((col > row + before - WINDOW) | (col < SINK))

    def flex_peer() -> Callable[[], object]:
        mask = create_block_mask(sees, 1, 1, rows, keys, device=device.type)
        attend = compiled_flex()
        return lambda: attend(q, k, v, block_mask=mask, enable_gqa=True)

    def masked_sdpa() -> Callable[[], object]:
        at = torch.arange(keys, device=device)
        mask = sees(at, at, torch.arange(rows, device=device)[:, None], at)
        return lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    seen = sum(min(before + i + 1, SINK + WINDOW) for i in range(rows))
    kept = min(keys, rows + SINK + WINDOW)
    kind = f"{'decode' if rows == 1 else 'causal'} S{keys} H{heads}/{key_heads} D{depth}"
    return Case(
        "rule_attention",
        f"{kind} {str(dtype).removeprefix('torch.')} sink {SINK} window {WINDOW}",
        lambda: rule.attend(q, k, v),
        {"flex": flex_peer, "sdpa masked": masked_sdpa},
        close(dtype),
        bytes=(k.nbytes + v.nbytes) * kept // keys + 2 * q.nbytes,
        flops=4 * heads * seen * depth,
        target={"flex": 1.5},
    )


def cases(device: torch.device) -> Iterator[Case]:
    goals = {1.0: (1.0, 1.8), 0.25: (3.5, 6.0), 0.1: (8.0, 14.0)}
    for index, dtype in enumerate((torch.float32, torch.bfloat16)):
        for depth in (64, 128):
            for density, goal in goals.items():
                yield prefill_case(depth, dtype, density, {"sdpa dense": goal[index], "flex": 1.5}, device)
    for depth in (64, 128):
        for density, goal in {1.0: 1.0, 0.25: 3.5}.items():
            yield training_case(depth, torch.float32, density, {"sdpa dense": goal}, device)
    yield decode_case(device)
    for dtype in (torch.float32, torch.bfloat16):
        yield streaming_case(4096, 4096, dtype, device)
    yield streaming_case(1, 32768, torch.bfloat16, device)
