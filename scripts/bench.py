"""Benchmarks against a straightforward implementation, in the same run: python scripts/bench.py rerank [--help]

Read the ratios; the seconds are those of this machine at this moment.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil

import benches


def main() -> None:
    """Hand over to the module of that name in scripts/benches."""
    names = sorted(module.name for module in pkgutil.iter_modules(benches.__path__) if module.name != "common")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False
    )
    parser.add_argument("benchmark", choices=names)
    arguments, rest = parser.parse_known_args()
    importlib.import_module(f"benches.{arguments.benchmark}").main(rest)


if __name__ == "__main__":
    main()
