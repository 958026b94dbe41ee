"""How recipes come onto a model, and off it again without a trace."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from vtkernels.zoo.adapters.vit import LayerMerger, VitLayer
from vtkernels.zoo.merging import LayerMerging
from vtkernels.zoo.recipe import Encoder, Recipe, Stage
from vtkernels.zoo.reuse import LayerReuse

_ABSENT = object()


@dataclass(frozen=True)
class Claim:
    """A recipe on a model, with its budget: tokens an image, or None for all."""

    recipe: Recipe
    keep: int | None


class Attachment(ABC):
    """What every adapter is, one instance a model. It lives on the model while at least one recipe is attached."""

    model_class: ClassVar[type | tuple[type, ...]]
    serves: ClassVar[tuple[Stage, ...]]
    reuses: ClassVar[bool] = False  # serves a LayerReuse in the stage vision_layers

    def __init__(self, model: Any, attribute: str):
        self.model = model
        self.attribute = attribute
        self.encoder = self.describe_encoder()
        self.claims: dict[Stage, Claim] = {}
        self.merger: LayerMerger | None = None  # while a recipe merges inside the encoder
        self._undo: list[Callable[[], None]] = []

    @abstractmethod
    def describe_encoder(self) -> Encoder:
        """Raises ValueError for a configuration that the adapter does not serve."""

    @abstractmethod
    def install(self) -> None:
        """Hooks and overrides, through :meth:`hook`, :meth:`override` and :meth:`install_merger`."""

    @property
    @abstractmethod
    def last(self) -> Any:
        """What the last call did; None before the first."""

    def attach(self, claim: Claim) -> None:
        self._validate(claim)
        before = dict(self.claims)
        self.claims.update(dict.fromkeys(claim.recipe.stages(), claim))
        try:
            self._reinstall()
        except BaseException:
            self.claims = before
            self._reinstall()
            raise

    def detach(self, claim: Claim) -> None:
        self.claims = {stage: other for stage, other in self.claims.items() if other is not claim}
        self._reinstall()

    def hook(self, handle: Any) -> None:
        """Keeps a torch hook handle until detach."""
        self._undo.append(handle.remove)

    def override(self, owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Puts ``wrap(owner.name)`` in the owner's instance attributes until detach, under the same signature."""
        original = getattr(owner, name)
        before = owner.__dict__.get(name, _ABSENT)
        owner.__dict__[name] = functools.wraps(original)(wrap(original))

        def undo() -> None:
            if before is _ABSENT:
                owner.__dict__.pop(name, None)
            else:
                owner.__dict__[name] = before

        self._undo.append(undo)

    def install_merger(
        self, layers: Sequence[VitLayer], prefix: int, active: Callable[[], bool] = lambda: True
    ) -> LayerMerger | None:
        """The claim of ``vision_layers``, if there is one that merges anything, in the encoder's layers."""
        claim = self.claims.get("vision_layers")
        if claim is None or claim.keep is None or isinstance(claim.recipe, LayerReuse):
            return None
        if not isinstance(claim.recipe, LayerMerging):
            raise TypeError(f"{claim.recipe.name}: expected a LayerMerging or a LayerReuse for the stage vision_layers")
        schedule = claim.recipe.schedule(self.encoder, claim.keep)
        if not any(schedule):
            return None
        merger = LayerMerger(claim.recipe, schedule, self.encoder, prefix, active)
        for index, (layer, r) in enumerate(zip(layers, schedule, strict=False)):
            self.override(layer.module, "forward", functools.partial(merger.wrap, index, layer))
            if r > 0:
                self.hook(layer.projection.register_forward_hook(merger.capture(layer)))
        return merger

    def _validate(self, claim: Claim) -> None:
        recipe, family = claim.recipe, type(self.model).__name__
        for stage in recipe.stages():
            if stage not in self.serves:
                raise NotImplementedError(
                    f"{recipe.name}: stage {stage} is not served for {family}; served: {', '.join(self.serves)}"
                )
            if stage in self.claims:
                raise ValueError(
                    f"{recipe.name}: stage {stage} of this model is claimed by {self.claims[stage].recipe.name}; "
                    "remove that handle first"
                )
        if isinstance(recipe, LayerReuse) and not self.reuses:
            raise NotImplementedError(f"{recipe.name}: layers that reuse results are not served for {family}")
        if recipe.needs_cls and not self.encoder.has_cls:
            raise ValueError(f"{recipe.name}: needs a [CLS] token, which this model's vision encoder does not have")
        for layer in recipe.attention_layers(self.encoder):
            if not 0 <= layer < self.encoder.num_layers:
                raise ValueError(
                    f"{recipe.name}: expected an encoder layer in [0, {self.encoder.num_layers - 1}], got {layer}"
                )
        if claim.keep is not None:
            recipe.check(self.encoder, claim.keep)

    def _reinstall(self) -> None:
        while self._undo:
            self._undo.pop()()
        self.model.__dict__.pop(self.attribute, None)
        if self.claims:
            self.model.__dict__[self.attribute] = self
            self.install()
