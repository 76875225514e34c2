"""Count how many of timm's models work as backbones.

Run with: python scripts/timm_backbones.py

A model works if a network with it extracts descriptors of images from 4 x 6 to 330 x 500 pixels. The weights are
random. Models with more than 50 million parameters are left out, because they take long.
"""

from __future__ import annotations

import argparse
import random
import warnings
from collections import Counter

import timm
import torch

import superglobal
from superglobal.errors import InputError

_MAX_PARAMETERS = 50e6
_SIZES = ((4, 6), (97, 130), (330, 500))


def main() -> None:
    """Try a random sample of timm's models, and print the outcome of each and the number of each outcome."""
    parser = argparse.ArgumentParser(description="Count how many of timm's models work as backbones.")
    parser.add_argument("--sample", type=int, default=60, help="number of models to try (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample (default: 0)")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    names = timm.list_models()
    random.Random(args.seed).shuffle(names)
    counts: Counter[str] = Counter()
    for name in names:
        if counts.total() == args.sample:
            break
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in timm.create_model(name, num_classes=0).parameters())
        if size <= _MAX_PARAMETERS:
            counts[outcome(name)] += 1
    shares = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
    print(f"timm {timm.__version__}, {counts.total()} models, seed {args.seed}: {shares}")


def outcome(name: str) -> str:
    """Try a model, print the outcome, and return it: "works", "refused" (with a message) or "failed" (without one).

    Args:
        name: name of the model in timm.
    """
    result, reason = "works", ""
    try:
        model = superglobal.load_model("random", backbone=name, pooling="gem", scales=1)
        with torch.inference_mode():
            for size in _SIZES:
                model(torch.rand(1, 3, *size))
    except InputError as error:
        result, reason = "refused", str(error)
    except Exception as error:  # a model may fail in any way
        result, reason = "failed", repr(error)
    print(result, name, reason, flush=True)
    return result


if __name__ == "__main__":
    main()
