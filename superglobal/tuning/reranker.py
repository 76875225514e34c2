"""Choose a reranker, centering, or no reranking by cross-validation on labeled queries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from superglobal.errors import InputError
from superglobal.metrics.evaluate import Scorer, make_scorer
from superglobal.metrics.revisited import LABELS, cluster_interval
from superglobal.reranking.registry import get_reranker, rerank
from superglobal.retrieval.ranks import exact_ranks
from superglobal.retrieval.rows import Rows, as_exclude, as_queries, as_rows, load_npy
from superglobal.retrieval.search import search
from superglobal.retrieval.store import DescriptorStore
from superglobal.retrieval.whitening import Whitening
from superglobal.utils.io import read_csv, read_file

Setting = tuple[str, Mapping[str, Any]]
"""Name of a reranker, and its parameters; "none" for no reranking."""
SETTINGS: tuple[Setting, ...] = (
    ("none", {}),
    *(("superglobal", {"K": K}) for K in (1, 3, 5, 9)),
    ("mutual", {}),
    *(("kreciprocal", {"k1": k1, "k2": k2}) for k1, k2 in ((8, 4), (15, 4), (20, 6))),
    *(("gnn", {"k1": k1, "k2": k2}) for k1, k2 in ((8, 2), (12, 3), (16, 3), (24, 4))),
)
"""Settings that `tune_reranker` compares by default, each with and without centering."""
_MIN_GROUPS = 10  # with fewer groups, a bootstrap interval is too narrow


@dataclass(frozen=True)
class Candidate:
    """Configuration that was compared.

    Attributes:
        method: name of the reranker; "none" for no reranking.
        parameters: parameters of the reranker.
        center: whether the mean of the database is subtracted from all descriptors.
        ap: (Q,) average precision of each query, 0..1; NaN for a query without positives.
    """

    method: str
    parameters: Mapping[str, Any]
    center: bool
    ap: np.ndarray

    @property
    def map(self) -> float:
        """Mean average precision over the queries with positives, 0..1."""
        return float(np.nanmean(self.ap))

    @property
    def settings(self) -> str:
        """Return the configuration as settings of `eval.py`."""
        words = [f"rerank={self.method}", *(f"rerank.{key}={value}" for key, value in self.parameters.items())]
        return " ".join([*words, *(["whitening=center"] if self.center else [])])


@dataclass(frozen=True)
class RerankerChoice:
    """Result of `tune_reranker`.

    Attributes:
        best: chosen configuration. It is the one without reranking and centering if the gain of choosing is not
            significant.
        candidates: all configurations, that without reranking and centering first, then by descending mAP.
        gain: mean gain in AP over the first candidate on queries that had no part in the choice, in -1..1.
        interval: 95 % confidence interval of the gain.
    """

    best: Candidate
    candidates: tuple[Candidate, ...]
    gain: float
    interval: tuple[float, float]


def tune_reranker(
    Q: Any,
    X: Any,
    positives: Sequence[Any],
    *,
    exclude: Any = None,
    M: int = 400,
    settings: Sequence[Setting] = SETTINGS,
    folds: int = 5,
    device: str | torch.device | None = None,
    seed: int = 0,
) -> RerankerChoice:
    """Choose a reranker and centering on labeled queries, or none of them.

    The queries are divided into folds, with queries that have common positives in one fold. For each fold, the
    configuration with the best mAP on the other folds is applied to the queries of the fold. The gains of all folds
    estimate what choosing is worth on new queries of the same kind. If the confidence interval of this gain includes 0,
    the choice is not to rerank. Otherwise it is the configuration with the best mAP on all queries.

    Args:
        Q: (Q, D) queries, unit L2 norm.
        X: (N, D) database, unit L2 norm: an array, a memory map, a tensor or a `DescriptorStore`.
        positives: for each query, the database rows that are relevant: (n,) integers.
        exclude: (Q,) database row of each query, which is left out of its results; None if no query is in the database.
        M: number of images that are reranked, >= 1.
        settings: rerankers with parameters, as in `SETTINGS`. Each is compared with and without centering.
        folds: number of folds, >= 2.
        device: device to compute on; the CPU by default.
        seed: seed of the folds and of the bootstrap.

    Raises:
        InputError: an array or a row id is invalid, a reranker or a parameter is unknown, or fewer groups of queries
            than folds have positives.
    """
    settings = [(method, _complete(method, values, M)) for method, values in settings]
    if ("none", {}) not in settings:
        raise InputError('settings: expected ("none", {}) among them, with which the others are compared')
    if not isinstance(seed, int) or seed < 0:
        raise InputError(f"seed={seed}: expected an integer >= 0")
    rows = as_rows(X, "database")
    queries = as_queries(Q, rows.dim)
    scorer = make_scorer([{"positive": ids} for ids in positives], len(queries), len(rows), LABELS, seed=seed)
    labeled = np.array([i for i, ids in enumerate(scorer.targets) if len(ids)], np.int64)
    others = as_exclude(exclude, len(queries))
    groups = _groups([scorer.targets[i] if others is None else [*scorer.targets[i], others[i]] for i in labeled])
    n_groups = int(groups.max(initial=-1)) + 1
    if n_groups < _MIN_GROUPS:
        raise InputError(
            f"positives: the queries form {n_groups} groups without common positives, and at least {_MIN_GROUPS} are "
            "needed to choose; label queries of more objects"
        )
    if not isinstance(folds, int) or not 2 <= folds <= n_groups:
        raise InputError(f"folds={folds}: expected an integer in 2..{n_groups}, the number of groups of queries")
    candidates = []
    for center in (False, True):
        q, x = queries, rows
        if center:
            whitening = Whitening("center").fit(rows)
            q, x = whitening.transform(queries), whitening.transform_rows(rows, rows.name)
        candidates += _candidates(q, x, scorer, others, M, settings, device, center)
    baseline = next(c for c in candidates if c.method == "none" and not c.center)
    aps = np.stack([c.ap[labeled] for c in candidates])
    fold = np.random.default_rng(seed).permutation(n_groups)[groups] % folds
    gains = np.empty(len(labeled))
    for i in range(folds):
        winner = int(aps[:, fold != i].mean(axis=1).argmax())
        gains[fold == i] = (aps[winner] - baseline.ap[labeled])[fold == i]
    interval = cluster_interval(gains, groups, seed)
    best = candidates[int(aps.mean(axis=1).argmax())] if interval[0] > 0 else baseline
    ordered = sorted((c for c in candidates if c is not baseline), key=lambda c: -c.ap[labeled].mean())
    return RerankerChoice(best, (baseline, *ordered), float(gains.mean()), interval)


def _complete(method: str, values: Mapping[str, Any], M: int) -> dict[str, Any]:
    """Return the parameters of a setting, with M.

    Raises:
        InputError: the reranker or a parameter is unknown, a value is invalid, or the reranker searches again.
    """
    if method == "none" and not values:
        return {}
    reranker = get_reranker(method, "settings")
    if reranker.searches_again is not None:
        raise InputError(f"settings: {method} searches again; only rerankers of shortlists can be compared")
    parameters = {**values, "M": values.get("M", M)}
    reranker.complete(parameters)
    return parameters


def _groups(sets: Sequence[Sequence[int]]) -> np.ndarray:
    """Divide sets of rows into groups, so that sets of different groups have no row in common.

    Returns:
        The number of the group of each set, 0-based: (n,) int64.
    """
    parent = list(range(len(sets)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    owner: dict[int, int] = {}
    for i, rows in enumerate(sets):
        for row in rows:
            parent[root(i)] = root(owner.setdefault(int(row), i))
    return np.unique([root(i) for i in range(len(sets))], return_inverse=True)[1]


def load_descriptors(path: Path) -> Rows:
    """Open descriptors, from a .npy file (N, D) or the folder of a descriptor store.

    Raises:
        InputError: the path is neither, or its contents are invalid.
    """
    return as_rows(DescriptorStore.open(path), str(path)) if path.is_dir() else load_npy(path)


def read_labels(path: Path, n_rows: int) -> np.ndarray:
    """Read a text file with one label per database row: (N,) str.

    Raises:
        InputError: the file cannot be read, or the number of its lines is not `n_rows`.
    """
    try:
        labels = [line.strip() for line in read_file(path).decode("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable text file ({error})") from error
    if len(labels) != n_rows:
        raise InputError(f"{path}: {len(labels)} labels for {n_rows} images; write one label per line")
    if "" in labels:
        raise InputError(f"{path}, line {labels.index('') + 1}: the label is empty; give each image a label")
    return np.array(labels)


def read_pairs(path: Path, n_queries: int, n_rows: int) -> list[np.ndarray]:
    """Read a CSV file of relevant pairs, with the columns "query" and "database" (0-based rows).

    Returns:
        For each query, the rows of its relevant images, (n,) int64.

    Raises:
        InputError: the file cannot be read, has other columns, or a number is out of range.
    """
    try:
        lines = read_csv(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable CSV file ({error})") from error
    if not lines or not {"query", "database"} <= set(lines[0]):
        raise InputError(f"{path}: expected the columns query and database in the first line")
    columns = [lines[0].index(name) for name in ("query", "database")]
    positives: list[set[int]] = [set() for _ in range(n_queries)]
    for number, line in enumerate(lines[1:], 2):
        try:
            query, image = (int(line[column]) for column in columns)
        except (IndexError, ValueError) as error:
            raise InputError(
                f"{path}, line {number}: expected two integers, the rows of a query and an image"
            ) from error
        if not (0 <= query < n_queries and 0 <= image < n_rows):
            raise InputError(
                f"{path}, line {number}: query={query} database={image}: expected query in 0..{n_queries - 1} and "
                f"database in 0..{n_rows - 1}"
            )
        positives[query].add(image)
    return [np.array(sorted(rows), np.int64) for rows in positives]


def positives_of_labels(labels: np.ndarray, sample: int, seed: int = 0) -> tuple[np.ndarray, list[np.ndarray]]:
    """Draw images that share their label with another image as queries.

    Args:
        labels: (N,) label of each image.
        sample: maximum number of queries, >= 1.
        seed: seed of the draw.

    Returns:
        The rows of the queries, (Q,) int64 in ascending order, and for each query the rows of the other images with its
        label, (n,) int64.

    Raises:
        InputError: no label has two images, or `sample` is less than 1.
    """
    _, label, count = np.unique(labels, return_inverse=True, return_counts=True)
    usable = np.flatnonzero(count[label] > 1)
    if not len(usable) or sample < 1:
        raise InputError(f"labels: expected a label with two images, and sample={sample} to be at least 1")
    own = np.sort(np.random.default_rng(seed).permutation(usable)[:sample])
    return own, [np.setdiff1d(np.flatnonzero(label == label[i]), [i]) for i in own]


def _candidates(
    Q: np.ndarray,
    X: Rows,
    scorer: Scorer,
    exclude: np.ndarray | None,
    M: int,
    settings: Sequence[Setting],
    device: str | torch.device | None,
    center: bool,
) -> list[Candidate]:
    """Search once, rerank the results with each of the settings, and return one candidate per setting.

    Args:
        Q, X: (Q, D) queries and (N, D) database, centered if `center` is true.
        scorer: ground truth.
        exclude: (Q,) database row that is left out of the results of each query; None for none.
        M, settings, device: as in `tune_reranker`.
        center: value for the candidates.
    """
    target = str(device or "cpu")
    reachable = len(X) - len(X.skipped) - (exclude is not None)
    ids = search(Q, X, min(M, reachable), exclude=exclude, device=target)[1]
    ranks = exact_ranks(Q, X, scorer.targets, device=target, exclude=exclude)
    result = []
    for method, parameters in settings:
        new = ranks
        if method != "none":
            new = scorer.reranked(ranks, rerank(Q, X, ids, method=method, device=device, **parameters)[1])
        result.append(Candidate(method, dict(parameters), center, scorer.score(new).ap["all"]))
    return result
