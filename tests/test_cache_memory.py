"""What a long cache takes of the process's memory, as the kernel counts it, against kv_bytes_per_token."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from vtkernels import kv_bytes_per_token
from vtkernels.cache import PackedKVCache
from vtkernels.kv import PAGE_TOKENS, KVFormat
from vtkernels.kv.growth import Room
from vtkernels.kv.pages import Pages

LAYERS, HEADS, TOKENS, HEAD_DIM = 3, 8, 32768, 128
FORMATS = ["none/none/64", "int4/int4/64", "mix/ternary5/128"]


def anonymous_bytes() -> int:
    """Memory that no file backs, after the allocator has given back what it can."""
    ctypes.CDLL(None).malloc_trim(0)
    fields = dict(line.split(":", 1) for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return int(fields["Anonymous"].split()[0]) * 1024


def fill(cache, tokens: torch.Tensor, count: int) -> None:
    """Most of it in prompts, then pages, the last page token by token."""
    left = [*[4096] * (count // 4096 - 1), *[128] * 31, *[1] * 128] if count > 4096 else [128, 1]
    for step in left:
        for layer in range(LAYERS):
            cache.update(tokens[:, :, :step], tokens[:, :, :step], layer)


def measure(format: str) -> int:
    torch.set_num_threads(1)
    config = LlamaConfig(num_hidden_layers=LAYERS, num_key_value_heads=HEADS, head_dim=HEAD_DIM)
    tokens = torch.randn(1, HEADS, 4096, HEAD_DIM, generator=torch.Generator().manual_seed(0)).bfloat16()
    fill(PackedKVCache(config, format), tokens, 129)  # what the first call loads is no cache
    before = anonymous_bytes()
    cache = PackedKVCache(config, format)
    fill(cache, tokens, TOKENS)
    assert cache.get_seq_length() == TOKENS and cache.layers[0].pages.tokens == TOKENS
    return anonymous_bytes() - before


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux counts a process's memory there")
def test_process_memory():
    process = subprocess.run(
        [sys.executable, "-m", "tests.test_cache_memory"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    for format, taken in zip(FORMATS, map(int, process.stdout.split()), strict=True):
        expected = LAYERS * TOKENS * kv_bytes_per_token(HEAD_DIM, heads=HEADS, **KVFormat.parse(format).options)
        assert taken == pytest.approx(expected, rel=0.03), format


def room(pages: int) -> tuple[Room, list[torch.Tensor]]:
    tensors = [torch.randn(2, 3, pages, 4), torch.randn(2, 3, pages, 1)]
    return Room.after(tensors, 2), tensors


def test_appended_in_place_where_there_is_room():
    there, tensors = room(3)
    data = [buffer.data_ptr() for buffer in there.buffers]
    more = [torch.randn(2, 3, 2, 4), torch.randn(2, 3, 2, 1)]
    there.append(more)
    for view, old, new in zip(there.views(), tensors, more, strict=True):
        assert torch.equal(view, torch.cat([old, new], dim=2))
    assert [buffer.data_ptr() for buffer in there.buffers] == data and there.capacity >= 5


def test_pages_that_share_room_do_not_see_each_other():
    """Both branches of a cache that was forked stay what they are."""
    tokens = torch.randn(3, 1, 2, PAGE_TOKENS, 16)
    start = Pages.of(tokens[0], tokens[0], KVFormat("int4", "sign"), None).append(tokens[0], tokens[0])
    one, other = start.append(tokens[1], tokens[1]), start.append(tokens[2], tokens[2])
    assert one.room is start.room and other.room is not start.room
    for pages, second in ((one, 1), (other, 2)):
        assert pages.tokens == 2 * PAGE_TOKENS
        whole = torch.cat([tokens[0], tokens[second]], dim=2)
        fresh = Pages.of(whole, whole, KVFormat("int4", "sign"), None).append(whole, whole)
        assert all(map(torch.equal, pages.packed, fresh.packed))


if __name__ == "__main__":
    for format in FORMATS:
        if os.fork() == 0:  # a process for each, one import
            print(measure(format), flush=True)
            os._exit(0)
        os.wait()
