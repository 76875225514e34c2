"""Draw figures of the results of one evaluation.

Example: superglobal visualize outputs/eval/roxford5k/... sheets curves

FOLDER is the results folder, whose path the evaluation printed. The figures are written to FOLDER/figures, with a web
page, index.html, that shows all of them. They are drawn from the stored results and descriptors. Only `activation` runs
the network, on the images that it shows.

Kinds of figures:
  sheets        ranked results of the worst and the most improved queries, before and after reranking, side by side
  activation    heat maps of the image regions that make a query and its results similar
  curves        precision-recall curves for each protocol
  similarities  distributions of the similarities of positive pairs and of negative pairs
  map           descriptors projected onto a plane, colored by landmark
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from superglobal.errors import one_of

KINDS = ("sheets", "activation", "curves", "similarities", "map")


def _parser() -> argparse.ArgumentParser:
    """Return the argument parser of the command."""
    parser = argparse.ArgumentParser(
        "superglobal visualize", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="results folder of an evaluation")
    parser.add_argument(
        "kinds",
        nargs="*",
        metavar="KIND",
        type=_kind,
        help="kinds of figures to draw (default: all that the result allows), and settings: if images or descriptor "
        "stores were moved, give their new paths, such as dataset.database=FOLDER or paths.stores=FOLDER",
    )
    parser.add_argument(
        "--order",
        choices=("worst", "improved", "worsened", "given"),
        help="queries to show in sheets and activation: those with the lowest score (worst), those that reranking "
        "improved or worsened most (improved, worsened), or the first ones of the data set (given); by default, worst "
        "and improved",
    )
    parser.add_argument(
        "--queries", type=int, help="number of queries to show; by default, 24 in sheets and 2 in activation"
    )
    parser.add_argument(
        "--numbers",
        type=int,
        nargs="+",
        default=[],
        help="show exactly the queries with these numbers (column `number` of rankings.csv)",
    )
    parser.add_argument(
        "--ranks", type=int, help="number of results per query; by default, 10 in sheets and 4 in activation"
    )
    parser.add_argument(
        "--map",
        choices=("pca", "tsne"),
        default="pca",
        dest="method",
        help="projection of the map: pca (default), or tsne, which needs scikit-learn",
    )
    parser.add_argument("--images", type=int, default=1000, help="maximum number of images on the map (default: 1000)")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed for t-SNE and for the random choice of images (default: 0)"
    )
    return parser


def _kind(text: str) -> str:
    """Return a command-line argument, after checking that it is a kind of figure or a setting."""
    if text not in KINDS and "=" not in text:
        raise argparse.ArgumentTypeError(f"{text!r}: expected {one_of(text, KINDS)}")
    return text


def main(arguments: Sequence[str]) -> int:
    """Run `superglobal visualize`: draw the figures, print their paths, and return the exit status.

    Figures that cannot be drawn are listed on stderr, with the reason.
    """
    options = vars(_parser().parse_intermixed_args(arguments))
    folder, words = options.pop("folder"), options.pop("kinds")
    kinds, overrides = [word for word in words if "=" not in word], [word for word in words if "=" in word]
    options["numbers"] = tuple(options["numbers"])
    from superglobal.evaluation.ranking_sheets import FigureOptions
    from superglobal.evaluation.visualize import visualize

    paths, reasons = visualize(folder, kinds, FigureOptions(**options), overrides)
    for path in paths:
        print(path)
    for reason in reasons:
        print(f"Not drawn: {reason}", file=sys.stderr)
    print(f"Page with all figures: {paths[0].parent / 'index.html'}")
    return 0
