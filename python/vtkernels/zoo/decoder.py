"""Between the layers of the language model: what a method sees there of one prompt."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vtkernels import attention_scores


@dataclass(frozen=True)
class DecoderContext:
    """One prompt in its prefill, as its tokens enter a decoder layer. ``T`` tokens, ``N`` of them visual.

    Attributes:
        tokens: [1, N, C], the hidden states of the visual tokens.
        visual: int64 [N], where they are among the T tokens, ascending.
        query, key: [1, H, T, D] and [1, Hk, T, D] of the layer before, rotary embedding applied: what that layer
            attended with, constants of the backward pass.
        lse: float32 [1, H, T], what normalised each row there; None where its attention leaves none (all but "vtk").
        layer: the layer that the tokens enter, of ``num_layers``; at least 1.
        num_images: how many images the prompt has.
        keep: the budget, tokens of an image.
    """

    tokens: Tensor
    visual: Tensor
    query: Tensor
    key: Tensor
    lse: Tensor | None
    layer: int
    num_layers: int
    num_images: int
    keep: int

    def attention(self) -> Tensor:
        """What each visual token gets of the prompt's last token in the layer before: float32 [1, N], mean over heads.

        The softmax runs over all T tokens.
        """
        lse = None if self.lse is None else self.lse[:, :, -1:]
        return attention_scores(self.query[:, :, -1:], self.key, lse=lse)[:, self.visual]

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens at ``indices`` int64 [1, kept], with the indices."""
        return self.tokens.gather(1, indices.unsqueeze(-1).expand(-1, -1, self.tokens.shape[-1])), indices
