"""One file a Hugging Face family: how a recipe reaches an unmodified model of that family."""

from __future__ import annotations

from typing import Any

from vtkernels.zoo.adapters.base import Adapter

# Where the adapter of a model lives while something is attached to it.
_ATTRIBUTE = "_vtk_adapter"


def adapter_of(model: Any) -> Adapter:
    """The adapter attached to ``model``, or a new one. Raises TypeError for a class that no adapter knows."""
    if (attached := model.__dict__.get(_ATTRIBUTE)) is not None:
        return attached
    from vtkernels.zoo.adapters.llava import LlavaAdapter  # needs transformers, which listing the methods does not

    known = (LlavaAdapter,)
    for adapter in known:
        if isinstance(model, adapter.model_class):
            return adapter(model, _ATTRIBUTE)
    supported = ", ".join(adapter.model_class.__name__ for adapter in known)
    raise TypeError(f"vtkernels.zoo: no adapter for {type(model).__name__}; supported: {supported}")
