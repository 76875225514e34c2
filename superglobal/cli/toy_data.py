"""Render a small data set of toy landmarks, e.g. superglobal toy-data --size small --out data/toy"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str]) -> int:
    """Render the data set, and draw the contact sheet if asked; status 130 for Ctrl-C."""
    from superglobal.toy.make import make_toy
    from superglobal.toy.plan import SIZES
    from superglobal.toy.sheet import write_sheet
    from superglobal.utils.progress import Progress

    parser = argparse.ArgumentParser("superglobal toy-data", description=__doc__)
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--out", type=Path, default=Path("data/toy"), help="folder; a finished data set is kept")
    parser.add_argument("--seed", type=int, default=0, help="other seeds give other landmarks")
    parser.add_argument("--workers", type=int, help="number of processes; one per CPU by default")
    parser.add_argument("--sheet", type=Path, help="also write a contact sheet (JPEG) to this file")
    args = parser.parse_args(arguments)
    try:
        summary = make_toy(args.out, args.size, args.seed, args.workers, Progress("rendered"))
        if args.sheet:
            write_sheet(args.out, args.sheet)
    except KeyboardInterrupt:
        print(f"\ninterrupted: run the same command again to resume in {args.out}", file=sys.stderr)
        return 130
    for title in ("photos", "pairs"):
        print(f"{title}: " + ", ".join(f"{count} {name}" for name, count in summary[title].items()))
    print(f"{args.out}: toy set {summary['size']}, seed {summary['seed']}")
    return 0
