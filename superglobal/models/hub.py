"""Share networks as folders with weights, `config.json` and a model card, on disk or on the Hugging Face Hub."""

from __future__ import annotations

import inspect
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData, snapshot_download
from safetensors.torch import save as safetensors_bytes

from superglobal.errors import InputError, first_line
from superglobal.models.backbone import Backbone
from superglobal.models.network import RetrievalNetwork, make_scales, weights_digest
from superglobal.models.pooling import PoolingConfig
from superglobal.models.weights import (
    Weights,
    architecture,
    cpu_state,
    pooling_to_json,
    read_tensors,
    require_same_shapes,
)
from superglobal.utils.escape import markdown
from superglobal.utils.io import EXPORT, read_json, temporary_folder, write_atomically
from superglobal.utils.provenance import versions

FORMAT = "superglobal-model-1"
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
HUB = "hf:"
UNKNOWN = "unknown"
_TEMPLATE = Path(__file__).with_name("model_card.md")
_TAGS = ["image-retrieval", "landmark-retrieval", "instance-retrieval", "superglobal"]
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
# Fields of the provenance that contain folders of the training machine. They are removed before a model is shared. In
# the other fields, absolute paths are shortened to file names.
_PRIVATE = ("root", "tars")


@dataclass(frozen=True)
class CardResult:
    """Results of one evaluation for a model card.

    Attributes:
        dataset: name of the data set.
        warning: sentences about settings that were tuned; empty if there are none.
        rows: table of results, with one dict from column name to text per row. All rows have the same columns.
        notes: settings that the results depend on, one line each.
        entries: results for the metadata of the card.
    """

    dataset: str
    warning: str
    rows: list[dict[str, str]]
    notes: list[str]
    entries: list[EvalResult]


def save_pretrained(network: RetrievalNetwork, folder: str | Path, card: ModelCard | None = None) -> None:
    """Save a network in a folder that `load_model` can read.

    The loaded network computes bitwise equal descriptors. Absolute paths in the provenance are shortened to file names.

    Args:
        network: network with float32 weights and unchanged layers.
        folder: folder for `model.safetensors`, `config.json` and the model card `README.md`; created if missing.
        card: model card from `model_card`. By default, an existing `README.md` is kept; if there is none, a card
            without results is written.

    Raises:
        InputError: the saved network could not be loaded again, because its layers were changed or have half precision;
            or the folder cannot be written.
    """
    folder = Path(folder)
    state = cpu_state(network)
    _require_reloadable(network)
    provenance = _remove_paths(network.provenance)
    if network.trained_pooling not in (None, asdict(network.config)):
        provenance["trained_pooling"] = pooling_to_json(network.trained_pooling)
    config = {
        "format": FORMAT,
        **architecture(network),
        "scales": list(network.scales),
        "antialias": network.antialias,
        "provenance": provenance,
    }
    write_atomically(folder / WEIGHTS, safetensors_bytes(state, {"format": "pt"}))
    if card is not None or not (folder / CARD).exists():
        write_atomically(folder / CARD, str(card or model_card(network)).encode())
    # `config.json` is written last, because a folder without it does not count as a model.
    write_atomically(folder / CONFIG, f"{json.dumps(config, indent=1)}\n".encode())


def push_to_hub(
    network: RetrievalNetwork,
    repo_id: str,
    card: ModelCard | None = None,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    **options: Any,
) -> str:
    """Upload a network, with its configuration and model card, to a repository on the Hugging Face Hub.

    The uploaded files are those of `save_pretrained`.

    Args:
        network: network with float32 weights and unchanged layers.
        repo_id: "owner/name" of the repository, which is created if missing. Run `hf auth login` first, or pass
            `token`.
        card: model card from `model_card`; by default, a card without results.
        private: make a new repository private; None for the default of the Hub.
        token: access token; None for the token of `hf auth login`.
        options: other arguments of `huggingface_hub.HfApi.upload_folder`, such as `commit_message`, `revision` and
            `create_pr`.

    Returns:
        The URL of the commit.

    Raises:
        InputError: an option is unknown, the uploaded network could not be loaded again, or the Hub rejects the upload.
    """
    known = inspect.signature(HfApi.upload_folder).parameters.keys() - {"self", "repo_id", "folder_path"}
    for name in options:
        if name not in known:
            raise InputError(f"push_to_hub: unknown argument {name}; see huggingface_hub.HfApi.upload_folder")
    with tempfile.TemporaryDirectory(dir=temporary_folder()) as folder:
        save_pretrained(network, folder, card or model_card(network, repo_id=repo_id))
        try:
            api = HfApi(token=token)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            return api.upload_folder(repo_id=repo_id, folder_path=folder, **options)
        except Exception as error:  # errors of the Hub, of HTTP and of files have no common base class
            raise InputError(
                f"{repo_id}: cannot push ({type(error).__name__}: {first_line(error)}); give owner/name of a "
                "repository that you can write to, and run `hf auth login`"
            ) from error


