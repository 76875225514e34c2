"""Generate docs/reference/configuration.md from superglobal/config and conf/: python scripts/config_reference.py."""

from __future__ import annotations

import argparse
from pathlib import Path

from superglobal.config import ENTRIES, register
from superglobal.config.help import reference_page
from superglobal.utils.io import write_atomically

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "configuration.md"


def main() -> None:
    """Write the configuration reference, and print the path of the file."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    register()
    write_atomically(PAGE, reference_page(ENTRIES).encode())
    print(PAGE)


if __name__ == "__main__":
    main()
