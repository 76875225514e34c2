"""Compare extraction with the plain network, one image at a time, and with its convolutions alone.

Plain is timm's network as it comes: eager, unfolded batch norms, NCHW, inference mode, the same scales and pooling. The
floor is the sum of the convolutions' own time, each called alone with the batch's shapes in its faster layout, batch
norm folded in. All run in turns in one process with the same threads; medians. Decoding is left out.
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
    """Return every convolution with its input, for one image at all scales."""
    calls: list[Call] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.Conv2d)
        calls.append((module, inputs[0]))

    hooks = [m.register_forward_pre_hook(note) for m in network.modules() if isinstance(m, nn.Conv2d)]
    network(images)
    for hook in hooks:
        hook.remove()
    return calls


def _floor(calls: list[Call], batch: int, sync: Callable[[], None]) -> Callable[[], float]:
    """Return a function that measures the seconds of all convolutions, each in its faster layout."""
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
    """Measure extraction, the plain network and the convolutions in turns, with the cosine of each precision."""
    parser = argparse.ArgumentParser("bench.py extract", description=__doc__)
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--height", type=int, default=768)
    parser.add_argument("--scales", type=int, default=3)
    parser.add_argument("--batch", type=int, help="images at once; 1 on a CPU, 16 on a GPU by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precisions", nargs="+", default=["float32"], choices=list(PRECISIONS))
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

        runs: dict[str, Callable[[], Tensor]] = {"plain, one at a time": one_by_one}
        runs |= {f"ours, {name}": lambda net=net: forward_variants([net], images)[0] for name, net in fast.items()}
        seconds: dict[str, list[float]] = {name: [] for name in (*runs, "floor")}
        found = {name: run() for name, run in runs.items()}
        for _ in range(args.rounds):
            for name, run in runs.items():
                sync()
                start = time.perf_counter()
                run()
                sync()
                seconds[name].append(time.perf_counter() - start)
            seconds["floor"].append(floor())
    print(f"{args.backbone}, {args.width} x {args.height} px, {args.scales} scales, batch {batch}, {device}")
    base, least = (statistics.median(seconds[name]) for name in ("plain, one at a time", "floor"))
    rows: list[Measured] = []
    for name, values in seconds.items():
        own = statistics.median(values)
        text = f"  {name:24}{batch / own:8.3f} images/s{base / own:7.2f} x plain{least / own:7.2f} of the floor"
        row: Measured = {"variant": name, "images_per_second": batch / own, "ratio": base / own, "floor": least / own}
        if name in found:
            row["least_cosine"] = float((found[name] * found["plain, one at a time"]).sum(1).min())
            text += f"  least cosine {row['least_cosine']:.6f}"
        print(text)
        rows.append(row)
    return rows
