"""Render the toy set: python scripts/make_toy_data.py --size small --out data/toy"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from superglobal.errors import InputError
from superglobal.toy.make import make_toy
from superglobal.toy.plan import SIZES
from superglobal.toy.sheet import write_sheet
from superglobal.utils.progress import Progress


def main() -> int:
    """Render, say what is there, and draw the contact sheet if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--out", type=Path, default=Path("data/toy"), help="folder of the set; a finished one is kept")
    parser.add_argument("--seed", type=int, default=0, help="other seeds give other landmarks")
    parser.add_argument("--workers", type=int, help="processes; one per CPU by default")
    parser.add_argument("--sheet", type=Path, help="also write a contact sheet (JPEG) here")
    args = parser.parse_args()
    try:
        summary = make_toy(args.out, args.size, args.seed, args.workers, Progress("rendered"))
        if args.sheet:
            write_sheet(args.out, args.sheet)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ninterrupted: the same command goes on with what is in {args.out}", file=sys.stderr)
        return 130
    for title in ("photos", "pairs"):
        print(f"{title}: " + ", ".join(f"{count} {name}" for name, count in summary[title].items()))
    print(f"{args.out}: toy set {summary['size']}, seed {summary['seed']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
