"""Inspect, verify, merge or export descriptor stores: superglobal store info|verify|merge|export [--help]

A store is a folder under outputs/stores. Stores of one list that independent jobs filled, each in its own folder, are
merged into one; export writes .npy (with the names in a file of their own) or .parquet.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "superglobal store", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="print settings, number of rows, dtype and size")
    verify = commands.add_parser("verify", help="check that rows are finite and of unit norm, the list and checksums")
    verify.add_argument("--record", action="store_true", help="record the checksums of the files for the next verify")
    export = commands.add_parser("export", help="write all descriptors to one file")
    for command in (info, verify, export):
        command.add_argument("folder", type=Path)
    export.add_argument("file", type=Path, help=".npy or .parquet")
    merge = commands.add_parser("merge", help="merge stores that each hold a part of one list")
    merge.add_argument("parts", type=Path, nargs="+")
    merge.add_argument("--into", type=Path, required=True, help="a new folder, or a store of the same list")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run a sub-command and print its result."""
    args = _parser().parse_args(arguments)
    from superglobal.retrieval import store_tools

    if args.command == "merge":
        store = store_tools.merge([store_tools.open_validated(part) for part in args.parts], args.into)
        print(f"{store.folder}: {len(store) - len(store.missing)} of {len(store)} rows")
        return 0
    store = store_tools.open_validated(args.folder)
    if args.command == "info":
        print(json.dumps(store_tools.store_info(store), indent=1))
    elif args.command == "verify":
        rows = store_tools.verify(store, args.record)
        result = f"{rows} rows are sound, {len(store.skipped)} skipped, {len(store.missing)} missing"
        if store_tools.recorded_checksums(store) is None:
            result += "; no checksums to compare with (--record writes them for the next time)"
        print(f"{store.folder}: {result}")
    else:
        print(f"{args.file}: {store_tools.export(store, args.file)} rows")
    return 0
