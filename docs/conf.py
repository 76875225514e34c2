"""Configure Sphinx, which builds the documentation site: make docs."""

import contextlib
import io
import os
from pathlib import Path
from typing import Any

import superglobal
from superglobal.cli import COMMANDS, main
from superglobal.config import ENTRIES

project = "superglobal"
author = "The superglobal authors"
copyright = "the superglobal authors"
version = release = superglobal.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]
default_role = "code"  # In docstrings, single backticks mark code, as in Markdown.
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
python_use_unqualified_type_names = True

html_theme = "furo"
html_favicon = "images/favicon.svg"
html_title = f"superglobal {release}"

STORE_COMMANDS = ("info", "verify", "export", "merge")


def setup(app: Any) -> None:
    """Let Sphinx generate reference/cli.md, which is not in the repository, before it reads the pages."""
    page = Path(__file__).parent / "reference" / "cli.md"
    app.connect("builder-inited", lambda _: page.write_text(command_line_page()))


def command_line_page() -> str:
    """Return the Markdown text of the page that documents all commands.

    For a command with settings, the page contains examples and a link to the configuration reference. For any other
    command, it contains the output of `--help`.
    """
    # The configuration reference documents `evaluate` and `train` as eval.py and train.py.
    scripts = {"evaluate": "eval.py", "train": "train.py"}
    configured = {entry.script: entry for entry in ENTRIES}
    lines = ["# Command line", "", "```text", help_text(), "```", ""]
    for command in COMMANDS:
        lines += [f"## superglobal {command}", ""]
        entry = configured.get(scripts.get(command, f"superglobal {command}"))
        if entry is None:
            subcommands = STORE_COMMANDS if command == "store" else ()
            texts = [help_text(command), *(help_text(command, subcommand) for subcommand in subcommands)]
            lines += ["```text", "\n\n".join(texts), "```", ""]
        else:
            anchor = entry.script.replace(" ", "-").replace(".", "")
            lines += [entry.purpose, "", "```bash", *entry.examples, "```", ""]
            lines += [f"Its options and settings: [configuration](configuration.md#{anchor}).", ""]
    return "\n".join(lines)


def help_text(*words: str) -> str:
    """Return the output of a command with `--help`.

    Args:
        *words: command and subcommand; without them, the output of `superglobal --help` is returned.
    """
    output = io.StringIO()
    os.environ["COLUMNS"] = "100"
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        main([*words, "--help"])
    return output.getvalue().rstrip()
