"""One file a family of models: how a recipe reaches an unmodified model of that family."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from vtkernels.zoo.adapters.attachment import Attachment

# Where the adapter of a model lives while something is attached to it.
_ATTRIBUTE = "_vtk_adapter"


def adapter_of(model: Any) -> Attachment:
    """The adapter attached to ``model``, or a new one. Raises TypeError for a class that no adapter knows."""
    if (attached := model.__dict__.get(_ATTRIBUTE)) is not None:
        return attached
    for adapter in _known():
        if isinstance(model, adapter.model_class):
            return adapter(model, _ATTRIBUTE)
    raise TypeError(
        f"vtkernels.zoo: no adapter for {type(model).__name__}; supported: LlavaForConditionalGeneration, "
        "CLIPVisionModel, SiglipVisionModel, timm's VisionTransformer"
    )


def _known() -> Iterator[type[Attachment]]:
    """Of the libraries that are imported: a model of another one cannot be."""
    if "transformers" in sys.modules:
        from vtkernels.zoo.adapters.llava import LlavaAdapter
        from vtkernels.zoo.adapters.transformers_vit import TransformersVitAdapter

        yield from (LlavaAdapter, TransformersVitAdapter)
    if "timm" in sys.modules:
        from vtkernels.zoo.adapters.timm_vit import TimmVitAdapter

        yield TimmVitAdapter
