"""SiT: a learned module votes every token into a smaller number of slots, softly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from vtkernels.zoo.recipe import Context, Merged, Recipe


class TokenSlimming(nn.Module):
    """``[images, n, C] -> [images, n, slots]``: the weights with which each slot mixes the tokens.

    ``softmax over tokens of (scale * Linear(C/2 -> slots)(GELU(Linear(C -> C/2)(LayerNorm(x)))))``; scale is learned
    and starts at 1.
    """

    def __init__(self, channels: int, slots: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.down = nn.Linear(channels, channels // 2)
        self.vote = nn.Linear(channels // 2, slots)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, tokens: Tensor) -> Tensor:
        votes = self.vote(nn.functional.gelu(self.down(self.norm(tokens))))
        return (votes * self.scale).softmax(1)


@dataclass(frozen=True)
class SiT(Recipe):
    """One token slimming module on the encoder's features: ``Y = W^T X`` with ``W = slimming(X)`` [n, keep].

    Every row of Y mixes all patches; ``owner`` names for each patch the slot in which its weight is largest (ties: the
    first). Gradients flow to the features and to the module.

    Args:
        slimming: a :class:`TokenSlimming` trained for this encoder, with ``keep`` slots. None: one with fresh weights,
            drawn from ``seed``, which shows what the module costs and not what it can do.
        seed: of the fresh weights.

    Deviations: the paper puts three such modules between the encoder's blocks and trains all of it; here is one, after
    the encoder, so that a pretrained encoder stays as it is. The softmax and the product are float32.
    """

    name: ClassVar[str] = "sit"
    title: ClassVar[str] = "Self-slimmed Vision Transformer"
    reference: ClassVar[str] = "arXiv:2111.12624"
    status: ClassVar[str] = "verified: the module read in the authors' code; its place after the encoder is ours"
    training_free: ClassVar[bool] = False
    merges: ClassVar[bool] = True

    slimming: nn.Module | None = None
    seed: int = 0

    def vision_encoder(self, ctx: Context) -> Merged:
        tokens = ctx.tokens.float()
        slimming = self.slimming or _fresh(tokens.shape[-1], ctx.keep, self.seed).to(tokens.device)
        weight = slimming(tokens)
        if weight.shape != (*tokens.shape[:2], ctx.keep):
            raise ValueError(
                f"sit: expected slimming to give weights [images, n, keep] = {[*tokens.shape[:2], ctx.keep]}, "
                f"got {list(weight.shape)}"
            )
        merged = weight.transpose(1, 2) @ tokens
        return Merged.even(merged.to(ctx.tokens.dtype), weight.argmax(-1))


def _fresh(channels: int, slots: int, seed: int) -> TokenSlimming:
    with torch.device("meta"):  # drawing no numbers from the caller's generator
        slimming = TokenSlimming(channels, slots)
    slimming.to_empty(device="cpu").requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in slimming.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
        else:
            parameter.fill_(1.0 if name in ("norm.weight", "scale") else 0.0)
    return slimming
