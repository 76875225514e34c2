"""A finished evaluation opened again from its folder: settings, lists, ground truth, stored descriptors, network."""

from __future__ import annotations

import csv
import shlex
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from superglobal.config.common import validate_config
from superglobal.config.evaluation import EvalConfig, rerank_parameters
from superglobal.data.evaluation_set import (
    EvaluationSet,
    RecognitionTruth,
    RetrievalTruth,
    chain_sequences,
    file_names,
    load_distractors,
)
from superglobal.data.images import ImageItem
from superglobal.errors import InputError
from superglobal.evaluation.inputs import (
    Clock,
    Inputs,
    evaluated_network,
    evaluation_set,
    less_statistics,
    own_descriptors,
)
from superglobal.evaluation.pipeline import ground_truth, search_device
from superglobal.metrics.evaluate import Scorer, make_scorer, ranks_without_junk, split_by_set
from superglobal.metrics.revisited import Protocol, Sets, kept_ranks
from superglobal.models.network import RetrievalNetwork
from superglobal.reporting.figures import precision_curves, rectangular_steps, trapezoidal_steps
from superglobal.reporting.results import main_scores
from superglobal.reporting.runs import read_results
from superglobal.reranking.registry import apply_reranker, get_reranker
from superglobal.retrieval.ranks import exact_ranks
from superglobal.retrieval.rows import as_rows, concat
from superglobal.retrieval.scores import pair_scores
from superglobal.retrieval.store import DescriptorStore

_SAME_SCORE = 1e-4  # what a score of the same descriptors may differ by from machine to machine


