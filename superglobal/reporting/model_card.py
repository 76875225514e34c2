"""The model card of a shared network: what it is, what it was trained on, what it scores and by which rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from superglobal.errors import InputError
from superglobal.models.network import weights_digest
from superglobal.reporting import results as report
from superglobal.reporting.runs import flat, read_result
from superglobal.reporting.runs import read_results as read_folder
from superglobal.utils.provenance import versions

if TYPE_CHECKING:
    from superglobal.models.network import RetrievalNetwork
UNKNOWN = "unknown"
_STAGES = {"search": "", "rerank": ", reranked"}
_TAGS = ["image-retrieval", "landmark-retrieval", "instance-retrieval", "superglobal"]
_CITATION = """@inproceedings{shao2023global,
  title = {Global Features are All You Need for Image Retrieval and Reranking},
  author = {Shao, Shihao and Chen, Kaifeng and Karpur, Arjun and Cui, Qinghua and Araujo, Andr{\\'e} and Cao, Bingyi},
  booktitle = {ICCV},
  year = {2023}
}"""


def model_card(
    network: RetrievalNetwork,
    *,
    results: Sequence[str | Path] = (),
    license: str = UNKNOWN,
    name: str | None = None,
    repo_id: str | None = None,
) -> ModelCard:
    """Make a model card.

    Args:
        network: its settings and its `provenance` (an export of `train.py` brings that of its training).
        results: `results.json` files of `eval.py`, or folders with such files below them.
        license: of the weights, as the hub calls licences; the code's own says nothing about them.
        name: of the model; by default that of the repository, or its backbone's.
        repo_id: "owner/name" where it will be.

    Raises:
        InputError: a result without numbers, of another network, or of no network.
    """
    found = read_results(results, network)
    training = _training(network.provenance)
    title = name or (repo_id or "").rpartition("/")[2] or f"superglobal-{network.backbone.name}"
    data = ModelCardData(
        library_name="superglobal",
        license=license,
        pipeline_tag="image-feature-extraction",
        tags=_TAGS,
        datasets=[training["settings"]["data"]["name"]] if training else None,
        model_name=title if found else None,
        eval_results=[entry for summary in found for entry in _entries(summary)] or None,
    )
    parts = [
        f"# {title}",
        f"An RGB image of any size becomes one vector of {network.dim} numbers and unit norm; the inner product of two "
        f"vectors says how alike their photos are. Made of {network.backbone.name} and pooling as in "
        "[SuperGlobal (ICCV 2023)](https://arxiv.org/abs/2308.06954).",
        "## Use",
        _usage(repo_id or "FOLDER"),
        "## Network",
        _table({"backbone": network.backbone.name, **_described(network)}),
        "## Training",
        _trained(network, training),
        "## Results",
        "\n\n".join(_scores(summary) for summary in found) or "None were given when this card was made.",
        "## Licence",
        _licence(license, network.provenance),
        "## Citation",
        f"```bibtex\n{_CITATION}\n```",
        f"Made by superglobal {versions().get('superglobal', UNKNOWN)}.",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def read_results(paths: Sequence[str | Path], network: RetrievalNetwork) -> list[dict[str, Any]]:
    """Results that have numbers and are of this network's weights, whatever the switches they were made with.

    Raises:
        InputError: none there, without numbers, or of other weights.
    """
    digest = weights_digest(network.state_dict())
    found: list[dict[str, Any]] = []
    for path in map(Path, paths):
        for summary in _read(path):
            where = summary["place"]
            if summary["status"] != "ok" or not summary["metrics"]:
                why = "made without labels" if summary["status"] == "ok" else summary["status"]
                raise InputError(f"{where}: has no numbers ({why}); leave it out")
            of = summary["about"].get("network", {}).get("weights")
            if of != digest:
                whose = f"weights {of[:12]}..." if of else "no network (own descriptors)"
                raise InputError(f"{where}: scores of {whose}, but this network is {digest[:12]}...; leave it out")
            found.append(summary)
    return found


def _read(path: Path) -> list[dict[str, Any]]:
    if path.is_dir():
        # Rows of an ablation that do not apply to this backbone are part of a sweep.
        rows = [summary for summary in read_folder(path) if summary["status"] != "n/a"]
        return [{**summary, "place": str(path / summary["place"])} for summary in rows]
    return [{**read_result(path), "place": str(path)}]


def _training(provenance: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `train.py` wrote of itself, from however deep it lies."""
    if "identity" in provenance:
        return {**provenance["identity"], **{k: provenance.get(k) for k in ("val_map", "step", "versions", "git")}}
    return _training(provenance["origin"]) if "origin" in provenance else None


def _entries(summary: Mapping[str, Any]) -> list[EvalResult]:
    """One per stage and protocol, for the card's head."""
    tuned = _tuned(summary)
    entries = []
    for stage, metrics in summary["metrics"].items():
        called = report.METRICS[report.metric_key(metrics)]
        for protocol, value in report.main_scores(metrics).items():
            if value is None:
                continue
            entries.append(
                EvalResult(
                    task_type="image-retrieval",
                    dataset_type=summary["config"]["dataset"]["name"],
                    dataset_name=summary["dataset"],
                    metric_type=called,
                    metric_name=f"{called} {protocol}{_STAGES.get(stage, ', ' + stage)}{'; ' + tuned if tuned else ''}",
                    metric_value=round(100 * value, 2),
                    metric_args={"settings": _settings(summary)},
                )
            )
    return entries


def _scores(summary: Mapping[str, Any]) -> str:
    """A result as a table, with everything that moves its numbers."""
    rows = [
        {"stage": stage, "protocol": protocol, **report.metric_cells(metrics, protocol)}
        for stage, metrics in summary["metrics"].items()
        for protocol in report.main_scores(metrics)
    ]
    columns = list(rows[0])
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [f"| {' | '.join(row.get(column, '') for column in columns)} |" for row in rows]
    counts, protocol = summary["counts"], summary["protocol"]
    notes = [f"{counts['queries']} queries, {counts['database']} images; role of the set: {summary['role']}"]
    notes.append(_settings(summary))
    notes.append(report.sizes_text(protocol))
    if protocol["crop_query"] is not None:
        notes.append(f"queries {'cropped to their boxes' if protocol['crop_query'] else 'not cropped'}")
    told = ("crop_query", "max_side", "min_side")
    notes += [f"{key.replace('_', ' ')}: {value}" for key, value in protocol.items() if key not in told]
    if "index" in summary["about"]:
        notes.append(report.approximation_text(summary["about"]["index"]).replace("\n", "; "))
    versions = summary["versions"]
    notes.append(
        "versions: " + ", ".join(f"{k} {versions[k]}" for k in ("superglobal", "torch", "timm") if k in versions)
    )
    tuned = _tuned(summary)
    warning = f"**{tuned[0].upper()}{tuned[1:]}.**" if tuned else ""
    if any(one.endswith(report.TEST_MARK) for one in summary["tuned_on"]):
        warning += " **These numbers are no estimate of what other photos would give, and compare with nothing.**"
    head = f"### {summary['dataset']}\n\nIn percent, 95 % intervals by bootstrap."
    return "\n\n".join(filter(None, [head, warning, "\n".join(lines), "\n".join(f"- {note}" for note in notes)]))


def _tuned(summary: Mapping[str, Any]) -> str:
    return f"settings tuned on {', '.join(summary['tuned_on'])}" if summary["tuned_on"] else ""


def _settings(summary: Mapping[str, Any]) -> str:
    network = summary["about"]["network"]
    scales = ", ".join(f"{scale:g}" for scale in network["scales"])
    filtered = "with" if network["antialias"] else "without"
    return f"{report.modules_text(summary)}; scales {scales}, {filtered} antialias; {network['precision']}"


def _described(network: RetrievalNetwork) -> dict[str, Any]:
    return {
        "whitening": f"to {network.dim}" if network.whitening is not None else "none",
        **{f"pooling.{key}": value for key, value in asdict(network.config).items()},
        "scales": ", ".join(f"{scale:g}" for scale in network.scales),
        "antialias": network.antialias,
        "mean, std (RGB, 0..1)": f"{list(network.backbone.mean)}, {list(network.backbone.std)}",
        "smallest side": f"{network.min_side()} px; smaller images are enlarged to it",
        "SHA-256 of the weights": weights_digest(network.state_dict()),
    }


def _trained(network: RetrievalNetwork, training: Mapping[str, Any] | None) -> str:
    if training is None:
        return _untold(network.provenance)
    settings, start = training["settings"], training["start"]
    data = settings["data"]
    text = [
        f"On {data['name']} (`{data['table']}`), photos of {data['image_size']} px, by `train.py` of superglobal; the "
        f"weights are those with the best mAP on held-out landmarks of the same list: {training['val_map']:.4f} after "
        f"step {training['step']}. No evaluation set had a part in that choice.",
        _table({**flat(settings), "start.backbone": start["backbone"], "start.weights": start["weights"]}),
    ]
    text.append(f"Pooling in training: {_short(start['pooling'])}.")
    if training.get("git"):
        text.append(f"Code: commit {training['git']['commit']}, changed since: {training['git']['changed']}.")
    return "\n\n".join(text)


def _untold(provenance: Mapping[str, Any]) -> str:
    """What is known of weights that `train.py` did not make."""
    source = provenance.get("origin", provenance)
    if provenance.get("weights") == "random":
        return f"**None: the weights are random (seed {provenance['seed']}).**"
    if source.get("format") == "CVNet":
        return (
            f"By the authors of CVNet; converted from their file {source['file']} (SHA-256 {source['sha256']}), which "
            "does not say more."
        )
    known = {k: v for k, v in flat(provenance).items() if isinstance(v, str | int | float)}
    return f"Not told. What is known of the weights:\n\n{_table(known)}" if known else "Not told."


def _licence(license: str, provenance: Mapping[str, Any]) -> str:
    text = f"Of the weights: {license}." if license != UNKNOWN else "Of the weights: not told by who shares them."
    if provenance.get("origin", provenance).get("format") == "CVNet":
        text += " CVNet's files carry no licence."
    return f"{text} The code of superglobal is under the MIT licence, which says nothing about weights and photos."


def _usage(place: str) -> str:
    weights = f"hf:{place}" if "/" in place else place
    return f"""```python
import superglobal

model = superglobal.RetrievalNetwork.from_pretrained("{place}")
X = superglobal.extract(model, ["a.jpg", "b.jpg", "c.jpg"], max_side=1024)  # a row each, float32
scores, ids = superglobal.search(X, X, k=3)
```

Evaluated by `python eval.py dataset=roxford5k weights={weights}`."""


def _short(pooling: Mapping[str, Any]) -> str:
    on = [name for name in ("gem_plus", "regional") if pooling[name]]
    on += [] if pooling["relup"] == "off" else [f"relup {pooling['relup']}"]
    return ", ".join(on) or "GeM, no modules"


def _table(rows: Mapping[str, Any]) -> str:
    lines = [f"| {key} | {str(value).replace('|', '/')} |" for key, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])
