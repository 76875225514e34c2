"""Compare the time to extract descriptors with the time of an unoptimized network, and with a lower bound.

The unoptimized network is timm's network with the same scales and pooling. It processes one image at a time in eager
mode, in the memory layout NCHW and with separate batch normalization.

The lower bound is the time of the convolutions alone, without any other operation. Each convolution is measured
separately, with batch normalization folded into its weights, and in the faster of two memory layouts. The times of all
convolutions are then added.

The variants take turns in one process with the same number of threads, and medians are printed. The time to decode
images is not included.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benches.common import Measured
from superglobal import load_model
from superglobal.models.inference import optimize_for_inference
from superglobal.models.network import RetrievalNetwork, forward_variants
from superglobal.utils.precision import PRECISIONS, full_precision

Call = tuple[nn.Conv2d, Tensor]


def _calls(network: RetrievalNetwork, images: Tensor) -> list[Call]:
    """Run a network on images, and record the inputs of its convolutions.

    Args:
        network: network to run at all of its scales.
        images: (B, 3, H, W) uint8 images.

    Returns:
        One (convolution, input) pair for each call of a convolution.
    """
    calls: list[Call] = []

    def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.Conv2d)
        calls.append((module, inputs[0]))

    hooks = [m.register_forward_pre_hook(record) for m in network.modules() if isinstance(m, nn.Conv2d)]
    network(images)
    for hook in hooks:
        hook.remove()
    return calls


def _floor(calls: list[Call], batch: int, sync: Callable[[], None]) -> Callable[[], float]:
    """Return a function that measures the lower bound: the total seconds of all convolutions for one batch.

    Args:
        calls: convolutions and their inputs for one image, from `_calls`.
        batch: number of images per batch.
        sync: function that waits until the device has finished.
    """
    layouts: list[Any] = [torch.contiguous_format, torch.channels_last]

    def run() -> float:
        total = 0.0
        for module, x in calls:
            best = []
            for layout in layouts:
                laid = x.expand(batch, -1, -1, -1).contiguous(memory_format=layout)
                module.to(memory_format=layout)
                module(laid)
                sync()
                start = time.perf_counter()
                module(laid)
                sync()
                best.append(time.perf_counter() - start)
            total += min(best)
        return total

    return run


def main(argv: list[str]) -> list[Measured]:
    """Measure extraction in each precision, the unoptimized network, and the convolutions alone (the lower bound).

    Returns:
        One row per variant. A row also contains the smallest cosine similarity between a descriptor of the variant and
        the descriptor of the same image from the unoptimized network. The lower bound has no descriptors.
    """
    parser = argparse.ArgumentParser("bench.py extract", description=__doc__)
    parser.add_argument("--backbone", default="resnet50", help="name of the backbone in timm")
    parser.add_argument("--width", type=int, default=1024, help="width of the images in pixels")
    parser.add_argument("--height", type=int, default=768, help="height of the images in pixels")
    parser.add_argument("--scales", type=int, default=3, help="number of scales")
    parser.add_argument("--batch", type=int, help="number of images per batch; by default 1 on a CPU and 16 on a GPU")
    parser.add_argument(
        "--rounds", type=int, default=3, help="number of measurements of each variant; the median is printed"
    )
    parser.add_argument(
        "--precisions", nargs="+", default=["float32"], choices=list(PRECISIONS), help="precisions to measure"
    )
    args = parser.parse_args(argv)
    cuda = torch.cuda.is_available()
    device, sync = ("cuda", torch.cuda.synchronize) if cuda else ("cpu", lambda: None)
    batch = args.batch or (16 if cuda else 1)
    plain = load_model("random", backbone=args.backbone, dim=2048, scales=args.scales)
    fast: dict[str, RetrievalNetwork] = {}
    for precision in args.precisions:
        plain.precision = precision
        fast[precision] = optimize_for_inference([plain])[0].to(device)
    plain.precision = "float32"
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, 3, args.height, args.width), dtype=torch.uint8, generator=generator)
    with torch.inference_mode(), full_precision():
        images = images.to(device)
        floor = _floor(_calls(optimize_for_inference([plain])[0].to(device), images[:1]), batch, sync)
        plain.to(device)

        def one_by_one() -> Tensor:
            return torch.cat([plain(images[i : i + 1]) for i in range(batch)])

        runs: dict[str, Callable[[], Tensor]] = {"unoptimized, one image": one_by_one}
        runs |= {
            f"superglobal, {name}": lambda net=net: forward_variants([net], images)[0] for name, net in fast.items()
        }
        seconds: dict[str, list[float]] = {name: [] for name in (*runs, "lower bound")}
        descriptors = {name: run() for name, run in runs.items()}
        for _ in range(args.rounds):
            for name, run in runs.items():
                sync()
                start = time.perf_counter()
                run()
                sync()
                seconds[name].append(time.perf_counter() - start)
            seconds["lower bound"].append(floor())
    print(f"{args.backbone}, {args.width} x {args.height} px, {args.scales} scales, batch {batch}, {device}")
    base, bound = (statistics.median(seconds[name]) for name in ("unoptimized, one image", "lower bound"))
    rows: list[Measured] = []
    for name, values in seconds.items():
        own = statistics.median(values)
        text = f"  {name:24}{batch / own:8.3f} images/s{base / own:7.2f} x unoptimized{bound / own:7.2f} of the bound"
        row: Measured = {"variant": name, "images_per_second": batch / own, "ratio": base / own, "floor": bound / own}
        if name in descriptors:
            cosines = (descriptors[name] * descriptors["unoptimized, one image"]).sum(1)
            row["least_cosine"] = float(cosines.min())
            text += f"  smallest cosine {row['least_cosine']:.6f}"
        print(text)
        rows.append(row)
    return rows
