"""Compare the results of several runs, in tables and a chart: python scripts/report.py outputs/eval/sweep/..."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from superglobal.errors import InputError
from superglobal.retrieval.tables import merge


def main() -> int:
    """Print a table for each data set; write them, a list of all runs and a chart into the first folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="+", help="a sweep's folder, or any folders of results")
    try:
        merge(*parser.parse_args().folder)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
