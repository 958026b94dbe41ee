"""Attach a method to a model, and detach it."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from vtkernels.zoo.adapters import adapter_of
from vtkernels.zoo.adapters.attachment import Attachment, Claim
from vtkernels.zoo.recipe import Recipe
from vtkernels.zoo.registry import make_recipe


class Handle:
    """A method on a model, until :meth:`remove` or the end of a ``with`` block."""

    def __init__(self, adapter: Attachment, claim: Claim):
        self._adapter = adapter
        self._claim = claim
        self._attached = True

    @property
    def recipe(self) -> Recipe:
        return self._claim.recipe

    @property
    def keep(self) -> int:
        """Tokens kept of each image."""
        return self._adapter.encoder.num_patches if self._claim.keep is None else self._claim.keep

    @property
    def last(self) -> Any:
        """What the last call with images did: a LastRun, or a TowerRun of a vision transformer alone; None before.

        It stays readable after :meth:`remove`.
        """
        return self._adapter.last

    def remove(self) -> None:
        """Detaches; the model is as it was before :func:`apply`. Removing twice is harmless."""
        if self._attached:
            self._attached = False
            self._adapter.detach(self._claim)

    def __enter__(self) -> Handle:
        if not self._attached:
            raise RuntimeError(f"{self.recipe.name}: this handle was removed; call zoo.apply again")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def apply(model: Any, method: str | Recipe, keep: int | float | str | None = "all", **options: Any) -> Handle:
    """Attaches a pruning or merging method to an unmodified model instance.

    ``model(**inputs)`` and ``model.generate(**inputs)`` then take the processor's ordinary inputs. The tokens that the
    method drops leave the prompt, placeholder and all; the remaining positions are contiguous. ``forward`` returns the
    logits of the shortened prompt, each row padded on its own side (``handle.last`` has its ids and mask);
    ``generate`` returns the prompt as given, followed by the new tokens. Prompts without images pass through, and so
    do calls in which nothing is dropped.

    A vision transformer alone (CLIPVisionModel, SiglipVisionModel, timm's VisionTransformer) takes the methods that
    merge inside its layers; it then returns what it computes from fewer tokens, and ``handle.last`` is a TowerRun.

    Args:
        model: a model of a supported class (LlavaForConditionalGeneration or one of those above). Detach before copying
            or pickling it.
        method: a name of :func:`vtkernels.zoo.methods`, or a recipe.
        keep: tokens to keep of each image: an int, a ratio in (0.0, 1.0] rounded to the nearest token (Python's round,
            ties to even, at least one; the same rule for every method, so that budgets compare), or "all" or None. A
            method's own option for it (``r``, ``ratio``) stands instead.
        options: the method's options.

    A method of the cache makes the cache of every call that fills one and brings none; it needs the attention
    ``"vtk"`` (``model.set_attn_implementation("vtk")``).

    Returns:
        A handle to detach with, which is also a context manager.

    Raises:
        TypeError: a model class that no adapter knows, an unknown option, a keep of another type, or any for a method
            of the cache alone.
        ValueError: an unknown method, an option or budget out of range, a method that needs a [CLS] token on an
            encoder without one, or a stage that another attached method claims.
        NotImplementedError: a stage that the model's adapter does not serve.

    Example::

        with zoo.apply(model, "fastervlm", keep=64) as handle:
            ids = model.generate(**inputs, max_new_tokens=32)
        handle.last.indices  # [images, 64]
        with zoo.apply(timm.create_model("vit_base_patch16_224"), "tome", r=13) as handle:
            logits = model(pictures)  # 41 of 197 tokens at the end
    """
    if isinstance(method, Recipe):
        if options:
            raise TypeError(f"{method.name}: options belong to the recipe, got {', '.join(options)} beside it")
        recipe = method
    else:
        recipe = make_recipe(method, **options)
    adapter = adapter_of(model)
    wanted = _budget(recipe.name, keep, adapter.encoder.num_patches)
    if wanted is not None and recipe.stages() == ("cache",):
        raise TypeError(
            f"{recipe.name}: expected no keep, since the cache's methods drop no visual token of the prompt"
        )
    claim = Claim(recipe, recipe.budget(adapter.encoder, wanted))
    adapter.attach(claim)
    return Handle(adapter, claim)


def _budget(name: str, keep: int | float | str | None, total: int) -> int | None:
    """Tokens an image, or None for all."""
    if keep is None or keep == "all":
        return None
    if isinstance(keep, bool) or not isinstance(keep, (int, float)):
        raise TypeError(f"{name}: expected keep as an int, a float or 'all', got {keep!r}")
    if isinstance(keep, float):
        if not 0 < keep <= 1:
            raise ValueError(f"{name}: expected a keep ratio in (0, 1], got {keep}")
        return max(1, round(keep * total))
    if not 1 <= keep <= total:
        raise ValueError(f"{name}: expected keep in [1, {total}] tokens an image, got {keep}")
    return keep
