"""Check the training images of GLDv2, and write an index of them that training runs use.

Example: superglobal prepare-gldv2 --root data/gldv2
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from superglobal.utils.distributed import exit_on_interrupt


def main(arguments: Sequence[str]) -> int:
    """Run `superglobal prepare-gldv2`: check the images, and write the index and a report.

    Args:
        arguments: arguments of the command.

    Returns:
        The exit status: 0, or 1 if images are missing or corrupt. Ctrl-C exits with status 130.
    """
    parser = argparse.ArgumentParser(
        "superglobal prepare-gldv2", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--root",
        type=Path,
        default=Path("data/gldv2"),
        help="folder that contains the training list and the images in train/ (default: data/gldv2)",
    )
    parser.add_argument(
        "--table",
        default="train_clean.csv",
        help="training list: train_clean.csv (default) or train.csv; data=gldv2 and data=gldv2x need train.csv",
    )
    parser.add_argument(
        "--tars", type=Path, help="folder of the tar files images_000.tar, ..., which are read instead of train/"
    )
    parser.add_argument("--workers", type=int, help="number of processes; by default, one per CPU core")
    parser.add_argument(
        "--decode", action="store_true", help="decode every image completely, which also finds damage inside files"
    )
    args = parser.parse_args(arguments)
    from superglobal.data.prepare_gldv2 import prepare
    from superglobal.utils.progress import Progress

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    exit_on_interrupt()
    prepared = prepare(args.root, args.table, args.tars, args.workers, args.decode, Progress("checked"))
    print(f"index: {prepared.index}\nreport: {prepared.report}")
    for problem in prepared.tar_problems:
        print(problem)
    if not prepared.corrupt:
        print(f"all {prepared.n_images} images are readable")
        return 0
    share = len(prepared.corrupt) / prepared.n_images
    print(
        f"{len(prepared.corrupt)} of {prepared.n_images} images are corrupt ({share:.4%}); download them again and "
        "repeat this command, or train without them: training accepts corrupt images up to the fraction "
        "data.max_corrupt_fraction"
    )
    return 1
