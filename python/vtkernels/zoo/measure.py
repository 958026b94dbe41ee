"""What a prompt costs: the time of its prefill and of each decoded token, the cache's bytes, the FLOPs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop


@dataclass(frozen=True)
class Cost:
    """Seconds of the prefill, of the vision tower within it, and of each decoded token; bytes of the prompt's cache."""

    prefill: float
    vision: float
    decode: float
    kv_bytes: int
    ids: tuple[int, ...]

    @property
    def total(self) -> float:
        return self.prefill + self.decode * (len(self.ids) - 1)


@torch.inference_mode()
def measure(model: Any, inputs: dict[str, Tensor], new_tokens: int) -> Cost:
    """One prefill and ``new_tokens`` greedy tokens, whatever they are.

    Args:
        inputs: one prompt without padding, as the processor makes it.
        new_tokens: at least 1; the prefill gives the first.
    """
    prompt = {name: value for name, value in inputs.items() if name != "attention_mask"}
    vision: list[float] = []
    hooks = [
        model.model.vision_tower.register_forward_pre_hook(lambda *_: vision.append(_now(model.device))),
        model.model.vision_tower.register_forward_hook(lambda *_: vision.append(_now(model.device))),
    ]
    try:
        begin = _now(model.device)
        out = model(**prompt, use_cache=True, logits_to_keep=1)
        prefill = _now(model.device) - begin
    finally:
        for hook in hooks:
            hook.remove()

    cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
    kv_bytes = sum(getattr(layer, "nbytes", None) or layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    ids = [int(token)]
    begin = _now(model.device)
    for _ in range(new_tokens - 1):
        out = model(input_ids=token, past_key_values=cache, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
        ids.append(int(token))
    decode = (_now(model.device) - begin) / max(1, new_tokens - 1)
    return Cost(prefill, vision[1] - vision[0], decode, kv_bytes, tuple(ids))


@torch.inference_mode()
def prefill_flops(model: Any, inputs: dict[str, Tensor]) -> int:
    """Multiplications and additions of the prefill's matrix products, convolutions and attentions.

    The selection's own are not among them: they are few, and their time is in the prefill's.
    """
    # NOTE: torch's counter knows the attention of CUDA, not that of CPU nor ours; their first arguments are the same.
    ours = (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, torch.ops.vtk.block_sparse_attention)
    with FlopCounterMode(display=False, custom_mapping=dict.fromkeys(ours, _attention_flops)) as counter:
        model(**inputs, use_cache=True, logits_to_keep=1)
    return counter.get_total_flops()


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    heads = (*query[:2], *key[2:])  # which keys may share
    return sdpa_flop(query, heads, heads)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
