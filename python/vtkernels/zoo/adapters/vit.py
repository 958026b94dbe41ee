"""Merging inside the layers of a vision transformer, whichever library it comes from.

While a recipe merges, the layers up to the one whose output is used have ``forward`` as an instance attribute, which
runs the layer's own modules in two halves, attention and MLP, and merges between them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vtkernels.zoo.merging import LayerContext, LayerMerge, LayerMerging
from vtkernels.zoo.proportional import size_bias
from vtkernels.zoo.recipe import Encoder


@dataclass(frozen=True)
class VitLayer(ABC):
    """What the merging needs of one layer ``x + attention(norm(x))``, ``x + mlp(norm(x))``."""

    module: Any

    @property
    @abstractmethod
    def projection(self) -> nn.Module:
        """The module that projects the keys."""

    @abstractmethod
    def keys(self, projected: Tensor) -> Tensor:
        """[B, H, N, D], of what the projection returned."""

    @abstractmethod
    def attend(self, x: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """The first half, with an additive bias [B, 1, 1, N] and whatever else the layer was called with."""

    @abstractmethod
    def feed_forward(self, x: Tensor) -> Tensor:
        """The second half."""

    @abstractmethod
    def check(self, weighs_keys: bool) -> None:
        """Raises ValueError where the layer cannot be run so: checkpointed, or without a place for the bias."""


@dataclass(frozen=True)
class TowerRun:
    """What the last run of a vision transformer did.

    Attributes:
        owner: int64 [images, tokens], the output token that each input token is in; [CLS] and its like, which come
            first, are in themselves.
        size: float32 [images, output tokens], how many tokens each one stands for; None for a method that does not
            track sizes.
        prefix: tokens at the front that do not merge.
    """

    owner: Tensor
    size: Tensor | None
    prefix: int


class LayerMerger:
    """Runs a recipe in the layers of one tower: ``schedule[l]`` tokens merge away in layer l.

    ``active`` says for each run whether to merge. ``run`` is what the last one did, None before the first.
    """

    def __init__(
        self,
        recipe: LayerMerging,
        schedule: Sequence[int],
        encoder: Encoder,
        prefix: int,
        active: Callable[[], bool] = lambda: True,
    ):
        self.recipe = recipe
        self.schedule = schedule
        self.encoder = encoder
        self.prefix = prefix
        self.active = active
        self.run: TowerRun | None = None
        self._size: Tensor | None = None
        self._owner = torch.empty(0)
        self._keys: Tensor | None = None

    def patch_owner(self) -> Tensor:
        """int64 [images, patches]: the output token, [CLS] and its like not counted, of each patch in the last run."""
        assert self.run is not None
        return self.run.owner[:, self.prefix :] - self.prefix

    def capture(self, layer: VitLayer) -> Callable[..., None]:
        """A forward hook of ``layer.projection``."""

        def hook(module: nn.Module, args: tuple[Any, ...], projected: Tensor) -> None:
            if self.active():
                self._keys = layer.keys(projected.detach())

        return hook

    def wrap(self, index: int, layer: VitLayer, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The layer's ``forward``, merging."""

        def merging_forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if not self.active():
                return forward(x, *args, **kwargs)
            if index == 0:
                self._start(x, layer)
            if self.schedule[index] == 0 and self._size is None:
                x = forward(x, *args, **kwargs)
            else:
                x = self._through(index, layer, x, args, kwargs)
            return self._finish(x) if index == len(self.schedule) - 1 else x

        return merging_forward

    def _start(self, x: Tensor, layer: VitLayer) -> None:
        images, n, _ = x.shape
        if n != self.prefix + self.encoder.num_patches:
            raise ValueError(
                f"{self.recipe.name}: expected {self.encoder.num_patches} patches ({self.encoder.grid[0]} x "
                f"{self.encoder.grid[1]}) behind {self.prefix} other tokens, got {n} tokens in all"
            )
        layer.check(self.recipe.weighs_keys)
        self._size = None
        self._owner = torch.arange(n, device=x.device).expand(images, -1)

    def _through(self, index: int, layer: VitLayer, x: Tensor, args: Any, kwargs: Any) -> Tensor:
        bias = None
        if self._size is not None and self.recipe.weighs_keys:
            bias = size_bias(self._size, dtype=x.dtype)
        x = layer.attend(x, bias, *args, **kwargs)
        if self.recipe.after_mlp:
            return self._merge(index, layer.feed_forward(x))
        return layer.feed_forward(self._merge(index, x))

    def _merge(self, index: int, x: Tensor) -> Tensor:
        if self.schedule[index] == 0:
            return x
        if self._keys is None:
            # A tower that was compiled before the recipe was attached never calls the hooks.
            raise RuntimeError(f"{self.recipe.name}: encoder layer {index} gave no keys; attach first")
        context = LayerContext(
            # NOTE: SigLIP's features keep the channel-first strides of its patch convolution through every residual;
            # the ops gather rows.
            tokens=x if x.stride(-1) == 1 else x.contiguous(),
            keys=self._keys,
            size=self._size,
            prefix=self.prefix,
            layer=index,
            num_layers=self.encoder.num_layers,
            r=self.schedule[index],
        )
        self._keys = None
        merge = self.recipe.vision_layers(context)
        self._size = merge.size
        self._owner = merge.owner.gather(1, self._owner)
        return merge.tokens

    def _finish(self, x: Tensor) -> Tensor:
        end = LayerMerge(x, self._owner, self._size)
        if self.recipe.order == "position":
            end = end.permuted(self._by_first_token(x.shape[1]))
        self.run = TowerRun(end.owner, end.size, self.prefix)
        return end.tokens

    def _by_first_token(self, rows: int) -> Tensor:
        """int64 [images, rows]: the rows in the order of the first token in each."""
        images, n = self._owner.shape
        place = torch.arange(n, device=self._owner.device).expand(images, -1)
        return place.new_full((images, rows), n).scatter_reduce(1, self._owner, place, "amin").argsort(1)
