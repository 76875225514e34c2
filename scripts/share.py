"""Write a model folder that others load with one line: python scripts/share.py WEIGHTS FOLDER [--results RESULTS ...]

FOLDER contains the weights, config.json and a model card with the settings of the training and the results. Load it
with superglobal.load_model("FOLDER") or evaluate it with `python eval.py weights=FOLDER`. If you push it to the Hugging
Face Hub, the name is "hf:owner/name".
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from superglobal.cli.arguments import add_network_arguments, network_of
from superglobal.errors import InputError
from superglobal.models.hub import model_card, push_to_hub, save_pretrained
from superglobal.reporting.model_card import read_card_results


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_network_arguments(parser)
    parser.add_argument("folder", type=Path, help="new or empty folder")
    parser.add_argument("--results", type=Path, nargs="+", default=[], help="results.json files, or folders of results")
    parser.add_argument("--license", default="unknown", help="of the weights, as the hub names it: cc-by-4.0, mit, ...")
    parser.add_argument("--name", help="title of the model card")
    parser.add_argument("--push", metavar="OWNER/NAME", help="also upload to this repository on the Hugging Face Hub")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    return parser


def share(args: argparse.Namespace) -> str:
    """Write the folder, push it if requested, and return how to use it."""
    folder: Path = args.folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: already exists, expected a new or empty folder")
    network = network_of(args)
    results = read_card_results(args.results, network)
    card = model_card(network, results=results, license=args.license, name=args.name, repo_id=args.push)
    save_pretrained(network, folder, card)
    text = f'{folder}: superglobal.load_model("{folder}"), python eval.py weights={folder}'
    if args.push:
        url = push_to_hub(network, args.push, card, private=args.private or None)
        text += f'\n{url}: superglobal.load_model("hf:{args.push}"), python eval.py weights=hf:{args.push}'
    return text


def main() -> int:
    """Run the command; exit status 2 for an InputError."""
    try:
        print(share(_parser().parse_args()))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