class FinishedRun:
    """What `eval.py` left in a folder, and what that was made from, each read when it is asked for.

    Raises InputError, here and in every attribute, for what is gone, damaged or not what the result was made from.
    """

    def __init__(self, folder: Path) -> None:
        """folder: of one result, or with one result below it."""
        rows = read_results(folder)
        if len(rows) > 1:
            places = ", ".join(str(folder / row["run"]) for row in rows[:3])
            raise InputError(f"{folder}: {len(rows)} results in it; give the folder of one, such as {places}")
        self.summary = rows[0]
        self.folder = folder / self.summary["run"]
        if self.summary.get("status") != "ok":
            reason = self.summary.get("reason", "no reason given")
            raise InputError(f"{self.folder}: no results to show, the run is {self.summary.get('status')}: {reason}")
        self.config = self._settings()

    def _settings(self) -> EvalConfig:
        try:
            merged = OmegaConf.merge(OmegaConf.structured(EvalConfig), self.summary["config"])
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{self.folder}: settings of another version ({reason}); run eval.py again") from error
        assert OmegaConf.is_dict(merged)
        return validate_config(merged, EvalConfig)  # type: ignore[arg-type]

    @property
    def own_descriptors(self) -> bool:
        """Whether the descriptors came from files and not from a network here."""
        return self.config.descriptors.query is not None

    def command(self) -> str:
        """The command that made this result, as far as its folder says it."""
        path = self.folder / ".hydra" / "overrides.yaml"
        if not path.is_file():
            return "python eval.py with the settings in results.json"
        return shlex.join(["python", "eval.py", *map(str, OmegaConf.load(path))])

    @cached_property
    def dataset(self) -> EvaluationSet | None:
        """Queries, database and ground truth, if they are still those of the result; None where there never were."""
        dataset = evaluation_set(self.config.dataset)
        if dataset is not None:
            self._require_same_lists(dataset)
        return dataset

    @cached_property
    def distractors(self) -> list[ImageItem]:
        d = self.config.distractors
        return load_distractors(d.root, d.name) if d.name else []

    @cached_property
    def images(self) -> Sequence[ImageItem]:
        """The database by id, distractors included."""
        assert self.dataset is not None
        return chain_sequences(self.dataset.database, self.distractors)

    @cached_property
    def stages(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """ "search" and, with reranking, "rerank": scores and ids (Q, k)."""
        path = self.folder / "rankings.npz"
        try:
            with np.load(path, allow_pickle=False) as file:
                names = [name for name in ("search", "rerank") if f"{name}_ids" in file]
                return {name: (file[f"{name}_scores"], file[f"{name}_ids"]) for name in names}
        except Exception as error:  # a damaged zip raises whatever its damage leads to
            raise InputError(f"{path}: missing or damaged ({error}); make it again: {self.command()}") from error

    @cached_property
    def per_query(self) -> dict[str, list[str]]:
        """Columns of `per_query.csv`; none of a run without labels."""
        path = self.folder / "per_query.csv"
        if not self.summary["metrics"]:
            return {}
        try:
            with path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.reader(file))
            return {name: list(values) for name, *values in zip(*rows, strict=True)}
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: missing or damaged ({error}); make it again: {self.command()}") from error

    @cached_property
    def inputs(self) -> Inputs:
        """The descriptors that were searched, from their stores."""
        if self.own_descriptors:
            found = own_descriptors(self.config, self.dataset, self.distractors)
        else:
            stores = {title: self._store(title) for title in self.summary["about"]["stores"]}
            queries = as_rows(stores.get("queries", stores["database"]), "queries")
            parts = [stores[title] for title in ("database", "distractors") if title in stores]
            about = dict(self.summary["about"])
            found = Inputs(queries, concat(*parts, name="database"), self.dataset, self.distractors, about)
        found = less_statistics(self.config, found, Clock())
        self._require_same_scores(found)
        return found

    def network(self) -> RetrievalNetwork:
        """The network that described the images, in float32 on the CPU."""
        network = evaluated_network(self.config)
        if network.identity()["weights"] != self.summary["about"]["network"]["weights"]:
            raise InputError(
                f"weights={network.weights_label}: not the weights that made {self.folder}; run again: {self.command()}"
            )
        return network

    def _store(self, title: str) -> DescriptorStore:
        config, wanted = self.config, self.summary["about"]["stores"][title]["fingerprint"]
        name = config.distractors.name if title == "distractors" else config.dataset.name
        place = Path(config.paths.stores) / f"{name}-{title}-{wanted[:16]}"
        if not (place / "manifest.json").is_file():
            raise InputError(f"{place}: the stored descriptors are gone; this makes them again: {self.command()}")
        store = DescriptorStore.open(place)
        if store.fingerprint() != wanted:
            raise InputError(f"{place}: images were skipped or mended since; make the result again: {self.command()}")
        return store

    def _require_same_lists(self, dataset: EvaluationSet) -> None:
        """A photo more in a folder moves all ids behind it: names tell."""
        images = chain_sequences(dataset.database, self.distractors)
        counts = self.summary["counts"]
        listed = counts["queries"], counts["database"] + self.summary["about"].get("skipped", 0)
        problem = None
        if listed != (len(dataset.queries), len(images)):
            problem = f"{listed[0]} queries and {listed[1]} images then, {len(dataset.queries)} and {len(images)} now"
        else:
            queries, names = file_names(dataset.queries, dataset.root), file_names(images, dataset.root)
            for what, then, now in self._listed(queries, names):
                if then != now:
                    problem = f"{what} was {then}, and is {now}"
                    break
        if problem:
            raise InputError(
                f"{self.folder}: the photos of {dataset.name} are others than those of the result ({problem}); make it "
                f"again: {self.command()}"
            )

    def _listed(self, queries: Sequence[str], images: Sequence[str]) -> list[tuple[str, str, str]]:
        """What each number stood for in `rankings.csv`, and what it stands for in the lists."""
        ids = list(self.stages.values())[-1][1]
        path = self.folder / "rankings.csv"
        found: dict[tuple[str, int], tuple[str, str, str]] = {}
        try:
            with path.open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    number, image = int(row["number"]), int(ids[int(row["number"]), int(row["rank"]) - 1])
                    if ("query", number) not in found:
                        found["query", number] = f"query {number}", row["query"], queries[number]
                    if ("image", image) not in found:
                        found["image", image] = f"image {image}", row["image"], images[image]
        except (OSError, KeyError, ValueError, IndexError) as error:
            raise InputError(f"{path}: missing or damaged ({error!r}); make it again: {self.command()}") from error
        return list(found.values())

    def _require_same_scores(self, inputs: Inputs) -> None:
        """Own descriptors have no fingerprint: the best result's score tells whether they are the same."""
        scores, ids = self.stages["search"]
        if len(ids) != len(inputs.queries) or ids.max() >= len(inputs.database):
            raise InputError(f"{self.folder}: the descriptors are not as many as they were; run {self.command()}")
        best = pair_scores(inputs.query_block(), inputs.database, np.arange(len(ids)), ids[:, 0])
        if np.abs(best - scores[:, 0]).max() > _SAME_SCORE:
            raise InputError(f"{self.folder}: made from other descriptors than these; run again: {self.command()}")


def relevance_sets(dataset: EvaluationSet) -> list[dict[str, Any]]:
    """Per query the ids of each set that its ground truth names, without its box."""
    return [{name: ids for name, ids in entry.items() if name != "bbx"} for entry in dataset.gnd or []]


_SAME_MEAN = 1e-4  # what a mean of precisions may differ by from machine to machine


def mean_precision(run: FinishedRun) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, int]]:
    """Precision over recall by stage and protocol or part, and how many queries each is the mean of.

    Returns:
        stage -> protocol -> (bins,), whose mean is the metric in `results.json`; protocol -> queries.

    Raises:
        InputError: no labels, the store is gone, or the curve's area is not the recorded metric.
    """
    every = precision(run)
    found: dict[str, dict[str, np.ndarray]] = {}
    for stage, by_protocol in every.items():
        recorded = main_scores(run.summary["metrics"][stage])
        found[stage] = {}
        for protocol, rows in by_protocol.items():
            counted = rows[~np.isnan(rows[:, 0])]
            found[stage][protocol] = counted.mean(axis=0) if len(counted) else np.full(rows.shape[1], np.nan)
            area, wanted = float(found[stage][protocol].mean()), recorded[protocol]
            if wanted is not None and not abs(area - wanted) < _SAME_MEAN:
                raise InputError(
                    f"{run.folder}: {stage}, {protocol}: the curve's area is {area:.5f}, but results.json has "
                    f"{wanted:.5f}; something has changed since. Make it again: {run.command()}"
                )
    return found, dict(run.summary["metrics"]["search"]["queries"])


