"""Render the toy set: python scripts/make_toy_data.py --size small --out data/toy"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from superglobal.data.toy import SIZES, make_toy
from superglobal.data.toy.sheet import write_sheet
from superglobal.errors import InputError


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
        summary = make_toy(args.out, args.size, args.seed, args.workers, Bar())
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


class Bar:
    """One line that is kept up to date on a terminal; elsewhere a line per tenth, and at least one in 30 seconds."""

    def __init__(self) -> None:
        self.start, self.tenth = time.monotonic(), 0
        self.said = self.start

    def __call__(self, done: int, total: int) -> None:
        text = f"rendered {done} of {total} photos, {time.monotonic() - self.start:.0f} s"
        if sys.stderr.isatty():
            print(f"\r{text}", end="\n" if done == total else "", file=sys.stderr, flush=True)
        elif done * 10 // total > self.tenth or time.monotonic() > self.said + 30:
            self.tenth, self.said = done * 10 // total, time.monotonic()
            print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
