"""Token bookkeeping: which prompt an image belongs to, and a prompt without the placeholders of dropped tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# What an argument of the prompt's shape [B, L] holds at a padded place.
_FILL = {"token_type_ids": 0, "mm_token_type_ids": 0, "labels": -100}


def rows_of_images(is_image: Tensor, num_images: int, tokens_per_image: int) -> list[int]:
    """The prompt of each image. ``is_image`` bool [B, L] marks placeholders; images fill them in reading order."""
    counts = is_image.sum(1).tolist()
    if sum(counts) != num_images * tokens_per_image or any(count % tokens_per_image for count in counts):
        raise ValueError(
            f"vtkernels.zoo: expected {tokens_per_image} image placeholders per image and {num_images} images in all, "
            f"got prompts with {counts} placeholders"
        )
    return [row for row, count in enumerate(counts) for _ in range(count // tokens_per_image)]


@dataclass(frozen=True)
class Shortened:
    """Moves tensors [B, L] to the shorter prompt [B, length]: surviving tokens in order, padding beside them."""

    length: int
    rows: Tensor  # of the surviving tokens, in reading order
    columns: Tensor  # where they were
    slots: Tensor  # where they go
    before: Tensor  # int64 [B, L]: dropped tokens before each place

    @classmethod
    def plan(cls, real: Tensor, dropped: Tensor, *, left: bool) -> Shortened:
        """``real`` bool [B, L]: no padding. ``dropped`` bool [B, L]. ``left``: pad every row on the left, as generation
        needs; else on the side on which the row is padded now (an unpadded row: as its batch, left if none is).
        """
        survives = real & ~dropped
        lengths = survives.sum(1)
        length = int(lengths.max())
        pad_right = torch.zeros_like(lengths, dtype=torch.bool) if left else _padded_right(real)
        offset = torch.where(pad_right, 0, length - lengths)
        rows, columns = survives.nonzero(as_tuple=True)
        slots = (survives.cumsum(1) - 1 + offset.unsqueeze(1))[rows, columns]
        return cls(length, rows, columns, slots, dropped.cumsum(1))

    def move(self, tensor: Tensor, fill: int) -> Tensor:
        """[B, L] -> [B, length], padded with ``fill``."""
        moved = tensor.new_full((tensor.shape[0], self.length), fill)
        moved[self.rows, self.slots] = tensor[self.rows, self.columns]
        return moved

    def arguments(self, call: dict[str, Any], pad_id: int) -> dict[str, Any]:
        """``call`` with every argument of the prompt's shape shortened, and with positions that leave no gap."""
        ids = call["input_ids"]
        mask = _mask(call)
        short = dict(call)
        short["input_ids"] = self.move(ids, pad_id)
        short["attention_mask"] = self.move(mask, 0)
        positions = call.get("position_ids")
        if positions is None:
            positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        short["position_ids"] = self.move(positions.expand(ids.shape) - self.before, 0)
        for name, fill in _FILL.items():
            if call.get(name) is not None:
                short[name] = self.move(call[name], fill)
        return short


def real_tokens(call: dict[str, Any]) -> Tensor:
    """bool [B, L]: what is not padding."""
    return _mask(call).bool()


def _mask(call: dict[str, Any]) -> Tensor:
    ids, mask = call["input_ids"], call.get("attention_mask")
    if mask is None:
        return torch.ones_like(ids)
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"vtkernels.zoo: expected attention_mask.shape = [B, L] = {list(ids.shape)} with images, got {got}"
        )
    return mask


def _padded_right(real: Tensor) -> Tensor:
    """bool [B]: rows whose padding is, or for an unpadded row would be, on the right."""
    right = ~real[:, -1]
    return right | (real[:, 0] & right.any())
