"""Compare the results of several runs in tables and a chart.

Example: superglobal report outputs/eval/sweep/...

With --baseline OTHER, compare two results query by query instead: list the queries for which FOLDER is better or worse
than OTHER, and draw a figure of their results.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str]) -> int:
    """Run `superglobal report`, and return the exit status.

    Print one table per data set, and write the tables, a list of all runs and a chart into the first folder. With
    `--baseline`, compare two results query by query instead. Print the paths of the written files.
    """
    parser = argparse.ArgumentParser(
        "superglobal report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder",
        type=Path,
        nargs="+",
        help="folder of a sweep, or several folders of results; with --baseline, also new paths of moved images or "
        "stores, such as dataset.database=FOLDER",
    )
    parser.add_argument(
        "--baseline", type=Path, metavar="OTHER", help="second results folder, with which the only FOLDER is compared"
    )
    args = parser.parse_intermixed_args(arguments)
    # The folder of a sweep job can contain "=", as in 0_rerank.K=3.
    overrides = [str(path) for path in args.folder if args.baseline and re.match(r"[a-z.]+=", str(path))]
    folders = [path for path in args.folder if str(path) not in overrides]
    if args.baseline is not None and len(folders) != 1:
        parser.error(f"--baseline: got {len(folders)} folders; expected one FOLDER to compare with OTHER")
    if args.baseline is None:
        from superglobal.reporting.tables import write_tables

        write_tables(*args.folder)
    else:
        from superglobal.evaluation.ranking_sheets import compare_runs

        for path in compare_runs(folders[0], args.baseline, overrides=overrides):
            print(path)
    return 0
