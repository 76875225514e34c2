"""Check GLDv2's photos and write the index that training uses: python scripts/prepare_gldv2.py --root data/gldv2"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from pathlib import Path

from superglobal.data.prepare_gldv2 import prepare
from superglobal.errors import InputError
from superglobal.utils.progress import Progress


def _end_at_once(number: int, frame: object) -> None:
    """Without waiting for the part that is being checked: parts are whole or not there."""
    os.write(2, b"\ninterrupted: the same command goes on where it was\n")
    os._exit(130)


def main() -> int:
    """Check, write index and report, and say what was found: 0 all sound, 1 some bad, 2 a mistake, 130 Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path("data/gldv2"), help="folder of the list and of train/")
    parser.add_argument("--table", default="train_clean.csv", help="the list; train.csv for data=gldv2 and gldv2x")
    parser.add_argument("--tars", type=Path, help="folder of images_000.tar, ...: read these in place of train/")
    parser.add_argument("--workers", type=int, help="processes; one per CPU by default")
    parser.add_argument("--decode", action="store_true", help="decode each photo, to find damage in its middle too")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    signal.signal(signal.SIGINT, _end_at_once)
    try:
        found = prepare(args.root, args.table, args.tars, args.workers, args.decode, Progress("checked"))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"index: {found.index}\nreport: {found.report}")
    for note in found.tars:
        print(note)
    if not found.bad:
        print(f"all {found.photos} photos are sound")
        return 0
    share = len(found.bad) / found.photos
    print(
        f"{len(found.bad)} of {found.photos} photos are bad ({share:.4%}); get them and call this again, or "
        "train without them: up to a share of data.bad_budget is tolerated"
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
