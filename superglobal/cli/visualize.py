"""Draw figures of one result: superglobal visualize FOLDER [sheets activation curves similarities map]

FOLDER is the results folder that an evaluation printed; the figures go to its figures/, with an index.html. They come
from stored results and descriptors: only `activation` runs the network, on the images that it shows.

sheets        ranked results before and after reranking, side by side; the worst and the most improved queries first
activation    regions of a query and of its results that make them similar
curves        precision-recall curves, per protocol
similarities  distribution over positive and over negative pairs
map           descriptors projected to a plane, colored by landmark
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

KINDS = ("sheets", "activation", "curves", "similarities", "map")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "superglobal visualize", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of one result")
    parser.add_argument("kinds", nargs="*", metavar="KIND", type=_kind, help="all that apply by default")
    parser.add_argument("--order", choices=("worst", "improved", "worsened", "given"), help="of the queries")
    parser.add_argument("--queries", type=int, help="number of queries; 24 for sheets, 2 for activation")
    parser.add_argument("--numbers", type=int, nargs="+", default=[], help="these queries (number in rankings.csv)")
    parser.add_argument("--ranks", type=int, help="results per query; 10 for sheets, 4 for activation")
    parser.add_argument("--map", choices=("pca", "tsne"), default="pca", dest="method", help="tsne needs scikit-learn")
    parser.add_argument("--images", type=int, default=1000, help="largest number of images on the map")
    parser.add_argument("--seed", type=int, default=0, help="of random samples")
    return parser


def _kind(text: str) -> str:
    if text not in KINDS:
        raise argparse.ArgumentTypeError(f"{text!r}: expected {', '.join(KINDS)}")
    return text


def main(arguments: Sequence[str]) -> int:
    """Draw the figures and print their paths."""
    options = vars(_parser().parse_args(arguments))
    folder, kinds = options.pop("folder"), options.pop("kinds")
    from superglobal.evaluation.ranking_sheets import FigureOptions
    from superglobal.evaluation.visualize import visualize

    paths, left_out = visualize(folder, kinds, FigureOptions(**options | {"numbers": tuple(options["numbers"])}))
    for path in paths:
        print(path)
    for reason in left_out:
        print(f"left out: {reason}", file=sys.stderr)
    print(f"all of them: {paths[0].parent / 'index.html'}")
    return 0
