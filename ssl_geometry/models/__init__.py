"""Backbones that give pooled features, and the names and activations of their layers.

Every backbone has ``num_features``, takes images (B, 3, H, W) and returns features (B, num_features); it has no
classifier. Weights are the architecture's random initialisation: nothing is downloaded.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssl_geometry.models.backbones import (
        RESNETS,
        SMALL_IMAGE,
        ResNet,
        Stem,
        build_backbone,
        build_vit,
        import_path,
        vit_names,
        why_unknown,
    )

__all__ = [
    "RESNETS",
    "SMALL_IMAGE",
    "ResNet",
    "Stem",
    "build_backbone",
    "build_vit",
    "import_path",
    "vit_names",
    "why_unknown",
]

if not TYPE_CHECKING:  # where mypy looks, a name that is not there stays a mistake

    def __getattr__(name: str) -> Any:
        """The names above: with torch, which the table of published checkpoints below this package does without."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from ssl_geometry.models import backbones

        return getattr(backbones, name)
