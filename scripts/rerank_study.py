"""Choose the constants of rerankers on rendered landmarks, and compare rerankers.

Usage: python scripts/rerank_study.py STEP, where STEP is one of

choose: score the grid of constants of each method on the rendered sets, and print the mean gains
reject: score methods that are not part of the package on the rendered sets
dims:   print the numbers of effective dimensions of shortlists, by which `auto` decides
table:  score all rerankers on the rendered sets and on --test, with and without centering

The rendered sets need two runs of the demo, whose networks are each evaluated on the landmarks of the other run:
python scripts/demo.py --seed 1 --data data/seed1 --outputs outputs/seed1 seed=1, and the same with 2. They also need
landmarks with 40 images each: superglobal toy-data --size views --seed 1 --out data/views1/toy, and the same with 2.
Results are in docs/background/reranking.md.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import superglobal
from superglobal.data.evaluation_set import group_by_landmark
from superglobal.metrics.revisited import cluster_interval
from superglobal.models.network import RetrievalNetwork
from superglobal.reranking.auto import effective_dims
from superglobal.reranking.base import dots, gram_of, mask_of, nearest, with_query
from superglobal.reranking.registry import RERANKERS
from superglobal.utils.precision import full_precision

M = 400
N_QUERIES = 150  # queries drawn from each set of training landmarks
Scores = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Function of queries (B, D), shortlists (B, M, D) and Gram matrices (B, M, M) that returns scores (B, M)."""


@dataclass
class StudySet:
    """Descriptors with labels.

    Attributes:
        name: name of the set.
        Q, X: (Q, D) queries and (N, D) database, unit L2 norm.
        positives, ignored: for each query and protocol, database rows that are relevant, or left out of the ranking.
        own: (Q,) row of each query in the database, which is excluded from the search; None if queries are not in it.
    """

    name: str
    Q: np.ndarray
    X: np.ndarray
    positives: list[dict[str, np.ndarray]]
    ignored: list[dict[str, np.ndarray]]
    own: np.ndarray | None = None

    def centered(self) -> StudySet:
        """Return the set with the mean of the database subtracted from all descriptors."""
        mean = self.X.mean(axis=0)
        return StudySet(
            f"{self.name}, centered", unit(self.Q - mean), unit(self.X - mean), self.positives, self.ignored, self.own
        )

    def score(self, methods: Mapping[str, Scores]) -> dict[str, dict[str, np.ndarray]]:
        """Return the AP (Q,) of each method and protocol; the first method is "none", without reranking."""
        similarity = self.Q @ self.X.T
        if self.own is not None:
            similarity[np.arange(len(self.Q)), self.own] = -np.inf
        order = np.argsort(-similarity, axis=1, kind="stable")
        if self.own is not None:
            order = order[:, :-1]
        heads: dict[str, list[np.ndarray]] = {name: [] for name in methods}
        with torch.inference_mode(), full_precision():
            for start in range(0, len(order), 16):
                head = order[start : start + 16, :M]
                q, T = torch.from_numpy(self.Q[start : start + 16]), torch.from_numpy(self.X[head])
                gram = gram_of(T)
                for name, method in methods.items():
                    scores = method(q, T, gram.clone()).float()
                    best = torch.sort(scores, dim=1, descending=True, stable=True).indices.numpy()
                    heads[name].append(np.take_along_axis(head, best, axis=1))
        result = {"none": self._ap(order)}
        for name, parts in heads.items():
            result[name] = self._ap(np.concatenate([np.concatenate(parts), order[:, M:]], axis=1))
        return result

    def _ap(self, order: np.ndarray) -> dict[str, np.ndarray]:
        """Return the AP (Q,) of each protocol, NaN without positives, for rankings (Q, N) of database rows."""
        aps: dict[str, list[float]] = {protocol: [] for protocol in self.positives[0]}
        for ranking, positives, ignored in zip(order, self.positives, self.ignored, strict=True):
            for protocol, rows in positives.items():
                kept = ranking[~np.isin(ranking, ignored[protocol])]
                ranks = np.flatnonzero(np.isin(kept, rows))
                aps[protocol].append(superglobal.average_precision(ranks, len(rows)))
        return {protocol: np.array(values) for protocol, values in aps.items()}


