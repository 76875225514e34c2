"""Load the settings, rankings, ground truth, descriptors and network of a finished evaluation from its folder."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from superglobal.config.common import validate_config
from superglobal.config.evaluation import EvalConfig
from superglobal.data.evaluation_set import EvaluationSet, RecognitionTruth, RetrievalTruth
from superglobal.data.image_checks import CHECKED_IMAGES
from superglobal.data.images import ImageItem
from superglobal.data.lazy_sequence import chain_sequences, file_names
from superglobal.errors import InputError
from superglobal.evaluation.inputs import (
    Inputs,
    StageTimer,
    apply_whitening,
    distractor_images,
    evaluation_set,
    load_descriptors,
    load_network,
)
from superglobal.evaluation.pipeline import make_task, ranks_after_reranking, rerank_results, shortlist_reranker
from superglobal.metrics.evaluate import ranks_without_junk, split_by_set
from superglobal.metrics.revisited import Sets, kept_ranks
from superglobal.models.network import RetrievalNetwork
from superglobal.reporting.figures import precision_curves, rectangular_steps, trapezoidal_steps
from superglobal.reporting.results import main_scores
from superglobal.reporting.runs import read_results
from superglobal.reranking.registry import get_reranker
from superglobal.retrieval.ranks import exact_ranks
from superglobal.retrieval.scores import pair_scores
from superglobal.retrieval.store import DescriptorStore
from superglobal.utils.escape import csv_cell
from superglobal.utils.io import read_csv, require_regular

# Maximum difference between a recorded score or metric and the same value computed again. Small differences occur
# because rounding differs between machines.
_SCORE_TOLERANCE = 1e-4
_MEAN_TOLERANCE = 1e-4


PATH_SETTINGS = (
    *("paths.data", "paths.outputs", "paths.stores", "dataset.root", "dataset.database", "dataset.query"),
    *("dataset.solution", "distractors.root", "descriptors.query", "descriptors.database", "weights"),
    "backbone.weights",
)
"""Settings that are paths of files that a result needs when it is opened again."""
_NAMES_OR_PATHS = ("dataset.solution", "weights", "backbone.weights")


class FinishedRun:
    """Result that `eval.py` wrote into a folder, together with the inputs of the evaluation.

    Files are read when they are first needed. The constructor and all attributes raise InputError if a file is missing
    or damaged, or has changed since the evaluation.

    Files are searched where the evaluation read them, at the same place relative to the folder of the result, and
    relative to the current folder.

    Args:
        folder: folder of one result, or a parent folder that contains exactly one result.
        overrides: new values of `PATH_SETTINGS`, such as "dataset.database=FOLDER", for files that were moved. Paths
            below an overridden folder are moved with it.
    """

    def __init__(self, folder: Path, overrides: Sequence[str] = ()) -> None:
        results = read_results(folder)
        if len(results) > 1:
            examples = ", ".join(str(folder / result["run"]) for result in results[:3])
            raise InputError(f"{folder}: contains {len(results)} results; give the folder of one, such as {examples}")
        self.summary = results[0]
        self.folder = folder / self.summary["run"]
        if self.summary.get("status") != "ok":
            reason = self.summary.get("reason", "no reason given")
            raise InputError(
                f"{self.folder}: the run has no results, its status is {self.summary.get('status')}: {reason}"
            )
        try:
            settings = OmegaConf.merge(OmegaConf.structured(EvalConfig), self.summary["config"])
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"{self.folder}: the settings are from an incompatible version ({reason}); run eval.py again"
            ) from error
        _relocate(settings, self.summary.get("location", {}), self.folder, overrides)  # type: ignore[arg-type]
        self.config = validate_config(settings, EvalConfig)  # type: ignore[arg-type]

    @property
    def uses_descriptor_files(self) -> bool:
        """Return whether the evaluation read its descriptors from files instead of extracting them."""
        return self.config.descriptors.query is not None

    def command(self) -> str:
        """Return the command that produced this result, or a description of it if the command is not recorded."""
        path = self.folder / ".hydra" / "overrides.yaml"
        if not path.is_file():
            return "python eval.py with the settings in results.json"
        return shlex.join(["python", "eval.py", *map(str, OmegaConf.load(path))])

    @cached_property
    def dataset(self) -> EvaluationSet | None:
        """Evaluation set, after checking that its images are unchanged; None if only descriptors were evaluated."""
        dataset = evaluation_set(self.config.dataset, Path(self.config.paths.stores) / CHECKED_IMAGES)
        if dataset is not None:
            self._require_same_images(dataset)
        return dataset

    @cached_property
    def distractors(self) -> list[ImageItem]:
        """Distractor images; an empty list if the evaluation used no distractors."""
        return distractor_images(self.config)

    @cached_property
    def images(self) -> Sequence[ImageItem]:
        """Database images, including distractors, indexed by database id."""
        assert self.dataset is not None
        return chain_sequences(self.dataset.database, self.distractors)

    @cached_property
    def stages(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Ranked results by stage ("search" and, with reranking, "rerank"): scores (Q, k) and database ids (Q, k)."""
        path = self.folder / "rankings.npz"
        try:
            require_regular(path)
            with np.load(path, allow_pickle=False) as file:
                names = [name for name in ("search", "rerank") if f"{name}_ids" in file]
                stages = {name: (file[f"{name}_scores"], file[f"{name}_ids"]) for name in names}
        except Exception as error:  # reading a damaged zip file can raise any exception
            raise self._unreadable(path, error) from error
        count, total = self.summary["counts"]["queries"], self.summary["counts"]["database"]
        total += self.summary["about"].get("skipped", 0)
        if "search" not in stages:
            raise self._unreadable(path, KeyError("search_ids"))
        for name, (scores, ids) in stages.items():
            if ids.ndim != 2 or scores.shape != ids.shape or len(ids) != count or not ids.shape[1]:
                raise self._unreadable(path, ValueError(f"{name}: shapes {scores.shape} and {ids.shape}"))
            if scores.dtype.kind != "f" or ids.dtype.kind != "i" or ids.min() < -1 or ids.max() >= total:
                raise self._unreadable(path, ValueError(f"{name}: expected scores, and ids from -1 to {total - 1}"))
        return stages

    @cached_property
    def per_query(self) -> dict[str, list[str]]:
        """Columns of `per_query.csv`: header -> list of strings. An empty dict if the result has no labels."""
        path = self.folder / "per_query.csv"
        if not self.summary["metrics"]:
            return {}
        try:
            return {name: list(values) for name, *values in zip(*read_csv(path), strict=True)}
        except (OSError, ValueError) as error:
            raise self._unreadable(path, error) from error

    @cached_property
    def inputs(self) -> Inputs:
        """Descriptors that the evaluation searched, loaded from stores or files, and whitened as in the evaluation."""
        if self.uses_descriptor_files:
            inputs = load_descriptors(self.config, self.dataset, self.distractors)
        else:
            stores = {title: self._store(title) for title in self.summary["about"]["stores"]}
            inputs = Inputs.from_stores(stores, self.dataset, self.distractors, dict(self.summary["about"]))
        inputs = apply_whitening(self.config, inputs, StageTimer())
        # Descriptor files have no fingerprint. To detect changed descriptors, the score of each query's first result is
        # computed again and compared with the recorded score.
        scores, ids = self.stages["search"]
        if len(ids) != len(inputs.queries) or ids.max() >= len(inputs.database):
            raise InputError(f"{self.folder}: the number of descriptors has changed; run again: {self.command()}")
        best = pair_scores(inputs.query_block(), inputs.database, np.arange(len(ids)), ids[:, 0])
        if np.abs(best - scores[:, 0]).max() > _SCORE_TOLERANCE:
            raise InputError(f"{self.folder}: the descriptors have changed; run again: {self.command()}")
        return inputs

    def network(self) -> RetrievalNetwork:
        """Load the network that extracted the descriptors, in float32 on the CPU."""
        network = load_network(self.config)
        if network.identity()["weights"] != self.summary["about"]["network"]["weights"]:
            raise InputError(
                f"weights={network.weights_label}: changed since the evaluation {self.folder}; run again: "
                f"{self.command()}"
            )
        return network

    def _unreadable(self, path: Path, error: Exception) -> InputError:
        """Return an InputError for a result file that is missing or damaged.

        Args:
            path: path of the file.
            error: exception that occurred when the file was read.
        """
        return InputError(f"{path}: missing or damaged ({error!r}); run again: {self.command()}")

    def _store(self, title: str) -> DescriptorStore:
        """Open a descriptor store of the evaluation, and check that the store has not changed.

        Args:
            title: title of the image list whose descriptors are stored: "database", "queries" or "distractors".
        """
        config, fingerprint = self.config, self.summary["about"]["stores"][title]["fingerprint"]
        name = config.distractors.name if title == "distractors" else config.dataset.name
        path = Path(config.paths.stores) / f"{name}-{title}-{fingerprint[:16]}"
        if not (path / "manifest.json").is_file():
            raise InputError(
                f"{path}: the stored descriptors are missing; give their folder by paths.stores=FOLDER, or extract "
                f"them again: {self.command()}"
            )
        store = DescriptorStore.open(path)
        if store.fingerprint() != fingerprint:
            raise InputError(
                f"{path}: images were skipped or repaired after the evaluation; run again: {self.command()}"
            )
        return store

    def _require_same_images(self, dataset: EvaluationSet) -> None:
        """Raise InputError if the number of images or a file name has changed since the evaluation.

        An image added to a folder, for example, shifts the ids of all images after it.
        """
        images = chain_sequences(dataset.database, self.distractors)
        counts = self.summary["counts"]
        before = counts["queries"], counts["database"] + self.summary["about"].get("skipped", 0)
        change = None
        if before != (len(dataset.queries), len(images)):
            change = f"{before[0]} queries and {before[1]} images before, {len(dataset.queries)} and {len(images)} now"
        else:
            queries = dataset.queries
            query_names, names = file_names(queries, dataset.root), file_names(images, dataset.root)
            ids = list(self.stages.values())[-1][1]
            path = self.folder / "rankings.csv"
            try:
                columns, *rows = read_csv(path)
                for row in (dict(zip(columns, cells, strict=True)) for cells in rows):
                    query = int(row["number"])
                    image = int(ids[query, int(row["rank"]) - 1])
                    if not _is_same_name(row["query"], queries[query], query_names[query], dataset.root):
                        change = f"query {query} was {row['query']}, now it is {query_names[query]}"
                    elif not _is_same_name(row["image"], images[image], names[image], dataset.root):
                        change = f"image {image} was {row['image']}, now it is {names[image]}"
                    if change:
                        break
            except (OSError, KeyError, TypeError, ValueError, IndexError) as error:
                raise self._unreadable(path, error) from error
        if change:
            raise InputError(
                f"{self.folder}: the images of {dataset.name} have changed ({change}); run again: {self.command()}"
            )


