"""A network as a folder that says everything about itself: `model.safetensors` and `config.json`.

The same folder is a repository on Hugging Face's hub. Whoever loads it gets the network that was saved, to the bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from superglobal.errors import InputError, first_line
from superglobal.models.backbone import Backbone
from superglobal.models.network import RetrievalNetwork, make_scales, weights_digest
from superglobal.models.pooling import PoolingConfig
from superglobal.models.weights import Weights, plain_pooling, pooling_from, read_tensors, require_fit
from superglobal.utils.io import EXPORT, write_atomically

FORMAT = "superglobal-model-1"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
HUB = "hf:"
_FIELDS: dict[str, tuple[type, ...]] = {
    "format": (str,),
    "backbone": (str,),
    "dim": (int, type(None)),
    "pooling": (dict,),
    "scales": (list,),
    "antialias": (bool,),
    "mean": (list,),
    "std": (list,),
    "digest": (str,),
    "provenance": (dict,),
}
# Places on the machine that trained are nobody else's business: these are left out, of other paths the name stays.
_PRIVATE = ("root", "tars")


def write_folder(network: RetrievalNetwork, folder: Path) -> None:
    """Write `network` into `folder`; `config.json` comes last and makes it whole.

    Raises:
        InputError: the network is not what a name and switches describe (layers of its own, half precision), so that
            it could not be loaded again; or the place cannot be written.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    _require_plain(network, state)
    provenance = _public(network.provenance)
    if network.trained_pooling not in (None, asdict(network.config)):
        provenance["trained_pooling"] = plain_pooling(network.trained_pooling)
    about = {
        "format": FORMAT,
        "backbone": network.backbone.name,
        "dim": network.dim if network.whitening is not None else None,
        "pooling": plain_pooling(asdict(network.config)),
        "scales": list(network.scales),
        "antialias": network.antialias,
        "mean": list(network.backbone.mean),
        "std": list(network.backbone.std),
        "digest": weights_digest(state),
        "provenance": provenance,
    }
    write_atomically(folder / WEIGHTS, safetensors_bytes(state, {"format": "pt"}))
    write_atomically(folder / CONFIG, f"{json.dumps(about, indent=1)}\n".encode())


def read_folder(folder: Path) -> Weights:
    """What `write_folder` wrote.

    Raises:
        InputError: a file is missing or damaged, a field missing, unknown or of another type, or the tensors are not
            the ones that were written.
    """
    about = _read_config(folder / CONFIG)
    tensors, _ = read_tensors(folder / WEIGHTS)
    if weights_digest(tensors) != about["digest"]:
        raise InputError(f"{folder / WEIGHTS}: the tensors are not the ones that were written; get the folder again")
    return Weights(
        tensors,
        "superglobal",
        backbone=about["backbone"],
        dim=about["dim"],
        pooling=pooling_from(about["pooling"]),
        mean=tuple(about["mean"]),
        std=tuple(about["std"]),
        scales=make_scales(about["scales"]),
        antialias=about["antialias"],
        provenance=about["provenance"],
    )


def fetch(repo_id: str, revision: str | None = None, **options: Any) -> Path:
    """The folder of a repository of the hub, downloaded into huggingface_hub's cache where it is not there yet.

    Args:
        repo_id: "owner/name".
        revision: branch, tag or commit.
        options: of `huggingface_hub.snapshot_download`.

    Raises:
        InputError: no such repository, no access, or no network.
    """
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=[CONFIG, WEIGHTS], **options))
    except Exception as error:  # hub, http and file errors share no base class
        raise InputError(
            f"{hub_name(repo_id, revision)}: no such folder here, and it could not be had from the hub "
            f"({type(error).__name__}: {first_line(error)}); give the folder of a shared model, or owner/name of a "
            "repository that you may read (`hf auth login` if it is private)"
        ) from error


def hub_name(repo_id: str, revision: str | None = None) -> str:
    """What `weights=` calls a repository."""
    return f"{HUB}{repo_id}" + (f"@{revision}" if revision else "")


def parse_hub_name(name: str) -> tuple[str, str | None]:
    """Repository and revision of "hf:owner/name" or "hf:owner/name@revision"."""
    repo_id, _, revision = name.removeprefix(HUB).partition("@")
    return repo_id, revision or None


def _require_plain(network: RetrievalNetwork, state: Mapping[str, Tensor]) -> None:
    odd = sorted({str(t.dtype) for t in state.values() if t.is_floating_point() and t.dtype != torch.float32})
    if odd:
        raise InputError(f"save: the network holds {', '.join(odd)}; networks are shared in float32: model.float()")
    dim = network.dim if network.whitening is not None else None
    with torch.device("meta"):
        fresh = RetrievalNetwork(Backbone(network.backbone.name), network.config, dim, network.scales)
    require_fit(fresh.state_dict(), state, "save: the network has changed layers, and")


def _public(provenance: Any) -> Any:
    if isinstance(provenance, Mapping):
        return {str(k): _public(v) for k, v in provenance.items() if k not in _PRIVATE}
    if isinstance(provenance, list | tuple):
        return [_public(v) for v in provenance]
    if isinstance(provenance, float) and not math.isfinite(provenance):
        return str(provenance)  # JSON has no infinity
    return Path(provenance).name if isinstance(provenance, str) and Path(provenance).is_absolute() else provenance


def _read_config(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        there = f"; the network of this training is {path.parent / EXPORT}" if (path.parent / EXPORT).is_file() else ""
        raise InputError(
            f"{path}: no such file; a shared model is a folder with {CONFIG} and {WEIGHTS}{there}"
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); get the folder again") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        found = about.get("format") if isinstance(about, dict) else about
        raise InputError(f"{path}: format {found!r} is not {FORMAT!r}: no model of superglobal, or of another version")
    _require_fields(path, "", about, _FIELDS)
    kinds = {name: type(field.default) for name, field in PoolingConfig.__dataclass_fields__.items()}
    _require_fields(path, "pooling.", about["pooling"], dict.fromkeys(kinds, (bool, int, float, str)))
    for name in ("mean", "std"):
        if len(about[name]) != 3 or not all(isinstance(v, int | float) for v in about[name]):
            raise InputError(f"{path}: {name}={about[name]}: expected three numbers")
    return about


def _require_fields(path: Path, prefix: str, found: Mapping[str, Any], fields: Mapping[str, tuple[type, ...]]) -> None:
    """Exactly these fields, each of its types."""
    unknown, missing = sorted(set(found) - set(fields)), sorted(set(fields) - set(found))
    faults = [f"unknown fields {', '.join(prefix + name for name in unknown)}"] if unknown else []
    faults += [f"missing fields {', '.join(prefix + name for name in missing)}"] if missing else []
    if faults:
        raise InputError(f"{path}: {'; '.join(faults)}: written by another version of superglobal, or changed by hand")
    for name, types in fields.items():
        if not isinstance(found[name], types) or (isinstance(found[name], bool) and bool not in types):
            raise InputError(
                f"{path}: {prefix}{name}={found[name]!r}: expected {' or '.join(t.__name__ for t in types)}"
            )