def download(name: str) -> Path:
    """Download a shared model into the cache of huggingface_hub, unless it is already there, and return its folder.

    Args:
        name: "hf:owner/name", or "hf:owner/name@revision" for a branch, tag or commit.

    Raises:
        InputError: the repository does not exist or is not accessible, or there is no connection.
    """
    repo_id, _, revision = name.removeprefix(HUB).partition("@")
    try:
        return Path(snapshot_download(repo_id, revision=revision or None, allow_patterns=[CONFIG, WEIGHTS]))
    except Exception as error:  # errors of the Hub, of HTTP and of files have no common base class
        raise InputError(
            f"{name}: cannot download ({type(error).__name__}: {first_line(error)}); give hf:owner/name of a "
            "repository that you may read (`hf auth login` if it is private), or the folder of a shared model"
        ) from error


def read_folder(folder: Path) -> Weights:
    """Read the weights and the settings of a shared model from a folder that `save_pretrained` wrote.

    Raises:
        InputError: a file is missing or damaged, a field of `config.json` is missing, unknown or of the wrong type, or
            the tensors have changed.
    """
    config = _read_config(folder / CONFIG)
    tensors, _ = read_tensors(folder / WEIGHTS)
    if weights_digest(tensors) != config["digest"]:
        raise InputError(
            f"{folder / WEIGHTS}: the tensors have changed since they were written; download or copy the folder again"
        )
    scales, antialias = make_scales(config["scales"]), config["antialias"]
    try:
        return Weights.from_metadata(tensors, config, config["provenance"], scales=scales, antialias=antialias)
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{folder / CONFIG}: {error}; download or copy the folder again") from error


def model_card(
    network: RetrievalNetwork,
    *,
    results: Sequence[CardResult] = (),
    license: str = UNKNOWN,
    name: str | None = None,
    repo_id: str | None = None,
) -> ModelCard:
    """Create a model card that describes the architecture, training, results and license of a network.

    Args:
        network: network to describe. If it is an export of `train.py`, its provenance contains the training settings.
        results: evaluation results, from `superglobal.reporting.model_card.read_card_results`.
        license: license of the weights, by its identifier on the Hub; it is independent of the license of the code.
        name: title of the card; by default, the name of the repository, or "superglobal-" and the name of the backbone.
        repo_id: "owner/name" of the repository; None for a folder that is not on the Hub.

    Returns:
        The card; `str(card)` is its Markdown.
    """
    training = _escaped(_training(network.provenance))
    source = network.provenance.get("origin", network.provenance)
    title = name or (repo_id or "").rpartition("/")[2] or f"superglobal-{network.backbone.name}"
    data = ModelCardData(
        library_name="superglobal",
        license=license,
        pipeline_tag="image-feature-extraction",
        tags=_TAGS,
        datasets=[training["identity"]["settings"]["data"]["name"]] if training else None,
        model_name=title if results else None,
        eval_results=[entry for result in results for entry in result.entries] or None,
    )
    return ModelCard.from_template(
        data,
        template_str=_TEMPLATE.read_text(encoding="utf-8"),
        title=markdown(title),
        dim=network.dim,
        weights=f"{HUB}{repo_id}" if repo_id else "FOLDER",
        settings=_escaped(_card_settings(network)),
        training=training,
        training_settings=_flatten(training["identity"]["settings"]) if training else {},
        provenance=_escaped(
            {k: v for k, v in _flatten(network.provenance).items() if isinstance(v, str | int | float)}
        ),
        cvnet=_escaped(source) if source.get("format") == "CVNet" else None,
        results=results,
        license=markdown(license),
        version=versions().get("superglobal", UNKNOWN),
    )


