"""Compare the results of several runs, in tables and a chart: python scripts/report.py outputs/eval/sweep/...

With --baseline OTHER, two results are compared query by query: which queries FOLDER wins and loses, with figures.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from superglobal.errors import InputError
from superglobal.reporting.tables import merge


def main() -> int:
    """Print a table per data set; write the tables, a list of all runs and a chart into the first folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="+", help="a sweep's folder, or any folders of results")
    parser.add_argument("--baseline", type=Path, metavar="OTHER", help="compare FOLDER, one result, with this result")
    args = parser.parse_args()
    if args.baseline is not None and len(args.folder) > 1:
        parser.error("--baseline compares one FOLDER with one OTHER")
    try:
        if args.baseline is None:
            merge(*args.folder)
        else:
            from superglobal.evaluation.ranking_sheets import compare_runs

            for path in compare_runs(args.folder[0], args.baseline):
                print(path)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
