"""Inspect, verify, merge or export descriptor stores.

Example: superglobal store info outputs/stores/STORE

A store is a folder of descriptors in outputs/stores. Independent jobs can each extract one shard of the same list of
images into a separate store; `merge` combines these stores. `export` writes a .parquet file, or a .npy file and a
second file with the names of the images.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path


def _parser() -> argparse.ArgumentParser:
    """Return the argument parser of the command and its subcommands."""
    parser = argparse.ArgumentParser(
        "superglobal store", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="print the settings, number of rows, dtype and size of a store")
    verify = commands.add_parser("verify", help="compare all rows with their checksums, and check the list of images")
    verify.add_argument(
        "--repair",
        action="store_true",
        help="mark damaged rows as missing, so that the next evaluation extracts them again",
    )
    export = commands.add_parser("export", help="write all descriptors to one file")
    for command in (info, verify, export):
        command.add_argument("folder", type=Path, help="folder of the store")
    export.add_argument("file", type=Path, help="file to write, .npy or .parquet")
    merge = commands.add_parser("merge", help="merge stores that contain different shards of the same list of images")
    merge.add_argument("stores", metavar="store", type=Path, nargs="+", help="folder of a store to merge")
    merge.add_argument(
        "--into",
        type=Path,
        required=True,
        help="folder to merge into: a new folder, or a store of the same images, to which the missing rows are added",
    )
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run `superglobal store info`, `verify`, `export` or `merge`, print the result, and return the exit status."""
    args = _parser().parse_args(arguments)
    from superglobal.retrieval import store_tools
    from superglobal.retrieval.store import row_ranges

    if args.command == "merge":
        store = store_tools.merge([store_tools.open_validated(folder) for folder in args.stores], args.into)
        print(f"{store.folder}: {len(store) - len(store.missing)} of {len(store)} rows")
        return 0
    store = store_tools.open_validated(args.folder)
    if args.command == "info":
        print(json.dumps(store_tools.store_info(store), indent=1))
    elif args.command == "verify":
        damaged = store_tools.verify(store, args.repair)
        result = f"{len(store.written)} rows are valid, {len(store.skipped)} skipped, {len(store.missing)} missing"
        if len(damaged):
            result += f"; {row_ranges(damaged)} marked as missing: run the evaluation again, which extracts them"
        print(f"{store.folder}: {result}")
    else:
        print(f"{args.file}: {store_tools.export(store, args.file)} rows")
    return 0
