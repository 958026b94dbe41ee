"""Shortening a prompt between the layers of a language model of Llama's form.

In a prefill with images the layers from a stop on get the surviving tokens alone: their hidden states, the rotary
embedding of the positions that they had, a mask made for them, and so a shorter cache. After the last layer the hidden
states go back to their places, and the place of a dropped token repeats the survivor before it, as if the prompt had
never held the token: whoever reads the logits finds each where its token is. Which tokens survived is noted on the
cache, by which decoding knows the layers' masks.

What it relies on, checked by tests/models/test_zoo_canary.py: ``layers[i]`` called with the hidden states first and
``attention_mask``, ``position_embeddings``, ``position_ids`` and ``past_key_values`` by name, ``self_attn`` with
``q_proj``, ``k_proj`` and ``head_dim``, and the argument ``layer_idx`` of ``create_causal_mask``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from vtkernels.attention import Pass, recording
from vtkernels.zoo.adapters.attachment import Attachment, Claim
from vtkernels.zoo.adapters.base import LastRun
from vtkernels.zoo.adapters.survivors import Survivors, note_survivors, survivors_on
from vtkernels.zoo.decoder import DecoderContext

# query [B, H, T, D] and key [B, Hk, T, D], rotary embedding applied, and what normalised the rows, [B, H, T] or None.
_Attended = tuple[Tensor, Tensor, Tensor | None]
_SERVED = ("llama", "mistral", "qwen2")


@dataclass
class _Call:
    """One run of the language model."""

    mask: Tensor | None
    survivors: list[Survivors]  # in decoding known beforehand
    prompts: LastRun | None = None  # in a prefill, with what follows
    visual: Tensor = field(default_factory=lambda: torch.empty(0))  # bool [B, T]
    last: Tensor = field(default_factory=lambda: torch.empty(0))  # int64 [B], the place of each prompt's last token
    layer_mask: Any = None  # of the survivors in work


class DecoderStage:
    """The claim of ``between_layers`` on one language model; ``running`` gives the batch of a prefill, else None."""

    def __init__(
        self, claim: Claim, decoder: Any, image_token_id: int, running: Callable[[], LastRun | None], owner: Attachment
    ):
        assert claim.keep is not None
        self.recipe: Any = claim.recipe
        self.keep = claim.keep
        self.decoder = decoder
        self.image_token_id = image_token_id
        self.running = running
        self.call: _Call | None = None
        self.projections: dict[str, Tensor] = {}
        self.passes: dict[int, Pass] = {}  # by layer, on attention that leaves them
        num_layers = len(decoder.layers)
        self.stops = self.recipe.decoder_layers(num_layers)
        self._check(num_layers)
        if not self.stops:
            return
        owner.override(decoder, "forward", self._wrap_decoder)
        for stop in self.stops:
            attention = decoder.layers[stop - 1].self_attn
            for role in ("q_proj", "k_proj"):
                owner.hook(attention.get_submodule(role).register_forward_hook(functools.partial(self._capture, role)))
        for index in range(min(self.stops), num_layers):
            owner.override(decoder.layers[index], "forward", functools.partial(self._wrap_layer, index))

    def _check(self, num_layers: int) -> None:
        name, config = self.recipe.name, self.decoder.config
        for stop in self.stops:
            if not 1 <= stop < num_layers:
                raise ValueError(f"{name}: expected a decoder layer in [1, {num_layers - 1}], got {stop}")
        sliding = any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ())
        if config.model_type not in _SERVED or sliding or (config.model_type == "mistral" and config.sliding_window):
            raise ValueError(
                f"{name}: expected a language model of type {', '.join(_SERVED)} without sliding windows, got "
                f"{config.model_type}"
            )

    def _capture(self, role: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self.call is not None and self.call.prompts is not None:
            self.projections[role] = output.detach()

    def _wrap_decoder(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def shortening_forward(*args: Any, **kwargs: Any) -> Any:
            self.call = self._begin(**kwargs)
            scored = () if self.call is None or self.call.prompts is None else self.stops
            try:
                with recording({stop - 1: self.decoder.layers[stop - 1].self_attn for stop in scored}) as self.passes:
                    return forward(*args, **kwargs)
            finally:
                self.call = None
                self.projections.clear()
                self.passes.clear()

        return shortening_forward

    def _begin(
        self,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **_others: Any,
    ) -> _Call | None:
        known = survivors_on(past_key_values)
        prompts = self.running()
        if inputs_embeds is None or (known is None and prompts is None):
            return None
        if getattr(past_key_values, "is_compileable", False):
            raise ValueError(f"{self.recipe.name}: expected a cache that grows, got {type(past_key_values).__name__}")
        if attention_mask is not None and (not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2):
            raise ValueError(f"{self.recipe.name}: expected attention_mask [B, L], got one of another form")
        if known is not None:
            return _Call(attention_mask, known)
        assert prompts is not None
        rows, length, _ = inputs_embeds.shape
        # Beams repeat prompts; without a cache new tokens stand behind the prompt, whose last token stays the voter.
        times, new = rows // len(prompts.input_ids), length - prompts.input_ids.shape[1]
        ids = prompts.input_ids.to(inputs_embeds.device).repeat_interleave(times, dim=0)
        visual = pad(ids == self.image_token_id, (0, new))
        if not visual.any():
            return None
        real = torch.ones_like(ids) if attention_mask is None else attention_mask[:, : ids.shape[1]].long()
        last = (real * torch.arange(1, ids.shape[1] + 1, device=ids.device)).argmax(1)
        return _Call(attention_mask, [], prompts, visual, last)

    def _wrap_layer(self, index: int, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def short_forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            call = self.call
            if call is None:
                return forward(hidden, *args, **kwargs)
            if call.prompts is not None and index in self.stops:
                hidden = self._stop(index, call, hidden, kwargs["position_embeddings"])
            now = [part for part in call.survivors if part.layer <= index][-1]
            hidden = forward(hidden, *args, **kwargs | self._arguments(index, call, now, hidden, **kwargs))
            at_end = call.prompts is not None and index == len(self.decoder.layers) - 1
            return now.put_back(hidden) if at_end else hidden

        return short_forward

    def _arguments(
        self,
        index: int,
        call: _Call,
        now: Survivors,
        hidden: Tensor,
        *,
        past_key_values: Any = None,
        position_embeddings: Any,
        **_others: Any,
    ) -> dict[str, Any]:
        """What the layer gets in place of the caller's. Positions leave gaps, which some attention takes for packed
        sequences; the rotary embedding has them already.
        """
        prefill = call.prompts is not None
        if index == now.layer:
            if self.decoder.layers[index].gradient_checkpointing and self.decoder.training:
                raise ValueError(f"{self.recipe.name}: expected no gradient checkpointing, which runs layers again")
            length = now.source.shape[1]
            seen = 0 if prefill else past_key_values.get_seq_length(index) - length + hidden.shape[1]
            call.layer_mask = create_causal_mask(
                config=self.decoder.config,
                inputs_embeds=hidden,
                attention_mask=now.mask(call.mask, seen),
                past_key_values=None if prefill else past_key_values,
                layer_idx=index,
            )
            if prefill and past_key_values is not None:
                note_survivors(past_key_values, call.survivors)
        if prefill:
            position_embeddings = tuple(now.gather(part) for part in position_embeddings)
        return {"attention_mask": call.layer_mask, "position_embeddings": position_embeddings, "position_ids": None}

    def _stop(self, index: int, call: _Call, hidden: Tensor, embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """The survivors' hidden states; notes who they are."""
        if call.survivors:
            before = call.survivors[-1]
            cos, sin = (before.gather(part) for part in embeddings)
        else:
            before = self._everyone(call, hidden)
            cos, sin = embeddings
        attended = self._attended(index - 1, cos, sin)
        states, places = [], []
        for row in range(len(hidden)):
            state, place = self._prompt(index, call, row, before.source[row], hidden[row], attended)
            states.append(state)
            places.append(place)
        call.survivors.append(Survivors.of(index, places, before.length))
        self._note(index, call, places)
        longest = max(map(len, states))
        return torch.stack([pad(state, (0, 0, longest - len(state), 0)) for state in states])

    def _attended(self, index: int, cos: Tensor, sin: Tensor) -> _Attended:
        """What the layer attended with: as its pass left it, or from the projections."""
        projected = [self.projections.pop(role) for role in ("q_proj", "k_proj")]
        if (done := self.passes.pop(index, None)) is not None:
            return done.query, done.key, done.lse
        head_dim = self.decoder.layers[index].self_attn.head_dim
        query, key = (part.unflatten(-1, (-1, head_dim)).transpose(1, 2) for part in projected)
        return *apply_rotary_pos_emb(query, key, cos, sin), None

    def _everyone(self, call: _Call, hidden: Tensor) -> Survivors:
        """Before the first stop: every token at its place."""
        rows, length, _ = hidden.shape
        source = torch.arange(length, device=hidden.device).expand(rows, -1)
        if call.mask is not None:
            source = source.where(call.mask.bool(), -1)
        return Survivors(0, source, length, padded=bool((source < 0).any()))

    def _prompt(
        self, index: int, call: _Call, row: int, source: Tensor, hidden: Tensor, attended: _Attended
    ) -> tuple[Tensor, Tensor]:
        """One prompt's surviving states [n, C] and their places int64 [n]."""
        (slots,) = (source >= 0).nonzero(as_tuple=True)
        place, states = source[slots], hidden[slots]
        (visual,) = call.visual[row, place].nonzero(as_tuple=True)
        if len(visual) == 0:
            return states, place
        assert call.prompts is not None
        seen = slots[place <= call.last[row]]
        times = len(call.visual) // len(call.prompts.input_ids)
        query, key, lse = (None if part is None else part[row : row + 1, :, seen] for part in attended)
        assert query is not None and key is not None
        context = DecoderContext(
            tokens=states[visual].unsqueeze(0),
            visual=visual,
            query=query,
            key=key,
            lse=lse,
            layer=index,
            num_layers=len(self.decoder.layers),
            num_images=call.prompts.rows.count(row // times),
            keep=self.keep,
        )
        tokens, indices = self.recipe.between_layers(context)
        kept = visual[indices[0]]
        stays = torch.ones_like(place, dtype=torch.bool).index_fill(0, visual, False).index_fill(0, kept, True)
        return states.index_copy(0, kept, tokens[0])[stays], place[stays]

    def _note(self, index: int, call: _Call, places: list[Tensor]) -> None:
        """For the run's report: the visual tokens left, numbered within each prompt."""
        assert call.prompts is not None
        number, times = call.visual.cumsum(1) - 1, len(places) // len(call.prompts.input_ids)
        call.prompts.decoder[index] = [
            number[row, places[row][call.visual[row, places[row]]]] for row in range(0, len(places), times)
        ]
