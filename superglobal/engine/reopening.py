"""A finished evaluation opened again from its folder: settings, lists, ground truth, stored descriptors, network."""

from __future__ import annotations

import csv
import shlex
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from superglobal.checks import validated
from superglobal.config import EvalConfig
from superglobal.data.images import ImageItem
from superglobal.data.lazy import chained, file_names
from superglobal.data.sets import EvaluationSet, load_distractors
from superglobal.engine.common import evaluation_set
from superglobal.engine.gathering import Clock, Inputs, evaluated_network, less_statistics, own_descriptors
from superglobal.errors import InputError
from superglobal.models.network import RetrievalNetwork
from superglobal.reporting.runs import read_results
from superglobal.retrieval.store import DescriptorStore
from superglobal.retrieval.vectors import as_rows, concat, pair_scores

_SAME_SCORE = 1e-4  # what a score of the same descriptors may differ by from machine to machine


class FinishedRun:
    """What `eval.py` left in a folder, and what that was made from, each read when it is asked for.

    Raises InputError, here and in every attribute, for what is gone, damaged or not what the result was made from.
    """

    def __init__(self, folder: Path) -> None:
        """folder: of one result, or with one result below it."""
        rows = read_results(folder)
        if len(rows) > 1:
            places = ", ".join(str(folder / row["place"]) for row in rows[:3])
            raise InputError(f"{folder}: {len(rows)} results in it; give the folder of one, such as {places}")
        self.summary = rows[0]
        self.folder = folder / self.summary["place"]
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
        return validated(merged, EvalConfig)  # type: ignore[arg-type]

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
        return chained(self.dataset.database, self.distractors)

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
        images = chained(dataset.database, self.distractors)
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