def _relocate(config: DictConfig, location: Mapping[str, str], folder: Path, overrides: Sequence[str]) -> None:
    """Replace the path settings of a result by the paths at which the files are now.

    Args:
        config: settings of the result, which are modified.
        location: entry "location" of the result: the current folder of the evaluation, and the folder of the result.
        folder: folder of the result now.
        overrides: new values of path settings, such as "dataset.database=FOLDER".

    Raises:
        InputError: an override is not one of `PATH_SETTINGS`.
    """
    given: dict[str, Path] = {}
    for text in overrides:
        setting, _, value = text.partition("=")
        if setting not in PATH_SETTINGS or not value:
            raise InputError(f"{text}: expected a path of moved files: {', '.join(f'{s}=...' for s in PATH_SETTINGS)}")
        given[setting] = Path(value).absolute()
    selected = {setting: OmegaConf.select(config, setting) for setting in PATH_SETTINGS}
    recorded = {setting: Path(value) for setting, value in selected.items() if value is not None}
    cwd, written = Path(location.get("cwd", "")), location.get("folder", folder.absolute())
    for setting, path in recorded.items():
        parents = [s for s in given if s in recorded and recorded[s].parts and path.is_relative_to(recorded[s])]
        if parents:
            parent = max(parents, key=lambda s: len(recorded[s].parts))
            found = given[parent] / path.relative_to(recorded[parent])
        else:
            candidates = [cwd / path, folder / os.path.relpath(cwd / path, written), path]
            # Settings such as weights=timm are not paths.
            missing = path if setting in _NAMES_OR_PATHS else cwd / path
            named = str(path) in ("package", "timm", "random") and setting in _NAMES_OR_PATHS
            found = path if named else next((candidate for candidate in candidates if candidate.exists()), missing)
        OmegaConf.update(config, setting, str(found) if found != path else selected[setting])
    for setting in given.keys() - recorded.keys():
        OmegaConf.update(config, setting, str(given[setting]))


