"""MMTok: the subset of visual tokens that best covers the question's words and the image itself."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

from vtkernels import select_cover
from vtkernels.zoo.recipe import Context, Kept, Recipe

# Benchmarks append these instructions to the question; they say nothing about the image.
_INSTRUCTIONS = (
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
)
# The method's own list of words that name nothing visible.
_STOP_WORDS = (
    "a an and answer are at be been being but by did do does for from had has have he how i if into is it onto or "
    "question she so the then they to upon was we were what when where which who why with you"
)


@dataclass(frozen=True)
class MMTok(Recipe):
    """Greedy maximum coverage over text-to-vision and vision-to-vision similarities.

    With z the m question embeddings (the language model's table), x the n projected tokens, c the same tokens'
    features before the projector:
    ``P = softmax_x(cos(z, x) / tau_tv) / m``, ``Q = softmax_c(cos(c, c) / tau_vv) / n``, ``C = [P; alpha * Q]``;
    ``keep`` times: add the column j that maximises ``sum_r max(C[r, j] - best[r], 0)``. Raster order, float32.

    Args:
        alpha: weight of the vision-to-vision rows.
        tau_tv, tau_vv: temperatures (0.02 is the released value for LLaVA; its Qwen port uses 0.01).
        tokenizer: the processor's tokenizer. With it the question is cleaned as in the released code: two fixed
            instructions stripped, words that name nothing visible left out (all words, if none remain).
            Without it, every id of the prompt counts that is no image, padding or special token.

    A prompt with no text left is covered by the image alone; with several images in a prompt, each is read with that
    prompt's question. As released, n <= keep keeps everything.
    Deviations from the released code: the text is the whole prompt, role words such as ``USER:`` included, since the
    recipe sees ids and not the question alone; norms are taken in float32; any batch size; the optional exclusion of
    patches that are pure padding is left out, because Hugging Face's processor crops and does not pad.
    """

    name: ClassVar[str] = "mmtok"
    title: ClassVar[str] = "MMTok: Multimodal Coverage Maximization for Efficient Inference of VLMs"
    reference: ClassVar[str] = "arXiv:2508.18264"
    status: ClassVar[str] = "verified: read in the authors' code"

    alpha: float = 0.5
    tau_tv: float = 0.02
    tau_vv: float = 0.2
    tokenizer: Any = None

    def __post_init__(self) -> None:
        if self.alpha < 0 or self.tau_tv <= 0 or self.tau_vv <= 0:
            raise ValueError(
                "mmtok: expected alpha >= 0, tau_tv > 0 and tau_vv > 0, "
                f"got alpha={self.alpha}, tau_tv={self.tau_tv}, tau_vv={self.tau_vv}"
            )

    @property
    def reads_question(self) -> bool:
        return True

    def after_projector(self, ctx: Context) -> Kept:
        text = self._text_coverage(ctx)
        image = self._image_coverage(ctx)
        return ctx.take(select_cover(torch.cat([text, self.alpha * image], dim=1), ctx.keep))

    def _text_coverage(self, ctx: Context) -> Tensor:
        """P: float32 [images, m, n]. The rows beyond a shorter prompt's end are 0: nothing to gain."""
        questions = [ids if self.tokenizer is None else self._clean(ids) for ids in ctx.questions]
        lengths = torch.tensor([max(len(ids), 1) for ids in questions], device=ctx.tokens.device)
        real = pad_sequence([torch.ones_like(ids, dtype=torch.bool) for ids in questions], batch_first=True)
        words = _unit(ctx.embed(pad_sequence(list(questions), batch_first=True)))
        cosine = words[ctx.rows] @ _unit(ctx.tokens).transpose(1, 2)
        share = (real / lengths.unsqueeze(1))[ctx.rows]
        return (cosine / self.tau_tv).softmax(-1) * share.unsqueeze(-1)

    def _image_coverage(self, ctx: Context) -> Tensor:
        """Q: float32 [images, n, n]."""
        features = _unit(ctx.features)
        return (features @ features.transpose(1, 2) / self.tau_vv).softmax(-1) / features.shape[1]

    def _clean(self, ids: Tensor) -> Tensor:
        text = self.tokenizer.decode(ids.tolist(), skip_special_tokens=True)
        for instruction in _INSTRUCTIONS:
            text = text.replace(instruction, "")
        stop = _STOP_WORDS.split()
        words = [word for word in re.findall(r"\b\w+\b", text) if word.lower() not in stop]
        clean = self.tokenizer(" ".join(words) if words else text, add_special_tokens=False)["input_ids"]
        return torch.tensor(clean, dtype=ids.dtype, device=ids.device)


def _unit(x: Tensor) -> Tensor:
    return normalize(x.detach().float(), dim=-1, eps=1e-8)
