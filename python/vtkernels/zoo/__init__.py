"""The zoo: published pruning and merging methods, composed from the ops and attached to unmodified models.

``methods()`` lists them, ``apply(model, name, keep=...)`` attaches one. A method is a :class:`Recipe` in ``methods/``;
how it reaches a model family is an adapter in ``adapters/``.
"""

from vtkernels.zoo.apply import Handle, apply
from vtkernels.zoo.caching import CacheContext
from vtkernels.zoo.merging import LayerContext, LayerMerge, LayerMerging
from vtkernels.zoo.proportional import size_bias
from vtkernels.zoo.recipe import STAGES, Context, Encoder, Recipe
from vtkernels.zoo.registry import Method, make_recipe, methods

__all__ = [
    "STAGES",
    "CacheContext",
    "Context",
    "Encoder",
    "Handle",
    "LayerContext",
    "LayerMerge",
    "LayerMerging",
    "Method",
    "Recipe",
    "apply",
    "make_recipe",
    "methods",
    "size_bias",
]
