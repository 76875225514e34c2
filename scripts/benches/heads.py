"""Compare the time and memory of a training step with each margin head to those of a linear softmax classifier.

On a CPU the processor time of all threads is measured, because the load of the machine hardly affects it. On a GPU the
elapsed time is measured.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benches.common import Measured, measured
from superglobal.models.heads import make_head

BATCH, DIM = 64, 2048
CLASSES = (81_313, 203_094)  # numbers of classes of GLDv2-clean and GLDv2
HEADS = [
    ("arcface", 1, 1.0),
    ("cosface", 1, 1.0),
    ("curricularface", 1, 1.0),
    ("arcface", 1, 0.1),
    ("cosface", 1, 0.1),
    ("curricularface", 1, 0.1),
    ("arcface", 3, 1.0),
    ("arcface", 3, 0.1),
]  # kind of head, number of centers per class, fraction of the negative classes that a step uses


class Linear(nn.Module):
    """Linear softmax classifier with cross-entropy loss, without normalization or margin."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, DIM).normal_(std=0.01))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, self.weight), labels)


def _step(classes: int, device: str, head: tuple[str, int, float] | None) -> Callable[[], tuple[float, float]]:
    """Return a function that runs one forward and one backward pass of a head in float32.

    The returned function returns two values. The first is the processor time of the pass in seconds, the smallest over
    all calls so far. The second is the peak GPU memory in MB, excluding the weights and the batch; it is 0 on a CPU.

    Args:
        classes: number of classes.
        device: "cuda" or "cpu".
        head: kind, number of centers and fraction of negative classes of the head; None for the linear classifier.
    """
    torch.manual_seed(0)
    with torch.device(device):
        x = torch.randn(BATCH, DIM, requires_grad=True)
        labels = torch.randint(classes, (BATCH,))
        if head:
            kind, centers, negatives = head
            counts = np.full(classes, 20)
            module = make_head(kind, DIM, counts, scale=45.25, margin=0.15, centers=centers, negatives=negatives)
        else:
            module = Linear(classes)
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    spent = []

    def run() -> tuple[float, float]:
        start = time.process_time()
        x.grad = module.weight.grad = None
        output = module(x, labels)
        loss = output.loss if head else output
        loss.backward()
        spent.append(time.process_time() - start)
        if device == "cpu":
            return min(spent), 0.0
        torch.cuda.synchronize()
        return min(spent), (torch.cuda.max_memory_allocated() - before) / 2**20

    if device == "cuda":
        run()  # The first call is slower, because CUDA libraries load their kernels in it.
    return run


def _measured(make: Callable[[], Callable[[], Any]], repeats: int, device: str) -> tuple[float, float]:
    """Measure a training step in a new process.

    Args:
        make: function that calls `_step` and returns its result.
        repeats: number of steps.
        device: "cuda" or "cpu".

    Returns:
        The time of a step in seconds (elapsed time on a GPU, processor time on a CPU), and the peak memory of the
        device in MB, excluding the weights and the batch.
    """
    clock, of_process, (processor, of_gpu) = measured(make, repeats)
    return (clock, of_gpu) if device == "cuda" else (processor, of_process)


def main(argv: list[str]) -> list[Measured]:
    """Measure a training step with the linear classifier and with each head, and print a table.

    Returns:
        One row per head and number of classes.
    """
    parser = argparse.ArgumentParser("bench.py heads", description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="number of steps of each head")
    parser.add_argument(
        "--memory-limit-gb", type=float, default=12, help="memory limit in GB; heads that need more are skipped"
    )
    parser.add_argument("--classes", type=int, nargs="+", default=CLASSES, help="numbers of classes to measure")
    arguments = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"batch {BATCH}, D={DIM}, float32, forward and backward; {device}, {torch.get_num_threads()} threads\n")
    print("| classes | head | centers | negatives | time | ratio | memory besides weights and batch | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    rows: list[Measured] = []
    for classes in arguments.classes:
        base = _measured(partial(_step, classes, device, None), arguments.repeats, device)
        rows.append(_row(classes, "linear softmax", 1, 1.0, base, base))
        for head in HEADS:
            kind, centers, negatives = head
            size = classes * centers * DIM * 4 / 1e9
            if 2 * size > arguments.memory_limit_gb:
                need = (
                    f"{classes:,} x {centers} x {DIM} x 4 bytes = {size:.1f} GB for weights, and the same for gradients"
                )
                print(f"| {classes:,} | {kind} | {centers} | {negatives:g} | skipped: {need} | | | |")
                continue
            result = _measured(partial(_step, classes, device, head), arguments.repeats, device)
            rows.append(_row(classes, kind, centers, negatives, result, base))
    return rows


def _row(
    classes: int, name: str, centers: int, negatives: float, result: tuple[float, float], base: tuple[float, float]
) -> Measured:
    """Print one row of the table, and return it.

    Args:
        classes: number of classes.
        name: name of the head.
        centers: number of centers per class.
        negatives: fraction of the negative classes that a step uses.
        result: time in seconds and peak memory in MB of a step with this head.
        base: time in seconds and peak memory in MB of a step with the linear classifier.
    """
    (seconds, megabytes), (base_seconds, base_megabytes) = result, base
    print(
        f"| {classes:,} | {name} | {centers} | {negatives:g} | {seconds:.3f} s | {seconds / base_seconds:.2f} x "
        f"| {megabytes:.0f} MB | {megabytes / base_megabytes:.2f} x |",
        flush=True,
    )
    row = {"classes": classes, "head": name, "centers": centers, "negatives": negatives}
    row |= {"seconds": seconds, "ratio": seconds / base_seconds}
    return row | {"megabytes": megabytes, "memory_ratio": megabytes / base_megabytes}
