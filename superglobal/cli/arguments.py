"""What scripts that load a network take on the command line."""

from __future__ import annotations

import argparse

from superglobal.errors import InputError
from superglobal.models.factory import load_model
from superglobal.models.network import RetrievalNetwork
from superglobal.models.pooling import PRESETS


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    """WEIGHTS and the settings over what they say, as `load_model` has them."""
    parser.add_argument("weights", help="as eval.py's weights=: a path, hf:owner/name, timm, package or random")
    parser.add_argument("--backbone", help="timm's name, where the weights do not say it")
    parser.add_argument("--pooling", choices=list(PRESETS), help="by default what the weights say")
    parser.add_argument("--scales", help="1, 3, 5 or a list such as 0.7071,1.0; by default what the weights say, or 3")


def network_of(args: argparse.Namespace) -> RetrievalNetwork:
    """The network that was asked for.

    Raises:
        InputError: see `load_model`.
    """
    return load_model(args.weights, backbone=args.backbone, pooling=args.pooling, scales=_scales(args.scales))


def _scales(text: str | None) -> int | list[float] | None:
    if text is None:
        return None
    try:
        return [float(word) for word in text.split(",")] if "," in text or "." in text else int(text)
    except ValueError as error:
        raise InputError(f"--scales {text}: expected 1, 3, 5 or a list such as 0.7071,1.0") from error