def unit(x: np.ndarray) -> np.ndarray:
    """Return rows scaled to unit L2 norm, as float32."""
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def extracted(cache: Path, network: Callable[[], RetrievalNetwork], images: Iterable) -> np.ndarray:
    """Return the descriptors (n, D) of images. They are stored beside `cache`, for each network and list of images."""
    model, images = network(), list(images)
    key = hashlib.sha256(repr((model.identity(), images)).encode()).hexdigest()[:16]
    file = cache.with_name(f"{cache.stem}-{key}.npy")
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(".unfinished.npy")
        np.save(unfinished, superglobal.extract(model, images, max_side=1024))
        unfinished.replace(file)
    return np.load(file)


def training_set(name: str, root: Path, network: Callable[[], RetrievalNetwork], cache: Path) -> StudySet:
    """Return the training landmarks of a toy set: some images are queries, and are searched for among all others."""
    paths, labels = [], []
    for row in csv.DictReader((root / "gldv2" / "train_clean.csv").open()):
        for image in row["images"].split():
            paths.append(root / "gldv2" / "train" / image[0] / image[1] / image[2] / f"{image}.jpg")
            labels.append(row["landmark_id"])
    X, landmarks = extracted(cache, network, paths), np.array(labels)
    own = np.sort(np.random.default_rng(0).permutation(len(X))[:N_QUERIES])
    positives = [{"all": np.setdiff1d(np.flatnonzero(landmarks == landmarks[i]), [i])} for i in own]
    return StudySet(name, X[own], X, positives, [{"all": np.array([], int)}] * len(own), own)


def revisited_set(
    name: str, root: Path, folder: str, network: Callable[[], RetrievalNetwork], cache: Path, distractors: Path | None
) -> StudySet:
    """Return a set in the layout of the Revisited benchmarks, with the images below `distractors` in its database."""
    data = superglobal.revisited_set(root, folder)
    X = extracted(cache.with_suffix(".database.npy"), network, data.database)
    Q = extracted(cache.with_suffix(".queries.npy"), network, data.queries)
    if distractors is not None:
        images = sorted(distractors.rglob("*.jpg"))
        X = np.concatenate([X, extracted(cache.with_suffix(".distractors.npy"), network, images)])
    positives, ignored = [], []
    for labels in superglobal.load_ground_truth(root / folder / f"gnd_{folder}.pkl").gnd:
        easy, hard, junk = (labels[key] for key in ("easy", "hard", "junk"))
        positives.append({"easy": easy, "medium": np.concatenate([easy, hard]), "hard": hard})
        ignored.append({"easy": np.concatenate([junk, hard]), "medium": junk, "hard": np.concatenate([junk, easy])})
    return StudySet(name, Q, X, positives, ignored)


def rendered_sets(cache: Path) -> list[StudySet]:
    """Return training landmarks with 4 to 8 images, with 40 images, and evaluation landmarks, of two seeds.

    Each is returned under three networks: ImageNet's, that of the demo of the other seed, and an untrained one.

    Args:
        cache: folder for descriptors.
    """
    sets = []
    for seed, other in ((1, 2), (2, 1)):
        root = Path(f"data/seed{seed}/toy")
        networks = {
            "Lite0": lambda: superglobal.load_model("package", pooling="gem", scales=1),
            "trained": lambda other=other: superglobal.load_model(
                f"outputs/seed{other}/train/demo/best.safetensors", pooling="gem", scales=1
            ),
            "untrained": lambda: superglobal.load_model("random", backbone="test_resnet", pooling="gem", scales=1),
        }
        for name, network in networks.items():
            file = cache / f"{name}_{seed}.npy"
            sets.append(training_set(f"{name}, training {seed}", root, network, file))
            many = cache / f"{name}_views_{seed}.npy"
            sets.append(training_set(f"{name}, views {seed}", Path(f"data/views{seed}/toy"), network, many))
            sets.append(revisited_set(f"{name}, evaluation {seed}", root, "toy", network, file, None))
    return sets


