"""What every family's adapter shares: attach, detach, and forward and generate on the shortened prompt.

While something is attached, the model has ``forward`` and ``generate`` (and what the family adds) as instance
attributes and hooks on the modules that the recipes read. Each call with images runs the encoder once, up front, which
also selects; shortens the prompt; and then runs the model's own method, to which the family serves the kept features.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vtkernels.attention import Pass
from vtkernels.zoo.adapters.attachment import Attachment, Claim
from vtkernels.zoo.adapters.generation import Border, generate_short, infer_mask, makes_cache
from vtkernels.zoo.adapters.prompt import Shortened, real_tokens, rows_of_images
from vtkernels.zoo.adapters.survivors import survivors_of
from vtkernels.zoo.caching import CacheContext
from vtkernels.zoo.recipe import Context, Encoder, Kept, Merged, Stage


@dataclass(frozen=True)
class LastRun:
    """What the last call with images did.

    Attributes:
        indices: int64 [images, kept], the kept patch numbers of each image in raster order, ascending; None where
            tokens were merged or the images keep different numbers.
        owner: int64 [images, patches], the visual token that each patch is in, counted within its prompt; -1 for a
            dropped patch.
        counts: visual tokens in the place of each image.
        rows: the prompt of each image.
        grid: the encoder's grid (height, width) that the patch numbers refer to.
        tokens_before: tokens of each prompt, padding not counted.
        tokens_after: tokens of each prompt after pruning.
        input_ids: [B, L'], the prompt that the language model saw.
        attention_mask: [B, L'], its mask, or None when it saw the caller's prompt without one.
        decoder: for each decoder layer before which tokens went: an int64 [left] a prompt, the visual tokens (as in
            ``owner``) that it and the layers after it see. Known after the prefill.
    """

    indices: Tensor | None
    owner: Tensor
    counts: list[int]
    rows: list[int]
    grid: tuple[int, int]
    tokens_before: list[int]
    tokens_after: list[int]
    input_ids: Tensor
    attention_mask: Tensor | None
    decoder: dict[int, list[Tensor]] = field(default_factory=dict)


class Encoding:
    """One run of the vision encoder: what its hooks captured, and what the stages selected."""

    def __init__(
        self,
        questions: list[Tensor],
        rows: list[int],
        embed: Callable[[Tensor], Tensor],
        project: Callable[[Tensor], Tensor],
        encoder: Encoder,
    ):
        self.questions = questions
        self.rows = rows
        self.embed = embed
        self.project = project
        self.encoder = encoder
        self.projections: dict[int, dict[str, Tensor]] = {}
        self.passes: dict[int, Pass] = {}  # of those layers, on attention that leaves them
        # Known once the features are. Tokens are [images, n, C]; with different counts packed, [1, all, C].
        self.counts: list[int] = []  # of each image
        self.owner = torch.empty(0)  # int64 [images, patches]: the packed token that each patch is in, or -1
        self.positions: Tensor | None = None  # int64 [images, n]: the patch of each token, while each is one patch
        self.output: Any = None  # what the family's feature method returned

    def capture(self, layer: int, role: str, projected: Tensor, heads: int) -> None:
        """``projected`` [images, S, H * D] as the view [images, H, S, D], a constant of the backward pass."""
        self.projections.setdefault(layer, {})[role] = projected.detach().unflatten(-1, (heads, -1)).transpose(1, 2)

    def start(self, features: Tensor, merged: Tensor | None) -> None:
        """``merged`` int64 [images, patches]: the feature that each patch is in, where the encoder merged them."""
        images, n, _ = features.shape
        if merged is None and n != self.encoder.num_patches:
            raise ValueError(
                f"vtkernels.zoo: expected {self.encoder.num_patches} patches ({self.encoder.grid[0]} x "
                f"{self.encoder.grid[1]}) from the vision encoder, got {n}"
            )
        patches = torch.arange(n, device=features.device).expand(images, n)
        self.counts = [n] * images
        self.owner = (patches if merged is None else merged) + n * patches.new_tensor(range(images)).unsqueeze(1)
        self.positions = patches if merged is None else None

    def run(self, stage: Stage, claim: Claim | None, tokens: Tensor, features: Tensor) -> Tensor:
        """The tokens that the stage leaves: [images, n, C] -> [images, kept, C], or packed [1, all, C]."""
        n = self.counts[0]
        if claim is None or claim.keep is None or (claim.keep == n and self.positions is not None):
            return tokens
        if self.positions is None:
            raise ValueError(
                f"{claim.recipe.name}: expected one patch a token and the same number for every image, but the stages "
                f"before {stage} merged"
            )
        if claim.keep > n:
            raise ValueError(
                f"{claim.recipe.name}: keep={claim.keep} is more than the {n} tokens that the stages before "
                f"{stage} left"
            )
        projections = {}
        for layer in claim.recipe.attention_layers(self.encoder):
            captured = self.projections.get(layer, {})
            if len(captured) != 2:
                # A tower that was compiled before the recipe was attached never calls the hooks.
                raise RuntimeError(f"{claim.recipe.name}: encoder layer {layer} gave no query and key; attach first")
            projections[layer] = (captured["query"], captured["key"])
        context = Context(
            # NOTE: SigLIP's features keep the channel-first strides of its patch convolution through every residual;
            # the ops gather rows.
            tokens=tokens if tokens.stride(-1) == 1 else tokens.contiguous(),
            features=features.detach(),
            positions=self.positions,
            keep=claim.keep,
            encoder=self.encoder,
            projections=projections,
            lse={layer: done.lse for layer, done in self.passes.items() if done.lse is not None},
            questions=self.questions,
            rows=self.rows,
            embed=self.embed,
            project=self.project,
        )
        return self._follow(getattr(claim.recipe, stage)(context))

    def _follow(self, result: Kept | Merged) -> Tensor:
        """Notes where the patches went; the tokens, all of one length or packed."""
        images, n = len(self.counts), self.counts[0]
        if isinstance(result, Merged):
            self.positions, moved = None, result.owner
            self.counts, tokens = list(result.counts), result.tokens.unsqueeze(0)
        else:
            tokens, indices = result
            kept = tokens.shape[1]
            assert self.positions is not None
            self.positions = self.positions.gather(1, indices)
            self.counts = [kept] * images
            moved = torch.full((images, n), -1, device=indices.device)
            moved.scatter_(1, indices, torch.arange(images * kept, device=indices.device).view(images, kept))
        before = self.owner.clamp(min=0)
        self.owner = moved.flatten()[before].where(self.owner >= 0, -1)
        return tokens

    def per_image(self, tokens: Tensor | list[Tensor]) -> tuple[Tensor, ...]:
        """One [n, C] an image, of tokens as :meth:`run` leaves them."""
        return torch.cat(list(tokens)).split(self.counts)

    def owner_within_prompts(self) -> Tensor:
        """int64 [images, patches]: the token of its prompt that each patch is in, or -1."""
        ends = list(itertools.accumulate(self.counts, initial=0))
        first = {row: ends[image] for image, row in reversed(list(enumerate(self.rows)))}
        offset = torch.tensor([first[row] for row in self.rows], device=self.owner.device)
        return (self.owner - offset.unsqueeze(1)).where(self.owner >= 0, -1)

    def dropped(self, is_image: Tensor) -> Tensor:
        """bool [B, L]: the placeholders beyond the number of tokens in their image's place."""
        place = torch.arange(self.encoder.num_patches, device=is_image.device)
        gone = place >= torch.tensor(self.counts, device=is_image.device).unsqueeze(1)
        dropped = torch.zeros_like(is_image)
        dropped[is_image] = gone.flatten()
        return dropped


class Adapter(Attachment):
    """The adapter of a family of vision-language models."""

    def __init__(self, model: Any, attribute: str):
        super().__init__(model, attribute)
        self.encoding: Encoding | None = None  # while the encoder runs for us: the hooks write here
        self.served: Encoding | None = None  # while the model's own method runs for us
        self._last: LastRun | None = None

    # What a family knows.

    @abstractmethod
    def install_family(self) -> None:
        """Hooks and overrides of the family, through :meth:`hook` and :meth:`override`."""

    @abstractmethod
    def encode(self, call: dict[str, Any]) -> Any:
        """Runs the model's own feature method with ``self.encoding`` set; returns its output."""

    @abstractmethod
    def project(self, features: Tensor) -> Tensor:
        """The projector on its own, without the hooks of a run."""

    @property
    @abstractmethod
    def image_token_id(self) -> int: ...

    @abstractmethod
    def visual_tokens(self, encoding: Encoding) -> Tensor:
        """[n, C], those that the language model gets, image after image."""

    @abstractmethod
    def special_ids(self) -> set[int]:
        """Ids that are no words: image, padding, begin and end of sequence."""

    # Attach.

    @property
    def last(self) -> LastRun | None:
        return self._last

    def layers(self) -> set[int]:
        """The encoder layers that the attached recipes score with."""
        return {layer for claim in self.claims.values() for layer in claim.recipe.attention_layers(self.encoder)}

    def install(self) -> None:
        self.override(self.model, "forward", self._wrap_forward)
        self.override(self.model, "generate", self._wrap_generate)
        self.install_family()

    # Running.

    def _wrap_forward(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def pruned_forward(*args: Any, **kwargs: Any) -> Any:
            call = _arguments(forward, args, kwargs)
            if self.served is not None:
                return forward(*args, **kwargs)
            defaults = self.model.config.get_text_config(decoder=True)
            if not self._has_images(call):
                return forward(**call | self._cache(call, defaults))
            with self._serving(call) as encoding:
                short = self._shorten(call, encoding, left=False) or call
                return forward(**short | self._cache(short, defaults))

        return pruned_forward

    def _wrap_generate(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        @torch.no_grad()
        def pruned_generate(*args: Any, **kwargs: Any) -> Any:
            call = _arguments(generate, args, kwargs)
            if call.get("input_ids") is None and call.get("inputs") is not None:
                call["input_ids"] = call.pop("inputs")
            defaults = self.model.generation_config
            if not self._has_images(call):
                return generate(*args, **kwargs | self._cache(call, defaults))
            if call.get("attention_mask") is None:
                call["attention_mask"] = infer_mask(call, defaults)
            with self._serving(call) as encoding:
                short = self._shorten(call, encoding, left=True)
                if short is None:
                    return generate(*args, **kwargs | self._cache(call, defaults))
                short |= self._cache(short, defaults)
                border = Border(call["input_ids"], short["input_ids"].shape[1])
                return generate_short(generate, short, border, defaults)

        return pruned_generate

    def _has_images(self, call: dict[str, Any]) -> bool:
        """Whether the call brings images to prune. Raises ValueError for input that pruning cannot follow."""
        ids = call.get("input_ids")
        if ids is None and call.get("inputs_embeds") is not None:
            raise ValueError("vtkernels.zoo: expected input_ids; inputs_embeds alone do not tell images from text")
        if call.get("mm_encoder_outputs"):
            raise ValueError("vtkernels.zoo: expected pixel_values; mm_encoder_outputs were encoded without pruning")
        if ids is not None and _continues(call.get("past_key_values"), ids) and (ids == self.image_token_id).any():
            raise ValueError("vtkernels.zoo: expected no image in a prompt that continues a cache")
        return call.get("pixel_values") is not None and ids is not None

    @contextlib.contextmanager
    def _serving(self, call: dict[str, Any]) -> Iterator[Encoding]:
        """Encodes and selects; inside, the model's feature method returns what was kept."""
        is_image = call["input_ids"] == self.image_token_id
        rows = rows_of_images(is_image, len(call["pixel_values"]), self.encoder.num_patches)
        embed = self.model.get_input_embeddings()
        self.encoding = Encoding(self._questions(call), rows, embed, self.project, self.encoder)
        try:
            self.encoding.output = self.encode(call)
            self.served = self.encoding
        finally:
            self.encoding = None
        # Queries, keys and questions are done with; generation may take long.
        self.served.projections.clear()
        self.served.passes.clear()
        try:
            yield self.served
        finally:
            self.served = None

    def _questions(self, call: dict[str, Any]) -> list[Tensor]:
        """Each prompt's ids without images, padding and special tokens, for recipes that read the question."""
        if not any(claim.recipe.reads_question for claim in self.claims.values()):
            return []
        ids = call["input_ids"]
        special = torch.tensor(sorted(self.special_ids()), dtype=ids.dtype, device=ids.device)
        words = real_tokens(call) & ~torch.isin(ids, special)
        return [row[is_word].to(self.model.device) for row, is_word in zip(ids, words, strict=True)]

    def _shorten(self, call: dict[str, Any], encoding: Encoding, *, left: bool) -> dict[str, Any] | None:
        """The call on the shortened prompt, or None when nothing was dropped. Notes what was done for :attr:`last`."""
        dropped = encoding.dropped(call["input_ids"] == self.image_token_id)
        real = real_tokens(call)
        before = real.sum(1)
        short = None
        if sum(encoding.counts) < encoding.owner.numel():
            short = Shortened.plan(real, dropped, left=left).arguments(call, self._pad_id())
        seen = call if short is None else short
        self._last = LastRun(
            indices=encoding.positions,
            owner=encoding.owner_within_prompts(),
            counts=encoding.counts,
            rows=encoding.rows,
            grid=self.encoder.grid,
            tokens_before=before.tolist(),
            tokens_after=(before - dropped.sum(1)).tolist(),
            input_ids=seen["input_ids"],
            attention_mask=seen.get("attention_mask"),
        )
        return short

    def _cache(self, call: dict[str, Any], defaults: Any) -> dict[str, Any]:
        """The cache that a recipe makes for this call, as an argument; none for calls that bring or need none."""
        claim = self.claims.get("cache")
        if claim is None or call.get("input_ids") is None or not makes_cache(call, defaults):
            return {}
        ids, encoding = call["input_ids"], self.served
        embed = self.model.get_input_embeddings()
        real = real_tokens(call)
        context = CacheContext(
            config=self.model.config.get_text_config(decoder=True),
            visual=(ids == self.image_token_id) & real,
            real=real,
            tokens=embed.weight.new_empty(0, embed.weight.shape[1])
            if encoding is None
            else self.visual_tokens(encoding),
            questions=self._questions(call),
            embed=embed,
            survivors=survivors_of,
        )
        recipe: Any = claim.recipe
        return {"past_key_values": recipe.cache(context)}

    def _pad_id(self) -> int:
        """Any id that is no image: padding is masked."""
        return 0 if self.image_token_id != 0 else 1


def _continues(cache: Any, ids: Tensor) -> bool:
    """Whether this is a further turn on a used cache: one token is a decoding step, which holds no image."""
    return cache is not None and ids.shape[1] > 1 and cache.get_seq_length() > 0


def _arguments(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Positional and keyword arguments by name."""
    signature = inspect.signature(function)
    named = dict(signature.bind(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named.update(named.pop(parameter.name, {}))
    return named
