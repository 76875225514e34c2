"""Make a model that others load with one line: python scripts/share.py WEIGHTS FOLDER [--results outputs/eval/...]

FOLDER gets the weights, config.json and a model card with the training's settings and the results. They load it with
superglobal.RetrievalNetwork.from_pretrained("FOLDER"), and evaluate it with eval.py weights=FOLDER; pushed to Hugging
Face's hub, with weights=hf:owner/name.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from superglobal.cli.arguments import add_network_arguments, network_of
from superglobal.errors import InputError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_network_arguments(parser)
    parser.add_argument("folder", type=Path, help="new, or empty")
    parser.add_argument("--results", type=Path, nargs="+", default=[], help="results.json files, or folders of results")
    parser.add_argument("--license", default="unknown", help="of the weights, as the hub calls it: cc-by-4.0, mit, ...")
    parser.add_argument("--name", help="title of the card")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload to this repository of the hub, too")
    parser.add_argument("--private", action="store_true", help="the repository, if it is made by this")
    return parser


def share(args: argparse.Namespace) -> str:
    """Make the folder, push it if asked, and say how it is used."""
    folder: Path = args.folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: there is something there already; give a new folder, or empty this one")
    network = network_of(args)
    card = {"results": args.results, "license": args.license, "name": args.name, "repo_id": args.push}
    network.generate_model_card(**card)  # refuses results of other weights before anything is written
    network.save_pretrained(folder, model_card_kwargs=card)
    text = f'{folder}: superglobal.RetrievalNetwork.from_pretrained("{folder}"), eval.py weights={folder}'
    if args.push:
        address = network.push_to_hub(args.push, private=args.private or None, model_card_kwargs=card)
        text += f"\n{address}: eval.py weights=hf:{args.push}"
    return text


def main() -> int:
    """Exit status 2 for what a user can mend."""
    try:
        print(share(_parser().parse_args()))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