def registered(name: str, **values: object) -> Scores:
    """Return a reranker of the package as a function of the form `Scores`."""
    reranker = RERANKERS[name]
    parameters = reranker.complete(values)
    del parameters["M"]

    def scores(q: torch.Tensor, T: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
        return reranker.function(*(x.to(reranker.dtype) for x in (q, T, gram)), **parameters)

    return scores


def grid() -> dict[str, Scores]:
    """Return the settings among which the constants are chosen."""
    settings: list[tuple[str, dict[str, object]]] = [("superglobal", {"K": K}) for K in (1, 3, 5, 9)]
    settings += [("mutual", {}), ("diffusion", {})]
    settings += [("kreciprocal", {"k1": k1, "k2": k2}) for k1 in (6, 8, 10, 15, 20) for k2 in (3, 4, 6)]
    settings += [("gnn", {"k1": k1, "k2": k2}) for k1 in (8, 12, 16, 20, 24) for k2 in (2, 3, 4)]
    methods = {
        " ".join([name, *(f"{k}={v}" for k, v in values.items())]): registered(name, **values)
        for name, values in settings
    }
    for k1, k2 in ((6, 2), (8, 3), (10, 3), (15, 4), (20, 6)):
        methods |= {f"constant weights k1={k1} k2={k2}": constant_weights(k1, k2)}
    return methods


def constant_weights(k1: int, k2: int) -> Scores:
    """Propagation of `gnn` with the weights of Zhang et al. (arXiv 2012.07620): 1 in A, and s^2 in w."""

    def scores(q: torch.Tensor, T: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
        similarity = with_query(dots(T, q), gram)
        near = nearest(similarity, max(k1, k2 + 1))
        size = similarity.shape[-1]
        A = mask_of(near[..., :k1], size).float()
        weights = similarity.clamp(min=0).square() * mask_of(near[..., : k2 + 1], size)
        weights.diagonal(dim1=1, dim2=2).fill_(1)
        for _ in range(2):
            A = torch.bmm(weights, A + A.transpose(1, 2))
        A = torch.nn.functional.normalize(A, dim=-1)
        return dots(A[:, 1:], A[:, 0])

    return scores


def context_similarity(k: int) -> Scores:
    """Context similarity of STML (Kim et al., CVPR 2022): shared reciprocal neighbors, and the distance."""

    def scores(q: torch.Tensor, T: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
        similarity = with_query(dots(T, q), gram)
        near = nearest(similarity, k)
        V = mask_of(near, similarity.shape[-1])
        V = (V & V.transpose(1, 2)).float()
        C = torch.bmm(V, V.transpose(1, 2)) / V.sum(dim=-1, keepdim=True)
        mean = mask_of(near[..., : max(1, k // 2)], C.shape[-1]).float()
        C = torch.bmm(mean / mean.sum(dim=-1, keepdim=True), C)
        C = (C + C.transpose(1, 2)) / 2
        return (torch.exp((2 * similarity[:, 0, 1:] - 2) / 0.1) + C[:, 0, 1:]) / 2

    return scores


def convolution(k: int, beta: float, rounds: int) -> Scores:
    """Graph convolution of the descriptors (GCR, arXiv 2306.08792) on the k nearest images of each image."""

    def scores(q: torch.Tensor, T: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
        X = torch.cat([q[:, None], T], dim=1)
        for _ in range(rounds):
            similarity = torch.bmm(X, X.transpose(1, 2))
            S = torch.exp(similarity / beta) * mask_of(nearest(similarity, k), X.shape[1])
            S = S / S.sum(dim=2, keepdim=True).sqrt() / S.sum(dim=1, keepdim=True).sqrt()
            X = torch.nn.functional.normalize(torch.bmm(S, X), dim=-1)
        return dots(X[:, 1:], X[:, 0])

    return scores


def bidirectional_diffusion(k: int, k_support: int, mix: float) -> Scores:
    """Diffusion of similarities from both sides (CAS, Luo et al., ICML 2024), without smoothing of neighborhoods."""
    alpha = 1 / 1.23

    def scores(q: torch.Tensor, T: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
        similarity = with_query(dots(T, q), gram)
        distance = (2 - 2 * similarity).clamp(min=0)
        distance = distance / distance.amax(dim=-1, keepdim=True)
        A = torch.exp(-distance / 0.3) * mask_of(nearest(similarity, k), distance.shape[-1])
        A = (A + A.transpose(1, 2)) / 2
        degree = A.sum(dim=-1).rsqrt()
        S = degree[:, :, None] * A * degree[:, None]
        eye = torch.eye(A.shape[-1])
        F = eye.expand_as(A)
        for _ in range(10):
            F = alpha / 2 * (torch.bmm(F, S) + torch.bmm(S, F)) + (1 - alpha) * eye
        V = F * mask_of(F.topk(min(k_support, F.shape[-1]), dim=-1).indices, F.shape[-1])
        V = V / V.sum(dim=-1, keepdim=True)
        p, middle = V[:, :1], (V[:, :1] + V[:, 1:]) / 2
        entropy = [torch.special.entr(x).sum(dim=-1) for x in (middle, p, V[:, 1:])]
        divergence = entropy[0] - (entropy[1] + entropy[2]) / 2
        return -(1 - mix) * divergence - mix * distance[:, 0, 1:]

    return scores


def gated_expansion(k: int) -> Scores:
    """Average query expansion by the images that have the query among their k nearest images."""

    def scores(q: torch.Tensor, T: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
        similarity = with_query(dots(T, q), gram)
        near = mask_of(nearest(similarity, k + 1), similarity.shape[-1])
        members = (near[:, 0] & near[:, :, 0])[:, 1:].float() * similarity[:, 0, 1:].clamp(min=0)
        return dots(T, q + torch.bmm(members[:, None], T)[:, 0])

    return scores


def rejected() -> dict[str, Scores]:
    """Return methods that are not part of the package, each with several constants."""
    methods: dict[str, Scores] = {f"context similarity k={k}": context_similarity(k) for k in (6, 10, 20)}
    for beta in (0.1, 0.3):
        methods |= {f"graph convolution k={k} beta={beta} x2": convolution(k, beta, 2) for k in (4, 8, 15)}
    for k, support in ((6, 10), (6, 30), (10, 30)):
        methods |= {f"bidirectional diffusion k={k}, {support}": bidirectional_diffusion(k, support, 0.1)}
    return methods | {f"gated expansion k={k}": gated_expansion(k) for k in (3, 5, 10)}


def main_protocol(aps: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the AP of the main protocol: Medium, or that of all positives."""
    return aps["medium"] if "medium" in aps else aps["all"]


def print_scores(sets: list[StudySet], methods: Mapping[str, Scores]) -> None:
    """Print the mean gains of mAP over no reranking, in percent, for each kind of rendered sets, as a Markdown table.

    The last two columns are the mean of the kinds, by which the methods are sorted, and the smallest gain of any set.
    """
    gains: dict[str, dict[str, list[float]]] = {}
    kinds = ("training", "views", "evaluation")
    for data in sets:
        kind = next(kind for kind in kinds if kind in data.name)
        results = {name: 100 * np.nanmean(main_protocol(aps)) for name, aps in data.score(methods).items()}
        for method in methods:
            values = gains.setdefault(method, {kind: [] for kind in kinds})
            values[kind].append(results[method] - results["none"])
    rows = []
    for method, values in gains.items():
        means = [float(np.mean(values[kind])) for kind in kinds]
        rows.append((float(np.mean(means)), min(min(values[kind]) for kind in kinds), method, means))
    print("| method | " + " | ".join(kinds) + " | mean | smallest |\n" + "|---" * (len(kinds) + 3) + "|")
    for mean, smallest, method, means in sorted(rows, reverse=True):
        columns = [f"{value:+.2f}" for value in (*means, mean, smallest)]
        print(f"| {method} | " + " | ".join(columns) + " |", flush=True)


def print_dims(sets: list[StudySet]) -> None:
    """Print the range of the effective dimensions of shortlists of 60 queries of each set, as a Markdown table."""
    print("| set | 50 images | 100 images | 400 images |\n|---|---|---|---|")
    for data in sets:
        ranges = []
        for size in (50, 100, M):
            shortlists = np.argsort(-data.Q[:60] @ data.X.T, axis=1, kind="stable")[:, :size]
            dims = torch.cat([effective_dims(gram_of(torch.from_numpy(data.X[rows])[None])) for rows in shortlists])
            ranges.append(f"{float(dims.min()):.1f} to {float(dims.max()):.1f}")
        print(f"| {data.name} | " + " | ".join(ranges) + " |", flush=True)


CHOSEN: dict[str, Scores] = {
    "superglobal": registered("superglobal"),
    "mutual": registered("mutual"),
    "kreciprocal": registered("kreciprocal"),
    "kreciprocal k1=15 k2=4": registered("kreciprocal", k1=15, k2=4),
    "diffusion": registered("diffusion"),
    "constant weights k1=10 k2=3": constant_weights(10, 3),
    "gnn": registered("gnn"),
    "auto": registered("auto"),
}


def all_rerankers(data: StudySet) -> dict[str, dict[str, np.ndarray]]:
    """Return the AP (Q,) of every reranker of the package and every protocol, with the settings of `CHOSEN`."""
    expanded = superglobal.expand_queries(data.Q, data.X, exclude=data.own)
    augmented = superglobal.augment_database(data.X).block(0, len(data.X))
    return {
        **data.score(CHOSEN),
        "aqe": replace(data, Q=expanded).score({})["none"],
        "adba": replace(data, X=augmented).score({})["none"],
    }


def print_table(sets: list[StudySet]) -> None:
    """Print the main mAP, in percent, of each reranker without and with centering, as a Markdown table.

    A column is the mean over the sets whose names differ only by the seed at the end.
    """
    values: dict[str, dict[str, list[float]]] = {}
    columns = list(dict.fromkeys(data.name.rstrip(" 12") for data in sets))
    for data in sets:
        for label, variant in (("", data), (", centered", data.centered())):
            for method, aps in all_rerankers(variant).items():
                row = values.setdefault(method + label, {column: [] for column in columns})
                row[data.name.rstrip(" 12")].append(100 * float(np.nanmean(main_protocol(aps))))
    print("| reranker | " + " | ".join(columns) + " |\n|---" + "|---" * len(columns) + "|")
    for method, row in sorted(values.items(), key=lambda item: item[0].endswith("centered")):
        print(f"| {method} | " + " | ".join(f"{np.mean(row[column]):.1f}" for column in columns) + " |", flush=True)


def print_test(data: StudySet) -> None:
    """Print the mAP of all rerankers under each protocol, with the gain over none and its 95 % interval."""
    relevant = [p.get("medium", p.get("all")) for p in data.positives]
    if data.own is not None:
        relevant = [np.append(rows, i) for rows, i in zip(relevant, data.own, strict=True)]
    clusters = np.array(group_by_landmark(relevant))
    base = None
    for name, aps in all_rerankers(data).items():
        base = main_protocol(aps) if base is None else base
        gain = main_protocol(aps) - base
        counted = ~np.isnan(gain)
        low, high = (100 * limit for limit in cluster_interval(gain[counted], clusters[counted], 0))
        scores = " / ".join(f"{100 * np.nanmean(ap):.2f}" for ap in aps.values())
        interval = f"{100 * np.nanmean(gain):+.2f} | {low:+.1f} to {high:+.1f}"
        print(f"| {data.name} | {name} | {scores} | {interval} |", flush=True)


def main() -> None:
    """Run one step of the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("choose", "reject", "dims", "table"))
    parser.add_argument("--cache", type=Path, default=Path("outputs/rerank_study"), help="folder for descriptors")
    parser.add_argument("--test", type=Path, help="folder of a test set in the Revisited layout")
    parser.add_argument("--distractors", type=Path, help="folder of images; the test set is also scored with these")
    args = parser.parse_args()
    if (args.test and args.step != "table") or (args.distractors and not args.test):
        parser.error("--test belongs to the step table, and --distractors to --test")
    sets = rendered_sets(args.cache)
    trained = [data.centered() for data in sets if not data.name.startswith("untrained")]
    if args.step == "choose":
        print_scores(trained, grid())
    elif args.step == "reject":
        print_scores(trained, rejected())
    elif args.step == "dims":
        print_dims(sets)
    else:
        lite0 = lambda: superglobal.load_model("package", pooling="gem", scales=1)  # noqa: E731
        tests = []
        for extra in [None, *([args.distractors] if args.distractors else [])] if args.test else []:
            name = args.test.name + (" + distractors" if extra else "")
            file = args.cache / f"{args.test.name}.npy"
            tests.append(revisited_set(name, args.test.parent, args.test.name, lite0, file, extra))
        print_table(sets + tests)
        for data in tests:
            print_test(data)
            print_test(data.centered())


if __name__ == "__main__":
    main()
