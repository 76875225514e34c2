"""Command line interface, `superglobal COMMAND ...`.

Each command is a function that takes its arguments as a list of strings and returns the exit status: 0 for success, 2
for an error that the user can fix. Modules that are slow to import are imported only when a command runs, so that
`superglobal --help` starts immediately.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module

from superglobal import __version__
from superglobal.errors import InputError, one_of
from superglobal.utils.distributed import exit_on_closed_output

# Warnings of PIL, such as "Truncated File Read", do not name the file. Files that cannot be read are reported anyway.
warnings.filterwarnings("ignore", module=r"PIL\.")
# Name of the command -> (module in this folder, function in the module, description for `superglobal --help`).
COMMANDS = {
    "evaluate": ("hydra_commands", "evaluate", "evaluate retrieval on a data set or on your own photos"),
    "train": ("hydra_commands", "train", "train a network on landmark images"),
    "tune": ("hydra_commands", "tune", "choose pooling and reranking settings without the test set"),
    "compare-rerankers": ("hydra_commands", "compare_rerankers", "compare rerankers on the same search results"),
    "tune-reranker": ("tune_reranker", "main", "choose a reranker, or none, on your own labeled queries"),
    "serve": ("hydra_commands", "serve", "serve a page in the browser to search by photo"),
    "download": ("download", "main", "download data sets and weights"),
    "prepare-gldv2": ("prepare_gldv2", "main", "check the GLDv2 images and write the index for training"),
    "toy-data": ("toy_data", "main", "render a small data set of toy landmarks"),
    "store": ("store", "main", "inspect, verify, merge or export descriptor stores"),
    "report": ("report", "main", "compare results in tables and a chart, or compare two results query by query"),
    "visualize": ("visualize", "main", "draw figures of one result"),
    "score-gldv2": ("score_gldv2", "main", "score a GLDv2 submission file"),
    "convert-weights": ("models", "convert_weights", "convert a CVNet checkpoint to safetensors"),
    "export": ("models", "export", "export a network to ONNX or torch.export"),
    "share": ("models", "share", "write a model folder with a model card, or upload it to the Hugging Face Hub"),
}


def _command(name: str) -> str:
    """Return the name of a command, after checking that it exists."""
    if name not in COMMANDS:
        raise argparse.ArgumentTypeError(f"{name!r}: expected {one_of(name, COMMANDS)}")
    return name


@exit_on_closed_output()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: name of the command, followed by its arguments; by default, the command line of the process.

    Returns:
        The exit status of the command.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        "superglobal",
        description="Image retrieval with SuperGlobal (ICCV 2023).",
        epilog="commands:\n" + "\n".join(f"  {name:18} {summary}" for name, (_, _, summary) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"superglobal {__version__}")
    parser.add_argument(
        "command", metavar="COMMAND", type=_command, help="command to run; `superglobal COMMAND --help` describes it"
    )
    command = parser.parse_args(words[:1] or ["--help"]).command
    module, function, _ = COMMANDS[command]
    try:
        return getattr(import_module(f"superglobal.cli.{module}"), function)(words[1:])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
