"""Count the notes of the search page about queries that probably have no match in the collection.

Usage: python scripts/absence_study.py [--test FOLDER --distractors FOLDER]

The queries are those of the rendered sets of scripts/rerank_study.py or of --test. The rendered evaluation sets
are left out, because their queries are boxes. The queries are searched for in their database, in the same database
without the images of their landmark and, for the images of --distractors as queries, in a database of other landmarks.
Results are in docs/guides/search_page.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from rerank_study import N_QUERIES, StudySet, extracted, rendered_sets, revisited_set, unit

import superglobal
from superglobal.data.evaluation_set import group_by_landmark
from superglobal.search_page.image_search import is_probably_absent

LEVELS = (0.05, 0.1, 0.2)  # maximum rates of false alarms


def leave_one_out(data: StudySet) -> StudySet:
    """Return a Revisited set with whole database images, each of a known landmark, as queries instead of boxes."""
    relevant = [p["medium"] for p in data.positives]
    clusters = np.array(group_by_landmark(relevant))
    landmark_of = np.full(len(data.X), -1)
    for positives, ignored, cluster in zip(data.positives, data.ignored, clusters, strict=True):
        landmark_of[np.concatenate([positives["medium"], ignored["medium"]])] = cluster
    own = np.random.default_rng(0).permutation(np.unique(np.concatenate(relevant)))[:N_QUERIES]
    positives = [{"all": np.setdiff1d(np.flatnonzero(landmark_of == landmark_of[i]), [i])} for i in own]
    ignored = [{"all": np.array([], int)}] * len(own)
    return StudySet(f"{data.name}, whole photos", data.X[own], data.X, positives, ignored, own)


def print_absence(data: StudySet, others: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Print and return how many percent of queries get the search page's note at each level.

    Args:
        data: queries and their database, once as it is and once without all images of the query's landmark.
        others: (n, D) queries whose object is not in the database; None for none.

    Returns:
        Percentages (3,) by case: the landmark is in the database, it was removed, and `others`.
    """
    scores, similarity = data.Q @ data.X.T, data.X @ data.X.T
    np.fill_diagonal(similarity, -2)

    def notes(query: np.ndarray, removed: np.ndarray) -> list[bool]:
        kept = np.setdiff1d(np.arange(len(data.X)), removed)
        nearest = similarity[np.ix_(kept, kept)].max(axis=1)
        return [is_probably_absent(query[kept].max(), nearest, level) for level in LEVELS]

    main = "medium" if data.own is None else "all"
    own = np.empty((len(data.Q), 0), int) if data.own is None else data.own[:, None]
    landmarks = [
        np.concatenate([p[main], i[main], o]) for p, i, o in zip(data.positives, data.ignored, own, strict=True)
    ]
    rates = {
        "in the database": [notes(*pair) for pair in zip(scores, own, strict=True)],
        "landmark removed": [notes(*pair) for pair in zip(scores, landmarks, strict=True)],
    }
    if others is not None:
        rates["other images"] = [notes(query, np.empty(0, int)) for query in others @ data.X.T]
    percent = {name: 100 * np.mean(values, axis=0) for name, values in rates.items()}
    print_row(data.name, percent)
    return percent


def print_row(name: str, percent: Mapping[str, np.ndarray]) -> None:
    """Print a row of the table: a name, and for each case the percentages at all levels."""
    cells = [f"{case}: " + " / ".join(f"{value:.1f}" for value in values) for case, values in percent.items()]
    print("| " + " | ".join([name, *cells]) + " |", flush=True)


def main() -> None:
    """Print the percentages of the rendered sets and their mean or, with --test, those of a test set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path("outputs/rerank_study"), help="folder for descriptors")
    parser.add_argument("--test", type=Path, help="folder of a test set in the Revisited layout")
    parser.add_argument("--distractors", type=Path, help="folder of images of other landmarks, required with --test")
    args = parser.parse_args()
    if (args.test is None) != (args.distractors is None):
        parser.error("--test and --distractors: expected both or neither")
    if args.test is None:
        sets = [d for d in rendered_sets(args.cache) if not d.name.startswith("untrained") and d.own is not None]
        rows = [print_absence(variant) for data in sets for variant in (data, data.centered())]
        print_row(f"mean of {len(rows)} sets", {case: np.mean([row[case] for row in rows], axis=0) for case in rows[0]})
        return
    lite0 = lambda: superglobal.load_model("package", pooling="gem", scales=1)  # noqa: E731
    file = args.cache / f"{args.test.name}.npy"
    boxes = revisited_set(args.test.name, args.test.parent, args.test.name, lite0, file, None)
    images = sorted(args.distractors.rglob("*.jpg"))
    others = extracted(file.with_suffix(".distractors.npy"), lite0, images)
    photos = leave_one_out(boxes)
    print_absence(boxes)
    print_absence(boxes.centered())
    print_absence(photos, others)
    print_absence(photos.centered(), unit(others - photos.X.mean(axis=0)))


if __name__ == "__main__":
    main()
