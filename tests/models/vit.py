"""Tiny random timm ViTs."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from unittest import mock

import pytest
import torch


@contextlib.contextmanager
def _torchvision() -> Iterator[None]:
    """timm imports torchvision for its data pipeline, of which a ViT needs nothing. PyPI's torchvision does not load
    beside a CPU torch, so the tests do without: an empty stand-in while timm is imported.
    """
    if importlib.util.find_spec("torchvision") is not None:
        yield
        return
    parts = ["", ".datasets", ".datasets.folder", ".models", ".models.feature_extraction", ".ops", ".ops.misc"]
    names = [
        "torchvision" + part for part in [*parts, ".transforms", ".transforms.functional", ".transforms.v2", ".utils"]
    ]
    sys.modules.update({name: mock.MagicMock(__name__=name, __path__=[], __spec__=None) for name in names})
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


if importlib.util.find_spec("timm") is None:
    pytest.skip("timm is not installed", allow_module_level=True)
with _torchvision():
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer

PATCH = 4


def vit(seed: int = 0, *, grid: int = 6, depth: int = 4, distilled: bool = False, **config) -> VisionTransformer:
    """``grid x grid`` patches. Weights are drawn wide, so that scores are far apart."""
    make = VisionTransformerDistilled if distilled else VisionTransformer
    torch.manual_seed(seed)
    model = make(
        img_size=PATCH * grid, patch_size=PATCH, embed_dim=32, depth=depth, num_heads=4, num_classes=5, **config
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model.eval()


def pictures(images: int, *, grid: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(images, 3, PATCH * grid, PATCH * grid, generator=torch.Generator().manual_seed(seed))
