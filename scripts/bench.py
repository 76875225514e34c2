"""Compare superglobal with straightforward implementations: python scripts/bench.py rerank [--help].

All variants of a benchmark are measured in the same run. Compare their ratios, because the seconds depend on the
machine and its load. --json FILE also writes the measurements, a description of the machine and the package versions to
a file.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import platform
import sys
from pathlib import Path

import benches
from benches.common import Measured

from superglobal.errors import InputError
from superglobal.utils.io import write_atomically

FORMAT = "superglobal-benchmark-1"


def main() -> int:
    """Run the benchmark named on the command line, a module in scripts/benches.

    Returns:
        The exit status: 0, or 2 after an InputError.
    """
    names = sorted(module.name for module in pkgutil.iter_modules(benches.__path__) if module.name != "common")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False, allow_abbrev=False
    )
    parser.add_argument("benchmark", choices=names)
    parser.add_argument("--json", type=Path, help="file for the measurements, the machine and the package versions")
    arguments, rest = parser.parse_known_args()
    try:
        rows = importlib.import_module(f"benches.{arguments.benchmark}").main(rest)
        if arguments.json is not None:
            _write(arguments.json, arguments.benchmark, rest, rows)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _write(path: Path, name: str, arguments: list[str], rows: list[Measured]) -> None:
    """Write the measurements of a benchmark, a description of the machine and the package versions to a JSON file.

    Args:
        path: file to write.
        name: name of the benchmark.
        arguments: command-line arguments of the benchmark.
        rows: measurements, one row per variant.
    """
    import torch

    from superglobal.utils.provenance import versions

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine = {"processor": platform.machine(), "system": platform.system(), "cores": os.cpu_count(), "gpu": gpu}
    about = {"format": FORMAT, "benchmark": name, "arguments": arguments, "threads": torch.get_num_threads()}
    about |= {"machine": machine, "versions": versions(), "rows": rows}
    write_atomically(path, json.dumps(about, indent=1).encode())


if __name__ == "__main__":
    sys.exit(main())
