"""Choose a reranker, centering, or no reranking on your own labeled queries, by cross-validation.

Examples:
  superglobal tune-reranker gallery.npy --labels labels.txt
  superglobal tune-reranker gallery.npy --queries queries.npy --positives pairs.csv

A descriptor file is a .npy file (N, D) or the folder of a descriptor store. With --labels, some images of the database
are queries, and are searched for among all other images. The last lines are the settings to use. They are those without
reranking if the gain of choosing is not significant.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def _parser() -> argparse.ArgumentParser:
    """Return the argument parser of the command."""
    parser = argparse.ArgumentParser(
        "superglobal tune-reranker", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("database", type=Path, help="descriptors of the database")
    truth = parser.add_mutually_exclusive_group(required=True)
    truth.add_argument("--labels", type=Path, help="text file with the label of each database image, one per line")
    truth.add_argument("--positives", type=Path, help="CSV file of relevant pairs, with the columns query and database")
    parser.add_argument("--queries", type=Path, help="descriptors of the queries, with --positives")
    parser.add_argument("--sample", type=int, default=500, help="number of queries drawn with --labels (default 500)")
    parser.add_argument("--M", type=int, default=400, help="number of images that are reranked (default 400)")
    parser.add_argument("--folds", type=int, default=5, help="number of folds of the cross-validation (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample, the folds and the bootstrap")
    parser.add_argument("--device", default="cpu", help="device to compute on, such as cuda (default cpu)")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run `superglobal tune-reranker`, print the candidates and the choice, and return the exit status."""
    parser = _parser()
    args = parser.parse_args(arguments)
    if (args.positives is None) != (args.queries is None):
        parser.error("--queries and --positives belong together")
    from superglobal.reporting.results import print_table
    from superglobal.tuning import reranker as tuning

    X = tuning.load_descriptors(args.database)
    options: dict[str, Any] = {"M": args.M, "folds": args.folds, "seed": args.seed, "device": args.device}
    if args.labels is not None:
        own, positives = tuning.positives_of_labels(tuning.read_labels(args.labels, len(X)), args.sample, args.seed)
        choice = tuning.tune_reranker(X.take(own), X, positives, exclude=own, **options)
    else:
        Q = tuning.load_descriptors(args.queries)
        positives = tuning.read_pairs(args.positives, len(Q), len(X))
        choice = tuning.tune_reranker(Q.block(0, len(Q)), X, positives, **options)
    base = choice.candidates[0].map
    rows = [
        [c.settings, f"{100 * c.map:.2f}", "" if c is choice.candidates[0] else f"{100 * (c.map - base):+.2f}"]
        for c in choice.candidates
    ]
    print_table(f"{len(choice.candidates[0].ap)} queries, {len(X)} images, mAP in %", ["settings", "mAP", "gain"], rows)
    low, high = (100 * limit for limit in choice.interval)
    print(
        f"gain of choosing by cross-validation, on queries that had no part in the choice: {100 * choice.gain:+.2f} "
        f"({low:+.1f} to {high:+.1f} with 95 % confidence)"
    )
    print(f"choice: {choice.best.settings}" + ("" if low > 0 else " (do not rerank: the gain is not significant)"))
    return 0
