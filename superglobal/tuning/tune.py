"""Tuning: the best pooling and reranking for a trained network, on photos that no result is reported on."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from superglobal.config.common import validate_config
from superglobal.config.tuning import TuneConfig
from superglobal.data.evaluation_set import EvaluationSet, require_images
from superglobal.errors import InputError
from superglobal.evaluation.inputs import evaluation_set
from superglobal.evaluation.module import ExtractionList
from superglobal.evaluation.pipeline import score_set
from superglobal.metrics.gldv2 import required_depth, score_truth
from superglobal.models.backbone import has_relup
from superglobal.models.factory import load_model
from superglobal.models.network import RetrievalNetwork
from superglobal.reporting.results import TEST_MARK, percent
from superglobal.reporting.runs import flatten
from superglobal.reranking.registry import rerank
from superglobal.retrieval.rows import as_rows
from superglobal.retrieval.search import search as nearest
from superglobal.tuning.feature_maps import MapStore, require_room
from superglobal.tuning.results import best, compare, how_to_use, write_outcome
from superglobal.tuning.search_space import Settings, choices, paper, search
from superglobal.tuning.validation_set import bounded, held_out, searched_half
from superglobal.utils.io import EXPORT, write_atomically

log = logging.getLogger(__name__)


def tune(cfg: DictConfig, folder: Path) -> float:
    """Search pooling and reranking on half of a validation set's landmarks and check them on the other half.

    Args:
        cfg: composed `TuneConfig`.
        folder: of this tuning; an interrupted one of the same settings, weights and photos goes on.

    Returns:
        What the winner gains over the paper's settings on the half that was not searched, in mAP, 0..1.

    Raises:
        InputError: anything missing, unreadable or contradicting, a set to be tested on, or `folder` holds another
            tuning.
    """
    config = validate_config(cfg, TuneConfig)
    dataset, max_side, tuned_on = _photos(config)
    lists = _checked_lists(dataset, max_side)
    network = _network(config, None)
    relup = has_relup(network.backbone.net)
    assert dataset.clusters is not None
    assert dataset.gnd is not None
    counted = np.array([any(len(one.get(key, ())) for key in ("positive", "easy", "hard")) for one in dataset.gnd])
    searched = searched_half(dataset.clusters, counted, config.seed)
    _claim(folder, _identity(config, network, lists))
    device = _device(config)
    stores = _filled_stores(config, lists, max_side, relup, device)
    scorer = Scorer(dataset, lists, stores, network.to(device), config.space.rerank)
    log.info("searching on %d of %d queries", (searched & counted).sum(), counted.sum())
    space = choices(config.space, relup, len(dataset.database) - dataset.leave_one_out)
    mean = _mean_over(searched, scorer.average_precision)
    trials = search(space, paper(relup), mean, config.trials, config.seed, folder / "trials.journal")
    ap = [scorer.average_precision(settings) for settings in (best(trials).settings, trials[0].settings)]
    outcome = compare(trials, ap, searched, dataset.clusters, tuned_on, config.space.rerank, config.seed)
    name = f"{config.name}_tuned"
    write_outcome(folder, name, outcome, trials)
    for what, (winner, first) in (("searched", outcome.searched), ("other", outcome.other)):
        print(f"mAP on the {what} half: winner {percent(winner)}, paper {percent(first)}")
    print(f"{outcome.verdict}\n{how_to_use(folder, name, outcome, network.weights_label)}", flush=True)
    return outcome.gain


class Scorer:
    """Average precision of every query, from stored maps, as `eval.py` computes it.

    Args:
        dataset: what is searched.
        lists: the database and, where they are not the same, the queries.
        stores: of the maps, by ReLUP's alpha.
        network: pools and whitens, on its device.
        reranks: whether the last stage is reranking.
    """

    def __init__(
        self,
        dataset: EvaluationSet,
        lists: list[ExtractionList],
        stores: dict[float, MapStore],
        network: RetrievalNetwork,
        reranks: bool,
    ) -> None:
        self.dataset = dataset
        self.lists = lists
        self.stores = stores
        self.network = network
        self.reranks = reranks

    def average_precision(self, settings: Settings) -> np.ndarray:
        """(Q,) float64 in 0..1 (Medium of a Revisited set), NaN for a query without a positive."""
        store, dataset = self.stores[settings.relup_alpha], self.dataset
        X = store.descriptors(settings, self.lists[0], self.network)
        Q = X if dataset.leave_one_out else store.descriptors(settings, self.lists[1], self.network)
        exclude = np.arange(len(Q)) if dataset.leave_one_out else None
        ranking, truth = None, dataset.landmark_truth
        depth = max(settings.M if self.reranks else 0, 0 if truth is None else required_depth(truth))
        if depth:
            ranking = nearest(Q, X, min(depth, len(X) - dataset.leave_one_out), exclude=exclude)
        if ranking is not None and self.reranks:
            ranking = rerank(Q, X, ranking[1], settings.M, settings.K, settings.beta)
        if ranking is not None and truth is not None:
            return np.array(score_truth(truth, *ranking).per_query()["all AP"])
        ids = None if ranking is None else ranking[1]
        result = score_set(dataset, Q, as_rows(X, "database"), ids, exclude, "cpu", 0)
        return result.ap["medium" if dataset.protocols == "revisited" else "all"]


def _mean_over(queries: np.ndarray, average_precision: Callable[[Settings], np.ndarray]) -> Callable[[Settings], float]:
    """mAP of the given queries; settings that come again are not computed again."""

    @cache
    def score(settings: Settings) -> float:
        return float(np.nanmean(average_precision(settings)[queries]))

    return score


def _photos(config: TuneConfig) -> tuple[EvaluationSet, int | None, str]:
    """The validation set, its `max_side`, and what results are to say of it."""
    d = config.dataset
    if d is None:
        found = held_out(Path(config.run), config.data_root)
        tuned_on = f"{found.dataset.name} (training {Path(config.run).name})"
        return bounded(found.dataset, config.max_images, config.seed), found.max_side, tuned_on
    dataset = evaluation_set(d)
    assert dataset is not None
    mark = TEST_MARK if d.role == "test" else "(validation set)"
    return bounded(dataset, config.max_images, config.seed), d.max_side, f"{d.name} {mark}"


def _checked_lists(dataset: EvaluationSet, max_side: int | None) -> list[ExtractionList]:
    """Database and, where they are others, queries; every file is checked."""
    items = {"database": dataset.database} | ({} if dataset.leave_one_out else {"queries": dataset.queries})
    checked = require_images([(title, part, dataset.how_to_get) for title, part in items.items()])
    return [ExtractionList(title, dataset.name, part, checked[title], max_side) for title, part in items.items()]


def _network(config: TuneConfig, alpha: float | None) -> RetrievalNetwork:
    """The network with SuperGlobal's modules on; with ReLUP of `alpha`, 0 for off, None for the paper's if it fits."""
    weights = config.weights or (config.backbone.weights if config.backbone else None)
    relup: dict[str, Any] = {"relup": "auto"}
    if alpha is not None:
        relup = {"relup": "on", "relup_alpha": alpha} if alpha else {"relup": "off"}
    return load_model(
        weights or str(Path(config.run) / EXPORT),
        backbone=config.backbone.name if config.backbone else None,
        pooling={"gem_plus": True, "regional": True, "scale": True, **relup},
        scales=3,
        antialias=config.antialias,
        seed=config.seed,
    )


def _identity(config: TuneConfig, network: RetrievalNetwork, lists: list[ExtractionList]) -> dict[str, Any]:
    """What makes a tuning another one: what is searched, the network, the photos. Plain types."""
    space = {key: sorted(value) if isinstance(value, list) else value for key, value in asdict(config.space).items()}
    photos = [line for part in lists for line in part.lines()]
    chosen = {"space": space, "seed": config.seed}
    return json.loads(json.dumps({**chosen, "network": network.identity(), "photos": photos}, default=str))


def _claim(folder: Path, identity: dict[str, Any]) -> None:
    """Make `folder` this tuning's.

    Raises:
        InputError: it is another's; nothing there was touched.
    """
    record = folder / "tuning.json"
    if record.is_file():
        try:
            before, now = flatten(json.loads(record.read_text())), flatten(identity)
        except ValueError as error:
            raise InputError(f"{record}: damaged ({error}); remove {folder} to tune again") from error
        differing = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
        if differing:
            raise InputError(
                f"{folder} holds another tuning; different are {', '.join(differing[:6])}. Remove the folder, or give "
                "a new name= with run= of the training"
            )
    write_atomically(record, json.dumps(identity, indent=1).encode())


def _device(config: TuneConfig) -> str:
    gpu = config.trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return "cuda" if gpu else "cpu"


def _filled_stores(
    config: TuneConfig, lists: list[ExtractionList], max_side: int | None, relup: bool, device: str
) -> dict[float, MapStore]:
    """Maps of every image by ReLUP's alpha, computed where they are missing; says first what they take."""
    space = config.space
    grid = [Settings(regional_window=w, scales=n) for w in {5, *space.windows} for n in {3, *space.scales}]
    alphas = sorted({0.014, *space.relup_alphas}) if relup else [0.0]
    folder = Path(config.paths.outputs) / "maps"
    stores: dict[float, MapStore] = {}
    todo: list[tuple[MapStore, ExtractionList, list[int]]] = []
    for alpha in alphas:
        stores[alpha] = MapStore(folder, _network(config, alpha), max_side)
        todo += [(stores[alpha], part, stores[alpha].missing(part, grid)) for part in lists]
    needed = sum(store.size(part, rows, grid) for store, part, rows in todo)
    images, missing = sum(len(part.items) for part in lists), sum(len(rows) for _, _, rows in todo)
    log.info("feature maps of %d images, ReLUP's alpha %s: %d to compute", images, alphas, missing)
    log.info("they take about %.2f GB in %s", needed / 1e9, folder)
    require_room(folder, needed)
    for store, part, rows in todo:
        if rows:
            store.fill(part, rows, grid, device, config.trainer.num_workers)
    return stores