def _is_same_name(recorded: str, item: ImageItem, name: str, root: Path) -> bool:
    """Compare the name of an image in `rankings.csv` with its name now.

    For an image outside the folder of the data set, whose folder may have been moved, only the file names are compared.

    Args:
        recorded: cell of the CSV file.
        item: image.
        name: name of the image, from `file_names`.
        root: folder of the data set.
    """
    if item.path.is_relative_to(root):
        return recorded == csv_cell(name)
    return recorded.rpartition("/")[2].removeprefix("'") == name.rpartition("/")[2]


def relevance_sets(dataset: EvaluationSet) -> list[dict[str, Any]]:
    """Return one dict per query: the database ids of each relevance, such as "easy", "positive" or "junk"."""
    return [{name: ids for name, ids in entry.items() if name != "bbx"} for entry in dataset.gnd or []]


def mean_precision(run: FinishedRun) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, int]]:
    """Return the mean precision-recall curve of each stage and protocol, and the number of queries of each protocol.

    Returns:
        Curves (bins,) by stage and protocol, and numbers of queries by protocol. A curve contains the precision in each
        of `bins` equal intervals of recall, averaged over the queries that the protocol counts. The mean of these
        values is the area under the curve, which equals the metric in `results.json`. For GLDv2, the protocols are the
        query subsets "public", "private" and "all".

    Raises:
        InputError: there are no labels, a descriptor store is missing, or the area under a curve differs from the
            recorded metric.
    """
    means: dict[str, dict[str, np.ndarray]] = {}
    for stage, by_protocol in precision(run).items():
        recorded = main_scores(run.summary["metrics"][stage])
        means[stage] = {}
        for protocol, rows in by_protocol.items():
            counted = rows[~np.isnan(rows[:, 0])]
            means[stage][protocol] = counted.mean(axis=0) if len(counted) else np.full(rows.shape[1], np.nan)
            area, metric = float(means[stage][protocol].mean()), recorded[protocol]
            if metric is not None and not abs(area - metric) < _MEAN_TOLERANCE:
                raise InputError(
                    f"{run.folder}: {stage}, {protocol}: the area under the curve is {area:.5f}, but results.json has "
                    f"{metric:.5f}; files have changed since the evaluation. Run again: {run.command()}"
                )
    return means, dict(run.summary["metrics"]["search"]["queries"])