def precision(run: FinishedRun) -> dict[str, dict[str, np.ndarray]]:
    """Stage -> protocol or part -> (Q, bins) precision over recall of each query; NaN for those that do not count."""
    dataset = run.dataset
    if dataset is None or dataset.gnd is None:
        raise InputError("curves: precision needs to know what is right, and this result has no labels")
    if isinstance(dataset.landmark_truth, RetrievalTruth):
        return {stage: _ranked(dataset.landmark_truth, ids) for stage, (_, ids) in run.stages.items()}
    if isinstance(dataset.landmark_truth, RecognitionTruth):
        return {stage: _recognised(dataset.landmark_truth, run, stage) for stage in run.stages}
    gnd, protocols = ground_truth(dataset, run.inputs.exclude())
    scorer = make_scorer(gnd, len(run.inputs.queries), len(run.inputs.database), protocols, clusters=dataset.clusters)
    return {
        stage: {
            name: precision_curves(
                [trapezoidal_steps(*kept_ranks(sets, protocols[name], q)) for q, sets in enumerate(ranks)]
            )
            if not dropped
            else precision_curves([_found(sets["positive"]) for sets in ranks])
            for name, ranks in by_protocol.items()
        }
        for stage, (by_protocol, dropped) in _ranks(run, scorer, protocols).items()
    }


def _ranked(truth: RetrievalTruth, ids: np.ndarray) -> dict[str, np.ndarray]:
    rows = precision_curves([rectangular_steps(row, wanted) for row, wanted in zip(ids, truth.relevant, strict=True)])
    return {name: np.where(part[:, None], rows, np.nan) for name, part in truth.parts.items()}


def _recognised(truth: RecognitionTruth, run: FinishedRun, stage: str) -> dict[str, np.ndarray]:
    """Part -> (1, bins): all predictions in one list, the surest first, of which GAP is the area."""
    scores, correct = (
        np.array([float(v or "nan") for v in run.per_query[f"{stage} {w}"]]) for w in ("score", "correct")
    )
    found = {}
    for name, part in truth.parts.items():
        rows = np.flatnonzero(part & ~np.isnan(scores))
        right = correct[rows[np.lexsort((truth.queries[rows], -scores[rows]))]] > 0
        precision = np.cumsum(right)[right] / (np.flatnonzero(right) + 1)
        steps = np.zeros((sum(len(t) > 0 for t, there in zip(truth.truth, part, strict=True) if there), 2))
        steps[: len(precision)] = precision[:, None]
        found[name] = precision_curves([steps])
    return found


def _found(ranks: np.ndarray) -> np.ndarray:
    return trapezoidal_steps(ranks[ranks >= 0], len(ranks))


def _ranks(
    run: FinishedRun, scorer: Scorer, protocols: Mapping[str, Protocol]
) -> dict[str, tuple[dict[str, list[Sets]], bool]]:
    """Per stage the ranks of every listed image by protocol, and whether what is ignored is gone already."""
    config, inputs, device = run.config, run.inputs, search_device(run.config)
    Q, X, exclude = inputs.query_block(), inputs.database, inputs.exclude()
    ids = run.stages["search"][1]
    # An index that is not exact knows no rank but those that it lists.
    exact = config.index.kind == "flat"
    first = exact_ranks(Q, X, scorer.targets, device=device, exclude=exclude) if exact else scorer.listed(ids)

    def of(found: list[np.ndarray]) -> tuple[dict[str, list[Sets]], bool]:
        return dict.fromkeys(protocols, split_by_set(found, scorer.sets)), False

    stages = {"search": of(first)}
    kind, values = config.rerank.kind, rerank_parameters(config.rerank)
    if not config.rerank.enabled:
        return stages
    if config.rerank.junk == "drop":

        def reorder(queries: np.ndarray, some: np.ndarray) -> np.ndarray:
            return apply_reranker(kind, values, Q[queries], X, some, device=device).ids

        stages["rerank"] = ranks_without_junk(scorer, first, ids, reorder), True
    elif get_reranker(kind).searches_again is not None:
        backend = config.index.backend
        second = apply_reranker(
            kind, values, Q, X, ids, exclude=exclude, backend=backend, device=device, folder=run.folder
        )
        found = exact_ranks(second.queries, second.database, scorer.targets, device=device, exclude=exclude)
        stages["rerank"] = of(found)
    else:
        stages["rerank"] = of(scorer.reranked(first, run.stages["rerank"][1]))
    return stages
