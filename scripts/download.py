"""Get data sets: python scripts/download.py roxford5k rparis6k

Everything is gone on with where an earlier call was interrupted, checked (checksums, lists), and unpacked to where
eval.py and train.py look for it.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from superglobal.data.catalogue import SOURCE_NAMES, select_sources
from superglobal.errors import InputError


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("names", nargs="*", metavar="NAME", type=_name, help=", ".join(SOURCE_NAMES))
    found.add_argument("--data", type=Path, default=Path("data"), help="folder of all data sets (paths.data)")
    found.add_argument("--list", action="store_true", help="say what there is, how large, and what is there")
    found.add_argument("--jobs", type=int, default=4, help="archives at once")
    found.add_argument("--keep", action="store_true", help="keep archives after they were unpacked")
    found.add_argument("--packed", action="store_true", help="GLDv2: do not unpack; train.py reads it by data.tars=")
    found.add_argument("--timeout", type=float, default=60, help="seconds that a server may be silent")
    found.add_argument("--tries", type=int, default=5, help="in a row without a new byte, before the next mirror")
    found.add_argument(
        "--base-url",
        action="append",
        default=[],
        metavar="URL",
        help="take https://host/path from URL/host/path; several are tried in turn",
    )
    return found


def _name(text: str) -> str:
    if text not in SOURCE_NAMES:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(SOURCE_NAMES)}")
    return text


def _end_at_once(number: int, frame: object) -> None:
    """Without waiting for transfers: what is on disk is whole, or a part that is gone on with."""
    if os.isatty(2):
        os.write(2, b"\x1b[?25h")  # the cursor, which the bar hides
    os.write(2, b"\ninterrupted: the same command goes on where it was\n")
    os._exit(130)


def main() -> int:
    """Get what was named: 0 all there, 2 something could not be had (the rest is loaded all the same), 130 Ctrl-C."""
    options = parser()
    args = options.parse_args()
    if args.list:
        from superglobal.download import overview

        print(overview(args.data))
        return 0
    if not args.names:
        options.error(f"name one or more of {', '.join(SOURCE_NAMES)}; --list says what they are")
    if args.jobs < 1 or args.tries < 1 or not args.timeout > 0:
        options.error("--jobs and --tries are 1 or more, --timeout is above 0")
    signal.signal(signal.SIGINT, _end_at_once)
    try:
        from superglobal.download.fetch import DownloadOptions
        from superglobal.download.sources import download_source
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    wanted = DownloadOptions(tuple(args.base_url), args.timeout, args.tries, args.jobs, args.keep, args.packed)
    status = 0
    for source in select_sources(args.names):
        try:
            print(f"{source.name}: {download_source(source, args.data, wanted)}", flush=True)
        except InputError as error:
            status = 2
            print(f"error: {error}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