def precision(run: FinishedRun) -> dict[str, dict[str, np.ndarray]]:
    """Return the precision-recall curve of each query, by stage and protocol.

    Returns:
        Arrays (Q, bins) with the precision in each of `bins` equal intervals of recall, by stage and protocol. Rows of
        queries that a protocol does not count contain NaN. For GLDv2, the protocols are the query subsets "public",
        "private" and "all". GLDv2's recognition task has one curve (1, bins) for all queries of a subset.

    Raises:
        InputError: there are no labels, or a file is missing or damaged.
    """
    dataset = run.dataset
    if dataset is None or dataset.gnd is None:
        raise InputError("curves: precision needs labels, but this result has none")
    truth = dataset.landmark_truth
    if isinstance(truth, RecognitionTruth):
        return {stage: _recognition_precision(truth, run, stage) for stage in run.stages}
    if isinstance(truth, RetrievalTruth):
        return {stage: _retrieval_precision(truth, ids) for stage, (_, ids) in run.stages.items()}
    return _revisited_precision(run)


def _retrieval_precision(truth: RetrievalTruth, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Return the precision-recall curve of each query of GLDv2's retrieval task.

    Args:
        truth: ground truth of the task.
        ids: (Q, k) database ids of the results, best first.

    Returns:
        Curves (Q, bins) by query subset, "public", "private" and "all"; NaN for queries that are not in the subset.
    """
    rows = precision_curves(
        [rectangular_steps(row, relevant) for row, relevant in zip(ids, truth.relevant, strict=True)]
    )
    return {name: np.where(part[:, None], rows, np.nan) for name, part in truth.parts.items()}


def _recognition_precision(truth: RecognitionTruth, run: FinishedRun, stage: str) -> dict[str, np.ndarray]:
    """Return the precision-recall curve of GLDv2's recognition task for each query subset.

    The predictions for all queries of a subset are ranked together by descending confidence, so a subset has only one
    curve. The area under the curve is the global average precision (GAP).

    Args:
        truth: ground truth of the task.
        run: finished evaluation.
        stage: "search" or "rerank".

    Returns:
        Curves (1, bins) by query subset, "public", "private" and "all".
    """
    scores, correct = (
        np.array([float(value or "nan") for value in run.per_query[f"{stage} {column}"]])
        for column in ("score", "correct")
    )
    by_part = {}
    for name, part in truth.parts.items():
        rows = np.flatnonzero(part & ~np.isnan(scores))
        right = correct[rows[np.lexsort((truth.queries[rows], -scores[rows]))]] > 0
        precision = np.cumsum(right)[right] / (np.flatnonzero(right) + 1)
        steps = np.zeros((sum(len(t) > 0 for t, in_part in zip(truth.truth, part, strict=True) if in_part), 2))
        steps[: len(precision)] = precision[:, None]
        by_part[name] = precision_curves([steps])
    return by_part


def _revisited_precision(run: FinishedRun) -> dict[str, dict[str, np.ndarray]]:
    """Return the precision-recall curve of each query in an evaluation that is scored by mAP.

    Returns:
        Curves (Q, bins) by stage and protocol.
    """
    config, task = run.config, make_task(run.config, run.inputs)
    scorer, ids = task.scorer, run.stages["search"][1]
    assert scorer is not None

    def curves_of(ranks: list[np.ndarray]) -> dict[str, np.ndarray]:
        by_set = split_by_set(ranks, scorer.sets)
        return {
            name: precision_curves([trapezoidal_steps(*kept_ranks(sets, protocol, q)) for q, sets in enumerate(by_set)])
            for name, protocol in scorer.protocols.items()
        }

    def positive_steps(sets: Sets) -> np.ndarray:
        ranks = sets["positive"]
        return trapezoidal_steps(ranks[ranks >= 0], len(ranks))

    # An approximate index gives ranks only to the images that it returns; other images have no rank.
    if config.index.kind == "flat":
        X, exclude = task.database, task.exclude
        first = exact_ranks(task.queries, X, scorer.targets, device=task.device, exclude=exclude)
    else:
        first = scorer.ranks_in_lists(ids)
    stages = {"search": curves_of(first)}
    if not config.rerank.enabled:
        return stages
    if config.rerank.junk == "drop":
        kept = ranks_without_junk(scorer, first, ids, shortlist_reranker(config, task))
        stages["rerank"] = {
            name: precision_curves([positive_steps(sets) for sets in ranks]) for name, ranks in kept.items()
        }
    elif get_reranker(config.rerank.kind).searches_again is not None:
        reranked = rerank_results(config, task, ids, run.folder)
        stages["rerank"] = curves_of(ranks_after_reranking(task, scorer, first, reranked))
    else:
        stages["rerank"] = curves_of(scorer.reranked(first, run.stages["rerank"][1]))
    return stages
