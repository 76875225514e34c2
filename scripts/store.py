"""Descriptor stores: python scripts/store.py info|verify|merge|export [--help]

A store is a folder under outputs/stores. Parts of one list that independent jobs filled, each in a place of its own,
become one store by merge; export writes .npy (with the names beside it) or .parquet.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from superglobal.errors import InputError
from superglobal.retrieval import store_tools as upkeep


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="what made it, rows, dtype, size")
    check = commands.add_parser("verify", help="every row finite and of unit norm, the list as it was, checksums")
    check.add_argument("--record", action="store_true", help="keep the shards' checksums for the next verify")
    export = commands.add_parser("export", help="one file of descriptors")
    for command in (info, check, export):
        command.add_argument("folder", type=Path)
    export.add_argument("file", type=Path, help=".npy or .parquet")
    merge = commands.add_parser("merge", help="one store out of parts of one list")
    merge.add_argument("parts", type=Path, nargs="+")
    merge.add_argument("--into", type=Path, required=True, help="a new folder, or one of this list")
    return parser


def run(arguments: argparse.Namespace) -> str:
    """Do what was asked and say what came of it."""
    if arguments.command == "merge":
        store = upkeep.merge([upkeep.open_sound(part) for part in arguments.parts], arguments.into)
        return f"{store.folder}: {len(store) - len(store.missing)} of {len(store)} rows"
    store = upkeep.open_sound(arguments.folder)
    if arguments.command == "info":
        return json.dumps(upkeep.describe(store), indent=1)
    if arguments.command == "verify":
        rows = upkeep.verify(store, arguments.record)
        told = f"{rows} rows are sound, {len(store.skipped)} skipped, {len(store.missing)} missing"
        if upkeep.recorded_checksums(store) is None:
            told += "; nothing to compare their bytes with (--record keeps checksums for the next time)"
        return f"{store.folder}: {told}"
    return f"{arguments.file}: {upkeep.export(store, arguments.file)} rows"


def main() -> int:
    """Exit status 2 for what a user can mend."""
    try:
        print(run(_parser().parse_args()))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
