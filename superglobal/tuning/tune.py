"""Tune the settings of a trained network on half of a validation set, and check them on the other half."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from superglobal.config.common import validate_config
from superglobal.config.tuning import TuneConfig
from superglobal.data.download_links import how_to_get_gldv2_train
from superglobal.data.evaluation_set import EvaluationSet, leave_one_out_truth, require_images
from superglobal.data.gldv2 import read_train, split_landmarks
from superglobal.data.image_checks import CHECKED_IMAGES
from superglobal.data.images import ImageItem
from superglobal.errors import InputError
from superglobal.evaluation.inputs import evaluation_set, leave_out_unreadable
from superglobal.evaluation.module import ExtractionList
from superglobal.evaluation.pipeline import score_set
from superglobal.metrics.gldv2 import required_depth, score_truth
from superglobal.models.backbone import has_relup
from superglobal.models.factory import load_model
from superglobal.models.network import RetrievalNetwork
from superglobal.reporting.results import TEST_MARK, percent, unreadable_text, write_unreadable
from superglobal.reporting.runs import flatten
from superglobal.reranking.registry import rerank
from superglobal.retrieval.rows import as_rows
from superglobal.retrieval.search import search as nearest
from superglobal.tuning.feature_maps import MapStore, require_space
from superglobal.tuning.search_space import Settings, best, choices, compare, search, usage, write_outcome
from superglobal.utils.io import CORRUPT_IMAGES, EXPORT, read_json, write_atomically

log = logging.getLogger(__name__)
_IDENTITY = "tuning.json"  # file with the identity of a tuning run, in its folder


def tune(cfg: DictConfig, folder: Path) -> float:
    """Find the best settings of pooling and reranking, compare them with the paper's settings, and write the results.

    The landmarks of the validation set are divided into two halves. The search uses the queries of one half, and the
    comparison uses the queries of the other half.

    Args:
        cfg: composed `TuneConfig`.
        folder: folder of this tuning run. An interrupted run with the same settings, weights and images is resumed.

    Returns:
        Difference in mAP (0..1) between the best settings and the paper's settings, on the half that was not searched.

    Raises:
        InputError: input is missing or invalid, the set is a test set, or `folder` contains a run with other settings.
    """
    config = validate_config(cfg, TuneConfig)
    scorer, counted, searched, tuned_on = leave_out_unreadable(partial(_prepare, config, folder), config.paths.stores)
    dataset, network = scorer.dataset, scorer.network
    relup = has_relup(network.backbone.net)
    assert dataset.clusters is not None

    @cache
    def score(settings: Settings) -> float:
        return float(np.nanmean(scorer.average_precision(settings)[searched]))

    log.info("Searching for the best settings on %d of %d queries", (searched & counted).sum(), counted.sum())
    space = choices(config.space, relup, len(dataset.database) - dataset.leave_one_out)
    paper = Settings() if relup else Settings(relup_alpha=0.0)
    trials = search(space, paper, score, config.trials, config.seed, folder / "trials.journal")
    ap = [scorer.average_precision(settings) for settings in (best(trials).settings, trials[0].settings)]
    outcome = compare(trials, ap, searched, dataset.clusters, tuned_on, config.space.rerank, config.seed)
    name = f"{config.name}_tuned"
    write_outcome(folder, name, outcome, trials)
    write_unreadable(folder, dataset.unreadable)
    for half, scores in (("searched", outcome.search_half), ("other", outcome.check_half)):
        print(f"mAP on the {half} half: best settings {percent(scores[0])}, paper's settings {percent(scores[1])}")
    if dataset.unreadable:
        print(unreadable_text(folder, len(dataset.unreadable)))
    print(f"{outcome.verdict}\n{usage(folder, name, outcome, network.weights_label)}", flush=True)
    return outcome.gain


def _prepare(config: TuneConfig, folder: Path) -> tuple[Scorer, np.ndarray, np.ndarray, str]:
    """Check the images, compute the missing feature maps, and write the identity of the run into its folder.

    Args:
        config: settings of the tuning run.
        folder: folder of the tuning run.

    Returns:
        The scorer; masks (Q,) bool of the queries with a positive, and of the half that is searched; and a description
        of the validation set.

    Raises:
        InputError: see `tune`. It is an `UnreadableImagesError` if images that cannot be decoded can be left out.
    """
    dataset, max_side, tuned_on = _validation_set(config)
    leaves_out = config.dataset is not None and config.dataset.unreadable == "skip"
    lists = _extraction_lists(dataset, max_side, Path(config.paths.stores) / CHECKED_IMAGES, leaves_out)
    network = _load_network(config, None)
    assert dataset.clusters is not None
    assert dataset.gnd is not None
    counted = np.array([any(len(gnd.get(key, ())) for key in ("positive", "easy", "hard")) for gnd in dataset.gnd])
    searched = draw_half(dataset.clusters, counted, config.seed)
    identity = _identity(config, network, lists)
    _require_identity(folder, identity)
    gpu = config.trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    stores = _compute_maps(config, lists, max_side, has_relup(network.backbone.net), device)
    # The identity contains the images, and computing the maps may find images to leave out, so it is written last.
    write_atomically(folder / _IDENTITY, json.dumps(identity, indent=1).encode())
    return Scorer(dataset, lists, stores, network.to(device), config.space.rerank), counted, searched, tuned_on


class Scorer:
    """Compute the average precision of every query from stored feature maps, with the same results as `eval.py`.

    Args:
        dataset: evaluation set.
        lists: image list of the database and, if the queries are not database images, image list of the queries.
        stores: a store of feature maps for each lower bound of ReLUP.
        network: network whose pooling and whitening layers are applied, on its device.
        rerank: whether to rerank after the search.
    """

    def __init__(
        self,
        dataset: EvaluationSet,
        lists: list[ExtractionList],
        stores: dict[float, MapStore],
        network: RetrievalNetwork,
        rerank: bool,
    ) -> None:
        self.dataset = dataset
        self.lists = lists
        self.stores = stores
        self.network = network
        self.rerank = rerank

    def average_precision(self, settings: Settings) -> np.ndarray:
        """Return the average precision of every query.

        Args:
            settings: settings of pooling and reranking.

        Returns:
            (Q,) float64 in 0..1, under the Medium protocol for Revisited sets; NaN for queries without a positive.
        """
        store, dataset = self.stores[settings.relup_alpha], self.dataset
        X = store.descriptors(settings, self.lists[0], self.network)
        Q = X if dataset.leave_one_out else store.descriptors(settings, self.lists[1], self.network)
        exclude = np.arange(len(Q)) if dataset.leave_one_out else None
        ranking, truth = None, dataset.landmark_truth
        depth = max(settings.M if self.rerank else 0, 0 if truth is None else required_depth(truth))
        if depth:
            ranking = nearest(Q, X, min(depth, len(X) - dataset.leave_one_out), exclude=exclude)
        if ranking is not None and self.rerank:
            ranking = rerank(Q, X, ranking[1], settings.M, settings.K, settings.beta)
        if ranking is not None and truth is not None:
            return np.array(score_truth(truth, *ranking).per_query()["all AP"])
        ids = None if ranking is None else ranking[1]
        result = score_set(dataset, Q, as_rows(X, "database"), ids, exclude, "cpu", 0)
        return result.ap["medium" if dataset.protocols == "revisited" else "all"]


def _validation_set(config: TuneConfig) -> tuple[EvaluationSet, int | None, str]:
    """Load the validation set: the configured set, or the held-out images of a training run.

    Returns:
        The validation set; the longer side in pixels to which larger images are shrunk, or None for no limit; and a
        description of the set, which is recorded as `tuned_on` with the tuned settings.
    """
    d = config.dataset
    if d is None:
        dataset, max_side = held_out_set(Path(config.run), config.data_root)
        tuned_on = f"{dataset.name} (training {Path(config.run).name})"
        return limit_images(dataset, config.max_images, config.seed), max_side, tuned_on
    configured = evaluation_set(d, Path(config.paths.stores) / CHECKED_IMAGES)
    assert configured is not None
    mark = TEST_MARK if d.role == "test" else "(validation set)"
    return limit_images(configured, config.max_images, config.seed), d.max_side, f"{d.name} {mark}"


def held_out_set(run: Path, data_root: str | None) -> tuple[EvaluationSet, int | None]:
    """Return the held-out images of a training run as an evaluation set, and the run's `validation.max_side`.

    Each image is a query that is searched for among all other images. Images that the training run has recorded as
    corrupt are left out.

    Args:
        run: folder of the training run, which contains `training.json`.
        data_root: folder that contains the training list and the images; None for the folder that `training.json`
            records.

    Raises:
        InputError: `training.json` or the training list is missing, or the images are in tar files.
    """
    record = run / "training.json"
    try:
        content = read_json(record)
        settings = content["identity"]["settings"]
        d, v, seed = settings["data"], settings["validation"], settings["seed"]
        root, tars, digest = Path(data_root or content["root"]), content["tars"], content["identity"]["images"][1]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{run}: contains no training run ({error!r}); give the name= or run= of a training run, or a validation "
            "set: dataset=folder dataset.database=FOLDER dataset.labels=true"
        ) from error
    listed_in = root if d["table"] is None else root / d["table"]
    if not listed_in.exists():
        raise InputError(
            f"{listed_in}: the training images of {run} are missing; give their folder or CSV file by data_root="
        )
    if tars is not None and data_root is None:
        raise InputError(
            f"{run}: the training images are in the tar files in {tars}, but tuning needs image files; unpack the tar "
            f"files and give data_root=FOLDER, the folder that contains {d['table']} and train/a/b/c/<id>.jpg"
        )
    images = read_train(root, d["table"], d["min_images"], d["classes_of"], d["leave_out"])
    images = split_landmarks(images, v["fraction"], seed)[1]
    if images.digest() != digest:
        raise InputError(
            f"{listed_in}: the images have changed since the training {run}, so its held-out images are not known; "
            "restore the images, or train again"
        )
    listed = run / CORRUPT_IMAGES
    corrupt = {line.partition("\t")[0] for line in listed.read_text().splitlines()} if listed.is_file() else set()
    rows = [i for i in range(len(images)) if images.location(i) not in corrupt]
    labels = images.labels[rows]
    dataset = EvaluationSet(
        name=f"held-out landmarks of {d['name']}",
        queries=(items := [ImageItem(images.path(i)) for i in rows]),
        database=items,
        gnd=leave_one_out_truth(labels),
        clusters=[str(images.landmarks[label]) for label in labels],
        protocols="labels",
        leave_one_out=True,
        root=images.root if d["table"] is None else root,
        how_to_get=how_to_get_gldv2_train(root) if d["table"] else f"restore the images of {root}",
    )
    return dataset, v["max_side"]


def limit_images(dataset: EvaluationSet, max_images: int, seed: int) -> EvaluationSet:
    """Reduce a leave-one-out set to at most `max_images` images of randomly chosen landmarks.

    All images of a chosen landmark are kept. A set that is not leave-one-out is returned unchanged, because its ground
    truth is defined for the complete database.

    Args:
        dataset: evaluation set.
        max_images: maximum number of images. It may be exceeded if landmarks have many images, because at least four
            landmarks are kept.
        seed: seed of the choice.

    Raises:
        InputError: a set that cannot be reduced has more than `max_images` images.
    """
    if not dataset.leave_one_out:
        count = len(dataset.database) + len(dataset.queries)
        if count > max_images:
            raise InputError(
                f"max_images={max_images}: {dataset.name} has {count} images and cannot be reduced; set max_images="
                f"{count} or more"
            )
        return dataset
    assert dataset.clusters is not None
    assert dataset.gnd is not None
    names, label = np.unique(np.array(dataset.clusters), return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(names))
    total = np.cumsum(np.bincount(label)[order])
    rows = np.flatnonzero(np.isin(label, order[: max(4, np.searchsorted(total, max_images, side="right"))]))
    new_row = np.full(len(label), -1)
    new_row[rows] = np.arange(len(rows))
    gnd: list[dict[str, Any]] = [
        {key: new_row[ids][new_row[ids] >= 0] for key, ids in dataset.gnd[i].items()} for i in rows.tolist()
    ]
    items = [dataset.database[i] for i in rows.tolist()]
    clusters = [dataset.clusters[i] for i in rows.tolist()]
    return replace(dataset, queries=items, database=items, gnd=gnd, clusters=clusters)


def draw_half(clusters: Sequence[str], counted: np.ndarray, seed: int) -> np.ndarray:
    """Choose half of the landmarks at random; the search for the best settings uses the queries of these landmarks.

    Args:
        clusters: landmark of each query.
        counted: (Q,) bool, True for queries with a positive.
        seed: seed of the choice.

    Returns:
        (Q,) bool, True for the queries of the chosen landmarks.

    Raises:
        InputError: fewer than four landmarks have queries with a positive.
    """
    names = np.unique(np.array(clusters)[counted])
    if len(names) < 4:
        raise InputError(
            "tuning needs two landmarks to find the best settings and two to check them: expected at least 4 landmarks "
            f"with two images or more, got {len(names)}; add images"
        )
    half = np.random.default_rng(seed).permutation(len(names))[: len(names) // 2]
    return np.isin(np.array(clusters), names[half])


def _extraction_lists(
    dataset: EvaluationSet, max_side: int | None, cache: Path, leaves_out: bool
) -> list[ExtractionList]:
    """Check all image files, and return the image lists of the database and the queries.

    Args:
        dataset: evaluation set.
        max_side: longer side in pixels to which larger images are shrunk; None for no limit.
        cache: file that keeps the results of the check for later runs.
        leaves_out: whether images that cannot be decoded are removed from the set.

    Returns:
        The image list of the database and, if the queries are not database images, the image list of the queries.

    Raises:
        InputError: images are missing or unreadable.
    """
    items = {"database": dataset.database} | ({} if dataset.leave_one_out else {"queries": dataset.queries})
    sets = [(title, images, dataset.how_to_get) for title, images in items.items()]
    checked = require_images(sets, cache=cache)
    return [
        ExtractionList(title, dataset.name, images, checked[title], max_side, leaves_out=leaves_out)
        for title, images in items.items()
    ]


def _load_network(config: TuneConfig, alpha: float | None) -> RetrievalNetwork:
    """Load the network with all modules of the paper enabled, and with three scales.

    Args:
        config: settings of the tuning run.
        alpha: lower bound of ReLUP. 0 turns ReLUP off. None uses the paper's value if the backbone supports ReLUP, and
            otherwise turns ReLUP off.
    """
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
    """Return the identity of a tuning run, as JSON types: search space, seed, network and images.

    A tuning run can only be resumed with the same identity.
    """
    space = {key: sorted(value) if isinstance(value, list) else value for key, value in asdict(config.space).items()}
    images = [line for images in lists for line in images.lines()]
    identity = {"space": space, "seed": config.seed, "network": network.identity(), "images": images}
    return json.loads(json.dumps(identity, default=str))


def _require_identity(folder: Path, identity: dict[str, Any]) -> None:
    """Raise InputError if the folder of a tuning run contains a run with another identity."""
    record = folder / _IDENTITY
    if record.is_file():
        try:
            before, now = flatten(read_json(record)), flatten(identity)
        except ValueError as error:
            raise InputError(f"{record}: damaged ({error}); delete {folder} to tune again") from error
        differing = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
        if differing:
            raise InputError(
                f"{folder}: contains a tuning run with different settings: {', '.join(differing[:6])}; delete the "
                "folder, or use a new name= and give the training run by run="
            )


def _compute_maps(
    config: TuneConfig, lists: list[ExtractionList], max_side: int | None, relup: bool, device: str
) -> dict[float, MapStore]:
    """Compute the missing feature maps of all images.

    Args:
        config: settings of the tuning run.
        lists: checked image lists.
        max_side: longer side in pixels to which larger images are shrunk; None for no limit.
        relup: whether the backbone supports ReLUP.
        device: device to compute on.

    Returns:
        A store of feature maps for each lower bound of ReLUP.

    Raises:
        InputError: the disk has too little free space, an image is corrupt, or a file cannot be written.
    """
    space = config.space
    grid = [Settings(regional_window=w, scales=n) for w in {5, *space.windows} for n in {3, *space.scales}]
    alphas = sorted({0.014, *space.relup_alphas}) if relup else [0.0]
    folder = Path(config.paths.outputs) / "maps"
    stores = {alpha: MapStore(folder, _load_network(config, alpha), max_side) for alpha in alphas}
    todo = [(store, images, store.missing(images, grid)) for store in stores.values() for images in lists]
    needed = sum(store.size(images, rows, grid) for store, images, rows in todo)
    log.info(
        "Computing %d of %d feature map files (about %.2f GB, in %s) for the ReLUP lower bounds %s",
        sum(len(rows) for _, _, rows in todo),
        len(alphas) * sum(len(images.items) for images in lists),
        needed / 1e9,
        folder,
        alphas,
    )
    require_space(folder, needed)
    for store, images, rows in todo:
        if rows:
            store.fill(images, rows, grid, device, config.trainer.num_workers)
    return stores
