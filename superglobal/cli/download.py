"""Download data sets and weights.

Example: superglobal download roxford5k rparis6k

Partial downloads are resumed, and files are verified by checksums or by lists of the expected files. Archives are
unpacked into the folders from which evaluation and training read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from superglobal.data.download_links import SOURCE_NAMES, select_sources
from superglobal.errors import InputError, one_of
from superglobal.utils.distributed import exit_on_interrupt


def _parser() -> argparse.ArgumentParser:
    """Return the argument parser of the command."""
    parser = argparse.ArgumentParser(
        "superglobal download", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = f"data sets and weights to download: {', '.join(SOURCE_NAMES)}"
    parser.add_argument("names", nargs="*", metavar="NAME", type=_name, help=names)
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("data"),
        help="folder for all data sets; use the same folder in the setting paths.data (default: data)",
    )
    parser.add_argument(
        "--list",
        action="store_true",
        help="list everything that can be downloaded, its size, and what has been downloaded already",
    )
    parser.add_argument(
        "--jobs", type=int, default=4, help="number of archives to download at the same time (default: 4)"
    )
    parser.add_argument("--keep", action="store_true", help="keep the archives after unpacking them")
    parser.add_argument(
        "--packed", action="store_true", help="do not unpack GLDv2's archives; train.py data.tars=FOLDER reads them"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=60,
        help="seconds to wait for a server that sends no data (default: 60)",
    )
    parser.add_argument(
        "--tries",
        type=int,
        default=5,
        help="number of consecutive attempts without new data after which the next mirror is used (default: 5)",
    )
    parser.add_argument(
        "--base-url",
        action="append",
        default=[],
        metavar="URL",
        help="mirror to use: https://host/path is downloaded from URL/host/path. Repeat the option to give several "
        "mirrors, which are tried in turn",
    )
    return parser


def _name(text: str) -> str:
    """Return a command-line argument, after checking that it names a data set or weights that can be downloaded."""
    if text not in SOURCE_NAMES:
        raise argparse.ArgumentTypeError(f"{text!r}: expected {one_of(text, SOURCE_NAMES)}")
    return text


def main(arguments: Sequence[str]) -> int:
    """Run `superglobal download`: download the named data sets and weights, or list what can be downloaded.

    If one download fails, the command continues with the next one.

    Args:
        arguments: arguments of the command.

    Returns:
        The exit status: 0, or 2 if a download failed. Ctrl-C exits with status 130.
    """
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.list:
        from superglobal.download import overview

        print(overview(args.data))
        return 0
    if not args.names:
        parser.error(f"no NAME was given: expected one or more of {', '.join(SOURCE_NAMES)}; --list describes them")
    if args.jobs < 1 or args.tries < 1 or not args.timeout > 0:
        parser.error("invalid number: expected --jobs and --tries to be at least 1, and --timeout to be above 0")
    exit_on_interrupt()
    from superglobal.download.fetch import DownloadOptions
    from superglobal.download.sources import download_source

    options = DownloadOptions(tuple(args.base_url), args.timeout, args.tries, args.jobs, args.keep, args.packed)
    status = 0
    for source in select_sources(args.names):
        try:
            print(f"{source.name}: {download_source(source, args.data, options)}", flush=True)
        except InputError as error:
            status = 2
            print(f"error: {error}", file=sys.stderr, flush=True)
    return status
