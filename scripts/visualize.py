"""Figures of finished results: python scripts/visualize.py FOLDER [sheets activation curves similarities map]

FOLDER is what eval.py printed; the figures go into its figures/, with an index.html. All come from what is stored:
only activation runs the network, on the photos that it shows.

sheets        ranked results before and after reranking, side by side; the worst and the most improved queries first
activation    which places of a query and of its results make them similar
curves        precision over recall, per protocol
similarities  of positive and of negative pairs
map           descriptors on a plane, by landmark
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

KINDS = ("sheets", "activation", "curves", "similarities", "map")


def parser() -> argparse.ArgumentParser:
    """What the command takes."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("folder", type=Path, help="of one result")
    made.add_argument("kinds", nargs="*", metavar="KIND", help="by default all that apply")
    made.add_argument("--order", choices=("worst", "improved", "worsened", "given"), help="of the queries")
    made.add_argument("--queries", type=int, help="how many; 24 on sheets, 2 of activation")
    made.add_argument("--numbers", type=int, nargs="+", default=[], help="these queries (number in rankings.csv)")
    made.add_argument("--ranks", type=int, help="results of each; 10 on sheets, 4 of activation")
    made.add_argument("--map", choices=("pca", "tsne"), default="pca", dest="method", help="tsne needs scikit-learn")
    made.add_argument("--images", type=int, default=1000, help="on the map, at most")
    made.add_argument("--seed", type=int, default=0, help="of what is drawn by lot")
    return made


def main() -> int:
    """Print the paths of the pictures; exit status 2 for what a user can mend."""
    command = parser()
    options = vars(command.parse_args())
    folder, kinds = options.pop("folder"), options.pop("kinds")
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        command.error(f"no kind {unknown[0]}; there are {', '.join(KINDS)}")
    # Seconds, which --help and a mistyped option need not wait for.
    from superglobal.errors import InputError
    from superglobal.evaluation.ranking_sheets import FigureOptions
    from superglobal.evaluation.visualize import visualize

    try:
        paths, left_out = visualize(folder, kinds, FigureOptions(**options | {"numbers": tuple(options["numbers"])}))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in paths:
        print(path)
    for reason in left_out:
        print(f"left out: {reason}", file=sys.stderr)
    print(f"all of them: {paths[0].parent / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
