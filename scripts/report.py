"""Compare the results of several runs, in tables and a chart: python scripts/report.py outputs/eval/sweep/...

With --against OTHER two results are compared query by query: which queries FOLDER wins and loses, with pictures.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from superglobal.errors import InputError
from superglobal.reporting.tables import merge


def main() -> int:
    """Print a table for each data set; write them, a list of all runs and a chart into the first folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="+", help="a sweep's folder, or any folders of results")
    parser.add_argument("--against", type=Path, metavar="OTHER", help="a result; FOLDER is then one result too")
    args = parser.parse_args()
    if args.against is not None and len(args.folder) > 1:
        parser.error("--against compares one FOLDER with one OTHER")
    try:
        if args.against is None:
            merge(*args.folder)
        else:
            from superglobal.evaluation.ranking_sheets import compare_runs

            for path in compare_runs(args.folder[0], args.against):
                print(path)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