def _escaped(value: Any) -> Any:
    """Escape all texts in a nested value for Markdown."""
    if isinstance(value, Mapping):
        return {markdown(str(key)): _escaped(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_escaped(entry) for entry in value]
    return markdown(value) if isinstance(value, str) else value


def _card_settings(network: RetrievalNetwork) -> dict[str, Any]:
    """Return the table of settings in the model card, as a dict from setting to value."""
    return {
        "backbone": network.backbone.name,
        "whitening": f"to {network.dim}" if network.whitening is not None else "none",
        **{f"pooling.{key}": value for key, value in asdict(network.config).items()},
        "scales": ", ".join(f"{scale:g}" for scale in network.scales),
        "antialias": network.antialias,
        "mean, std (RGB, 0..1)": f"{list(network.backbone.mean)}, {list(network.backbone.std)}",
        "smallest side": f"{network.min_side()} px; smaller images are enlarged to it",
        "SHA-256 of the weights": weights_digest(network.state_dict()),
    }


def _training(provenance: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the provenance of the training, as written by `train.py`; None if the weights are not from `train.py`.

    If the weights were converted after the training, the training is described by the entry "origin" of `provenance`.
    """
    if "identity" in provenance:
        return provenance
    return _training(provenance["origin"]) if "origin" in provenance else None


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to one dict from dotted name to value. All names start with `prefix`."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _require_reloadable(network: RetrievalNetwork) -> None:
    """Raise InputError unless the weights are float32 and the layers are those that `load_model` would create."""
    state = network.state_dict()
    dtypes = sorted({str(t.dtype) for t in state.values() if t.is_floating_point() and t.dtype != torch.float32})
    if dtypes:
        raise InputError(f"save: the weights are {', '.join(dtypes)}, expected float32; call model.float() first")
    dim = network.dim if network.whitening is not None else None
    with torch.device("meta"):
        original = RetrievalNetwork(Backbone(network.backbone.name), network.config, dim, network.scales)
    require_same_shapes(original.state_dict(), state, "save: the network has changed layers")


def _remove_paths(value: Any) -> Any:
    """Prepare provenance for sharing: remove private fields, and shorten absolute paths to file names.

    Args:
        value: provenance, or any value nested in it.

    Returns:
        A copy of the value that consists of JSON types.
    """
    if isinstance(value, Mapping):
        return {str(k): _remove_paths(v) for k, v in value.items() if k not in _PRIVATE}
    if isinstance(value, list | tuple):
        return [_remove_paths(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no infinity
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _read_config(path: Path) -> dict[str, Any]:
    """Read and validate `config.json` of a shared model.

    Raises:
        InputError: the file is missing or damaged, or a field is missing, unknown or of the wrong type.
    """
    try:
        config = read_json(path)
    except FileNotFoundError as error:
        export = path.parent / EXPORT
        hint = f"; the network of this training run is {export}" if export.is_file() else ""
        raise InputError(
            f"{path}: no such file; expected the folder of a shared model, with {CONFIG} and {WEIGHTS}{hint}"
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); download or copy the folder again") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        value = config.get("format") if isinstance(config, dict) else config
        raise InputError(
            f"{path}: format {value!r}, expected {FORMAT!r}; give the folder of a model shared by this version of "
            "superglobal"
        )
    _require_fields(path, "", config, _FIELDS)
    kinds = {name: type(field.default) for name, field in PoolingConfig.__dataclass_fields__.items()}
    _require_fields(path, "pooling.", config["pooling"], dict.fromkeys(kinds, (bool, int, float, str)))
    for name in ("mean", "std"):
        if len(config[name]) != 3 or not all(isinstance(v, int | float) for v in config[name]):
            raise InputError(f"{path}: {name}={config[name]}: expected three numbers")
    return config


def _require_fields(path: Path, prefix: str, values: Mapping[str, Any], fields: Mapping[str, tuple[type, ...]]) -> None:
    """Raise InputError unless `values` has exactly the fields in `fields`, each with an allowed type.

    Args:
        path: file of the values, for messages.
        prefix: text before a field's name in messages, such as "pooling.".
        values: dict to validate.
        fields: dict from field name to its allowed types.
    """
    unknown, missing = sorted(set(values) - set(fields)), sorted(set(fields) - set(values))
    errors = [f"unknown fields {', '.join(prefix + name for name in unknown)}"] if unknown else []
    errors += [f"missing fields {', '.join(prefix + name for name in missing)}"] if missing else []
    if errors:
        raise InputError(
            f"{path}: {'; '.join(errors)}; the file was edited or written by another version of superglobal: download "
            "or copy the folder again"
        )
    for name, types in fields.items():
        if not isinstance(values[name], types) or (isinstance(values[name], bool) and bool not in types):
            expected = " or ".join(t.__name__ for t in types)
            raise InputError(f"{path}: {prefix}{name}={values[name]!r}: expected {expected}")
