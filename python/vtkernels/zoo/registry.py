"""Which methods there are, and a recipe from a name and options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vtkernels.zoo.methods import RECIPES
from vtkernels.zoo.recipe import Recipe, Stage


@dataclass(frozen=True)
class Method:
    """One line of the registry. ``needs_cls`` and ``reads_question`` are those of the default options."""

    name: str
    title: str
    reference: str
    status: str
    stages: tuple[Stage, ...]
    options: dict[str, Any]
    needs_cls: bool
    reads_question: bool
    training_free: bool
    merges: bool
    video: bool


def methods() -> tuple[Method, ...]:
    """Every method of the zoo.

    Example:
        >>> from vtkernels import zoo
        >>> [method.name for method in zoo.methods() if "vision_layers" in method.stages]
        ['tome', 'pitome', 'tinychart', 'auroracap', 'simvlg', 'stc_cacher']
    """
    return tuple(_describe(recipe) for recipe in RECIPES)


def make_recipe(name: str, **options: Any) -> Recipe:
    """The recipe called ``name``.

    Raises:
        ValueError: an unknown name, or an option's value out of range.
        TypeError: an unknown option.
    """
    known = {recipe.name: recipe for recipe in RECIPES}
    if name not in known:
        raise ValueError(f"vtkernels.zoo: unknown method {name!r}; known methods: {', '.join(known)}")
    recipe = known[name]
    if unknown := sorted(set(options) - set(recipe.options())):
        accepted = ", ".join(recipe.options()) or "none"
        raise TypeError(f"{name}: unknown option {', '.join(unknown)}; options: {accepted}")
    return recipe(**options)


def _describe(recipe: type[Recipe]) -> Method:
    default = recipe()
    return Method(
        name=recipe.name,
        title=recipe.title,
        reference=recipe.reference,
        status=recipe.status,
        stages=recipe.stages(),
        options=recipe.options(),
        needs_cls=default.needs_cls,
        reads_question=default.reads_question,
        training_free=recipe.training_free,
        merges=recipe.merges,
        video=recipe.video,
    )
