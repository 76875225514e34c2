"""Run the command line: `python -m superglobal COMMAND ...` does the same as `superglobal COMMAND ...`."""

import sys

from superglobal.cli import main

if __name__ == "__main__":
    sys.exit(main())
