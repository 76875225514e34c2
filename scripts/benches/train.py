"""Compare the time of a training step in superglobal's Trainer with that in a plain PyTorch loop.

Network, head, data and optimizer are the same. Both variants update a moving average of the weights and a learning
rate schedule, clip gradients, and read batches without worker processes. Every `--log-every` steps, both check the loss
and write a row of the training curves. Neither runs a validation, and the time to save checkpoints is not counted.

The variants take turns in one process. In each turn, a variant trains a new network for `--steps` steps. The time of a
step is measured from its start to the start of the next step. The median is computed over the steps of each turn, and
then over all turns of a variant.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from trainings import RandomImages, StepTimes, fit, make_network_and_head

from benches.common import Measured
from superglobal.config.training import FitConfig, OptimConfig
from superglobal.data.samplers import EpochBatches
from superglobal.data.train_dataset import collate
from superglobal.loggers.csv_tensorboard import CurveFile
from superglobal.training.callbacks import CurveLogger, NonFiniteGuard, StepSeed
from superglobal.training.checkpointing import CheckpointCallback
from superglobal.training.module import parameter_groups, warmup_cosine
from superglobal.training.trainer import precision

CLASSES, FIRST = 100, 10  # number of classes, and number of uncounted steps at the start of each turn


def parts(args: argparse.Namespace) -> tuple[Any, Any, OptimConfig]:
    """Return a network, a head and optimizer settings. Every call returns the same initial weights and settings."""
    network, head = make_network_and_head(args.backbone, args.dim, CLASSES, pooling="gem")
    return network, head, OptimConfig(name="sgd", lr=1e-4, clip=10, ema=0.99, batch_size=args.batch, epochs=1)


def bare(args: argparse.Namespace, device: torch.device) -> tuple[list[float], float]:
    """Train a network for `args.steps` steps in a plain PyTorch loop.

    Args:
        args: arguments of the command line, with an additional attribute `fit`, the settings of the Trainer.
        device: device to train on.

    Returns:
        The times at which the steps began, as `time.perf_counter()`, and the total seconds spent waiting for data.
    """
    network, head, o = parts(args)
    network.to(device, memory_format=torch.channels_last)
    head.to(device)
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(o.ema), use_buffers=True)
    groups = parameter_groups("network", network, o.lr, o.weight_decay)
    groups += parameter_groups("head", head, o.lr, o.weight_decay)
    optimizer = torch.optim.SGD(groups, momentum=o.momentum, nesterov=True)
    schedule = LambdaLR(optimizer, lambda step: warmup_cosine(step, 1, args.steps))
    data = RandomImages(args.steps * args.batch, args.side, CLASSES)
    loader = iter(
        torch.utils.data.DataLoader(data, batch_sampler=EpochBatches(len(data), args.batch, 0), collate_fn=collate)
    )
    kind = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}[precision(args.fit)]
    begun, waited = [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        curves = CurveFile(Path(folder) / "curves.csv", 0)
        for step in range(args.steps):
            start = time.perf_counter()
            batch = next(loader)
            waited += time.perf_counter() - start
            images, labels = batch.images.to(device), batch.labels.to(device)
            begun.append(time.perf_counter())
            with torch.autocast(device.type, dtype=kind, enabled=kind is not None):
                x = network.normalize(images).contiguous(memory_format=torch.channels_last)
                out = head(network.single_scale_descriptors(x), labels)
            optimizer.zero_grad(set_to_none=True)
            out.loss.backward()
            torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], o.clip)
            optimizer.step()
            schedule.step()
            average.update_parameters(network)
            if (step + 1) % args.log_every == 0:
                assert torch.isfinite(out.loss)
                curves.log_metrics({"train/loss": out.loss.item()}, step=step + 1)
    return begun, waited


def framework(args: argparse.Namespace, device: torch.device) -> tuple[list[float], float]:
    """Train a network for `args.steps` steps with the Trainer and the callbacks of train.py.

    Args:
        args: arguments of the command line, with an additional attribute `fit`, the settings of the Trainer.
        device: not used, because `args.fit` determines the device of the Trainer.

    Returns:
        The times at which the steps began, as `time.perf_counter()`, and the total seconds spent waiting for data.
    """
    network, head, o = parts(args)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        guard = NonFiniteGuard(args.log_every, path, str)
        times = StepTimes()
        callbacks = [times, StepSeed(0), CurveLogger(args.log_every, args.batch), guard]
        callbacks.append(CheckpointCallback(path, None, None, guard))
        images = RandomImages(args.steps * args.batch, args.side, CLASSES)
        _, data = fit(network, head, o, args.fit, images, callbacks, [CurveFile(path / "curves.csv", 0)])
    return times.begins, data.waited


def main(argv: list[str]) -> list[Measured]:
    """Measure the time of a training step in the plain loop and in the Trainer, and return one row for each."""
    parser = argparse.ArgumentParser("bench.py train", description=__doc__)
    parser.add_argument("--backbone", default="test_resnet", help="name of the backbone")
    parser.add_argument("--side", type=int, default=64, help="height and width of the images in pixels")
    parser.add_argument("--batch", type=int, default=4, help="number of images per step")
    parser.add_argument("--dim", type=int, default=64, help="number of dimensions of the descriptors")
    parser.add_argument("--steps", type=int, default=200, help="number of training steps per turn of a variant")
    parser.add_argument("--blocks", type=int, default=5, help="number of turns of each variant")
    parser.add_argument("--log-every", type=int, default=50, help="number of steps between two rows of training curves")
    parser.add_argument(
        "--accelerator", default="auto", help="type of device: any value of the setting trainer.accelerator of train.py"
    )
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    args.fit = FitConfig(accelerator=args.accelerator, devices=1, num_workers=0, progress=False)
    cuda = args.accelerator != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    seconds: dict[str, list[float]] = {"bare": [], "framework": []}
    waits: dict[str, list[float]] = {"bare": [], "framework": []}
    for _ in range(args.blocks):
        for name, run in (("bare", bare), ("framework", framework)):
            begun, waited = run(args, device)
            steps = [after - before for before, after in itertools.pairwise(begun)][FIRST:]
            seconds[name].append(statistics.median(steps))
            waits[name].append(waited / (begun[-1] - begun[0]))
    what = f"{args.backbone}, {args.batch} images of {args.side} px per step, EMA, a row every {args.log_every} steps"
    print(f"{what}; {precision(args.fit)} on {device}, {torch.get_num_threads()} threads")
    base = statistics.median(seconds["bare"])
    rows: list[Measured] = []
    for name, values in seconds.items():
        own = statistics.median(values)
        spread = f"{1000 * min(values):.2f}-{1000 * max(values):.2f}"
        speed = f"{args.batch / own:.0f} images/s, waiting for data {statistics.median(waits[name]):.1%}"
        print(f"{name:12}{1000 * own:8.2f} ms per step (blocks {spread}){own / base:6.2f} x  {speed}")
        row = {"variant": name, "milliseconds": 1000 * own, "ratio": own / base, "images_per_second": args.batch / own}
        rows.append(row | {"waiting": statistics.median(waits[name])})
    print(f"the Trainer adds {1000 * (statistics.median(seconds['framework']) - base):.2f} ms per step")
    return rows
