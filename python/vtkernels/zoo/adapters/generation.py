"""``generate`` on a shortened prompt that looks to its caller like ``generate`` on the prompt that was given.

The generation loop runs on the shortened prompt. All that crosses the border in ids or in lengths is translated here:
results, streamers, stopping criteria, logits processors, ``max_length`` and ``min_length``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Border:
    """Between the caller's ids (``prompt`` [B, L], then new tokens) and the loop's (short prompt, then new tokens)."""

    prompt: Tensor
    short_length: int

    def restore(self, ids: Tensor) -> Tensor:
        """The loop's ids [B * beams, short + new] -> the caller's [B * beams, L + new]."""
        prompt = self.prompt.repeat_interleave(ids.shape[0] // self.prompt.shape[0], dim=0)
        return torch.cat([prompt.to(ids.device), ids[:, self.short_length :]], dim=1)

    def restore_row(self, row: int, ids: Tensor) -> Tensor:
        return torch.cat([self.prompt[row].to(ids.device), ids[self.short_length :]])

    @property
    def removed(self) -> int:
        return self.prompt.shape[1] - self.short_length


class _WithCallersIds:
    """A stopping criterion or logits processor of the caller's, called with the caller's ids."""

    def __init__(self, inner: Any, border: Border):
        self._inner = inner
        self._border = border

    def __call__(self, input_ids: Tensor, scores: Any) -> Any:
        return self._inner(self._border.restore(input_ids), scores)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class _WithCallersPrompt:
    """A streamer of the caller's: the first thing it is given is the prompt."""

    def __init__(self, inner: Any, border: Border):
        self._inner = inner
        self._border: Border | None = border

    def put(self, value: Tensor) -> None:
        if self._border is not None:
            value = self._border.restore(value)
            self._border = None
        self._inner.put(value)

    def end(self) -> None:
        self._inner.end()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def infer_mask(call: dict[str, Any], defaults: Any) -> Tensor | None:
    """The attention mask that ``generate`` would infer from padding ids when it is given none: [B, L] or None."""
    pad, eos = _setting(call, defaults, "pad_token_id"), _setting(call, defaults, "eos_token_id")
    if pad is None or pad in (eos if isinstance(eos, list) else [eos]):
        return None
    return (call["input_ids"] != pad).long()


def generate_short(generate: Callable[..., Any], call: dict[str, Any], border: Border, defaults: Any) -> Any:
    """Runs ``generate`` on ``call``, whose prompt is short already; ``defaults`` is the model's generation config."""
    call = dict(call)
    for name in ("max", "min"):
        limit = _setting(call, defaults, f"{name}_length")
        # A length counts the prompt; a number of new tokens, which wins over it, does not.
        if limit is not None and _setting(call, defaults, f"{name}_new_tokens") is None:
            call[f"{name}_length"] = max(limit - border.removed, 0)
    for name in ("stopping_criteria", "logits_processor"):
        if call.get(name):
            call[name] = type(call[name])(_WithCallersIds(item, border) for item in call[name])
    if (allowed := call.get("prefix_allowed_tokens_fn")) is not None:
        call["prefix_allowed_tokens_fn"] = lambda row, ids: allowed(row, border.restore_row(row, ids))
    if call.get("streamer") is not None:
        call["streamer"] = _WithCallersPrompt(call["streamer"], border)
    result = generate(**call)
    if isinstance(result, Tensor):
        return border.restore(result)
    result.sequences = border.restore(result.sequences)
    return result


def makes_cache(call: dict[str, Any], defaults: Any) -> bool:
    """Whether the call fills a cache that it does not bring."""
    return call.get("past_key_values") is None and _setting(call, defaults, "use_cache") is not False


def _setting(call: dict[str, Any], defaults: Any, name: str) -> Any:
    """As ``generate`` resolves a setting: the keyword, else the config given, else the model's own config."""
    sources = (call.get(name), getattr(call.get("generation_config"), name, None), getattr(defaults, name, None))
    return next((value for value in sources if value is not None), None)
