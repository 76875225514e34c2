"""Render a small data set of synthetic landmark images, on which every other command can be tried.

Example: superglobal toy-data --size small --out data/toy
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str]) -> int:
    """Run `superglobal toy-data`: render the toy data set, and draw a contact sheet if requested.

    Args:
        arguments: arguments of the command.

    Returns:
        The exit status: 0, or 130 after Ctrl-C.
    """
    from superglobal.toy.make import make_toy
    from superglobal.toy.plan import SIZES
    from superglobal.toy.sheet import write_sheet
    from superglobal.utils.progress import Progress

    parser = argparse.ArgumentParser(
        "superglobal toy-data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(SIZES), default="small", help="size of the data set (default: small)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("data/toy"),
        help="folder to write to (default: data/toy); if it contains the complete data set, nothing is rendered",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the landmarks; each seed gives different landmarks (default: 0)"
    )
    parser.add_argument("--workers", type=int, help="number of processes; by default, one per CPU core")
    parser.add_argument("--sheet", type=Path, help="JPEG file to write a contact sheet to")
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
    print(f"Wrote {args.out}: toy set of size {summary['size']}, seed {summary['seed']}")
    return 0
