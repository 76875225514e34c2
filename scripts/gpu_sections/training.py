"""Measure the speed of training ResNet-50 with as many classes as GLDv2-clean.

The section measures superglobal's Trainer, a plain PyTorch loop for comparison, and the loading of training images.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from trainings import RandomImages, StepTimes, fit, make_network_and_head

from gpu_sections.common import Report, write_jpegs
from superglobal.config.training import FitConfig, OptimConfig
from superglobal.data.train_dataset import Augment
from superglobal.models.backbone import Backbone
from superglobal.training.callbacks import CurveLogger, NonFiniteGuard, StepSeed
from superglobal.training.module import parameter_groups, warmup_cosine

CLASSES, DIM = 81_313, 2048


class _Setting:
    """Settings of a training step: network, image size, batch size, number of classes and precision.

    Args:
        report: report of the section, whose input size ("full", "small" or "tiny") determines the settings.
    """

    def __init__(self, report: Report) -> None:
        self.backbone, self.side, self.batch, self.classes, self.dim, self.steps = report.pick(
            ("resnet50", 512, 128, CLASSES, DIM, 40),
            ("resnet50", 512, 128, CLASSES, DIM, 20),
            ("test_resnet", 96, 8, 500, 64, 6),
        )
        self.kind = torch.bfloat16
        self.precision = "bf16-mixed"

    def parts(self) -> tuple[Any, Any, OptimConfig]:
        """Return a network, a head and optimizer settings. Every call returns the same initial weights and settings."""
        network, head = make_network_and_head(self.backbone, self.dim, self.classes, scale=45.25, margin=0.15)
        return network, head, OptimConfig(name="sgd", lr=1e-3, batch_size=self.batch, epochs=1)


def main(report: Report) -> None:
    """Measure the plain loop, its variants, the Trainer (also with torch.compile), and the loading of images."""
    photos = write_jpegs(report.work / "training", [(800, 600), (1024, 768)] * report.pick(128, 64, 2))
    setting = _Setting(report)
    peak = report.run("peak speed", lambda: _peak(report))
    flops = _flops(setting)
    bare = report.run("plain loop", lambda: _bare(report, setting, peak, flops), need=15)
    report.run("Trainer", lambda: _framework(report, setting, False, bare), need=20)
    report.run("parts of a step", lambda: _shares(report, setting, bare), need=10)
    report.run("data pipeline", lambda: _data(report, setting, photos, bare), need=15)
    report.run("variants of the plain loop", lambda: _variants(report, setting, peak, flops, bare), need=20)
    report.run("Trainer, compiled", lambda: _framework(report, setting, True, bare), need=110)


def _peak(report: Report) -> float:
    """Measure and return the FLOP/s of a large matrix product in bfloat16."""
    side = report.pick(8192, 8192, 256)
    a, b = (torch.randn(side, side, device=report.device).bfloat16() for _ in range(2))
    return 2 * side**3 / report.seconds(lambda: a @ b)


def _flops(setting: _Setting) -> float:
    """Return the number of floating-point operations of a training step, divided by the number of images.

    It is estimated as three times the number of operations of the forward pass, because the backward pass needs about
    twice as many.
    """
    backbone = Backbone(setting.backbone).eval().to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone(torch.empty(1, 3, setting.side, setting.side, device="meta"))
    return 3 * (counter.get_total_flops() + 2 * setting.dim * setting.classes)


def _bare(
    report: Report, setting: _Setting, peak: float | None, flops: float, title: str = "plain PyTorch loop", **how: Any
) -> float:
    """Measure and return the images/s of a plain PyTorch loop whose images are already on the device.

    Args:
        report: report of the section.
        setting: settings of a training step.
        peak: FLOP/s from `_peak`; None if unknown.
        flops: floating-point operations per image, from `_flops`.
        title: name of this variant of the loop.
        **how: changes of this variant: `layout` (memory layout of the network), `fused` (use fused SGD) and `cast_head`
            (use TF32 in the head). `row` contains additional fields of the report's `Row`.
    """
    network, head, o = setting.parts()
    network.to(report.device, memory_format=how.get("layout", torch.channels_last))
    head.to(report.device)
    if how.get("cast_head"):
        head = _Tf32(head)
    groups = parameter_groups("network", network, o.lr, o.weight_decay) + parameter_groups(
        "head", head, o.lr, o.weight_decay
    )
    optimizer = torch.optim.SGD(groups, momentum=o.momentum, nesterov=True, fused=how.get("fused"))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, 1, 100))
    shape = (setting.batch, 3, setting.side, setting.side)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=report.device)
    labels = torch.randint(setting.classes, (setting.batch,), device=report.device)
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True

    def step() -> None:
        with torch.autocast(report.device.type, setting.kind):
            x = network.normalize(images).contiguous(memory_format=how.get("layout", torch.channels_last))
            loss = head(network.single_scale_descriptors(x), labels).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()

    if report.cuda:
        torch.cuda.reset_peak_memory_stats()
    together = report.pick(5, 5, 1)  # steps between two synchronizations with the GPU, which are rare in a training run

    def steps() -> None:
        for _ in range(together):
            step()

    try:
        seconds = report.seconds(steps, repeats=report.pick(4, 2, 2), warmup=1) / together
    finally:
        torch.backends.cudnn.benchmark = before
    rate = setting.batch / seconds
    note = f"{1e3 * seconds:.1f} ms per step"
    if report.cuda:
        note += f", {torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
    if peak:
        note += f", {flops * rate / peak:.0%} of the bfloat16 peak"
    what = f"{setting.backbone}, {setting.side} px, batch {setting.batch}, {setting.classes:,} classes, bfloat16"
    report.add(f"{what}: {title}", rate, "images/s", note=note, **how.get("row", {}))
    return rate


class _Tf32(torch.nn.Module):
    """Wrapper that makes a head use TF32 for its float32 matrix products."""

    def __init__(self, head: torch.nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        return self.head(x, labels)


def _framework(report: Report, setting: _Setting, compiled: bool, bare: float | None) -> None:
    """Measure the images/s of the Trainer with the callbacks of train.py.

    Args:
        report: report of the section.
        setting: settings of a training step.
        compiled: compile the network with torch.compile.
        bare: images/s of the plain loop, the baseline; None if unknown.
    """
    if compiled:
        report.require_gpu("compiling the step in a short time")
    network, head, o = setting.parts()
    accelerator = "gpu" if report.cuda else "cpu"
    workers = report.pick(8, 8, 0)
    config = FitConfig(
        accelerator=accelerator, devices=1, num_workers=workers, progress=False, precision=setting.precision
    )
    config.compile = compiled
    times = StepTimes()
    callbacks: list[pl.Callback] = [times, StepSeed(0), CurveLogger(50, setting.batch)]
    callbacks.append(NonFiniteGuard(50, report.work, str))
    images = RandomImages(setting.steps * setting.batch, setting.side, setting.classes)
    if report.cuda:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    _, data = fit(network, head, o, config, images, callbacks)
    # The GPU works asynchronously, so the time of a single step says little about the speed of the GPU. Use the mean
    # over many steps.
    first = setting.steps // 3
    waits = [after - before for before, after in itertools.pairwise(times.begins)]
    seconds = statistics.mean(waits[first:])
    rate = setting.batch / seconds
    note = (
        f"{1e3 * seconds:.1f} ms per step, waited {data.waited:.1f} s of {time.perf_counter() - start:.1f} s for data"
    )
    if report.cuda:
        note += f", {torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
    if compiled:
        note += f"; first step {waits[0]:.0f} s"
    name = f"superglobal's Trainer{', trainer.compile=true' if compiled else ''}"
    more: dict[str, Any] = {"predicted": "1.2 x"} if compiled else {}
    report.add(name, rate, "images/s", ratio=rate / bare if bare else None, baseline="plain loop", note=note, **more)


def _shares(report: Report, setting: _Setting, bare: float | None) -> None:
    """Measure the time of pooling with whitening, of the head and of the optimizer in a training step, each separately.

    Args:
        report: report of the section.
        setting: settings of a training step.
        bare: images/s of the plain loop, from which the time of a whole step is computed; None if unknown.
    """
    network, head, _ = setting.parts()
    network.to(report.device, memory_format=torch.channels_last)
    head.to(report.device)
    side = network.backbone(torch.zeros(1, 3, setting.side, setting.side, device=report.device)).shape[-1]
    shape = (setting.batch, network.backbone.channels, side, side)
    feature_map = torch.rand(shape, device=report.device, dtype=setting.kind).to(memory_format=torch.channels_last)
    feature_map.requires_grad_()
    descriptors = torch.randn(setting.batch, setting.dim, device=report.device, dtype=setting.kind, requires_grad=True)
    labels = torch.randint(setting.classes, (setting.batch,), device=report.device)

    def pooling() -> None:
        with torch.autocast(report.device.type, setting.kind):
            out = network.descriptors([feature_map])
        out.sum().backward()

    def margin() -> None:
        head.weight.grad = None
        head(descriptors, labels).loss.backward()

    margin()
    optimizer = torch.optim.SGD([*network.parameters(), *head.parameters()], lr=1e-9, momentum=0.9, nesterov=True)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    times: dict[str, Callable[[], Any]] = {
        "pooling and whitening": pooling,
        "ArcFace head": margin,
        "SGD step": optimizer.step,
    }
    step = setting.batch / bare if bare else None
    for name, function in times.items():
        seconds = report.seconds(function)
        note = f"{seconds / step:.1%} of a step of the plain loop" if step else ""
        report.add(f"part of a step: {name}", 1e3 * seconds, "ms", note=note)


class _Photos(Dataset):
    """Data set of JPEG images that are decoded and augmented as in a training run.

    Args:
        files: contents of the JPEG files.
        count: length of the data set.
        side: height and width of the augmented images in pixels.
    """

    def __init__(self, files: list[bytes], count: int, side: int) -> None:
        self.files, self.count, self.side = files, count, side
        self.augment = Augment(0.3, True, 0.2)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        return self.augment(self.files[index % len(self.files)], self.side)


def _data(report: Report, setting: _Setting, photos: list[Any], bare: float | None) -> None:
    """Measure how many images per second the CPU decodes and augments.

    Args:
        report: report of the section.
        setting: settings of a training step.
        photos: paths of JPEG files.
        bare: images/s of the plain loop, with which the result is compared; None if unknown.
    """
    cores = os.cpu_count() or 1
    batches = report.pick(24, 12, 2)
    files = [photo.read_bytes() for photo in photos]
    loader = DataLoader(
        _Photos(files, batches * setting.batch, setting.side),
        setting.batch,
        num_workers=report.pick(cores, cores, 0),
        pin_memory=report.cuda,
    )
    times = []
    for _ in loader:
        times.append(time.perf_counter())
    rate = setting.batch * (len(times) - 1) / (times[-1] - times[0])
    note = f"{cores} cores; 800 x 600 and 1024 x 768 images"
    name = f"decoding and augmenting to {setting.side} px"
    report.add(name, rate, "images/s", ratio=rate / bare if bare else None, baseline="plain loop", note=note)


def _variants(report: Report, setting: _Setting, peak: float | None, flops: float, bare: float | None) -> None:
    """Measure variants of the plain loop that are faster on some GPUs and slower on others.

    Args:
        report: report of the section.
        setting: settings of a training step.
        peak: FLOP/s of a matrix product; None if unknown.
        flops: floating-point operations of a training step per image.
        bare: images/s of the plain loop; None if unknown.
    """
    report.require_gpu("the comparison of layouts and optimizers")
    for title, how, predicted in (
        ("fused SGD", {"fused": True}, "1.02 x"),
        ("TF32 in the head", {"cast_head": True}, "1.03 x"),
        ("NCHW", {"layout": torch.contiguous_format}, "0.7 x"),
    ):
        row = {"predicted": predicted}
        report.run(
            title,
            lambda title=title, how=how, row=row: _variant(report, setting, peak, flops, title, bare, row, how),
            need=10,
        )  # type: ignore[misc]


def _variant(
    report: Report,
    setting: _Setting,
    peak: float | None,
    flops: float,
    title: str,
    bare: float | None,
    row: dict[str, Any],
    how: dict[str, Any],
) -> None:
    """Measure one variant of the plain loop, and compare it with the unchanged loop.

    Args:
        report: report of the section.
        setting: settings of a training step.
        peak: FLOP/s from `_peak`; None if unknown.
        flops: floating-point operations per image, from `_flops`.
        title: name of the variant.
        bare: images/s of the unchanged loop; None if unknown.
        row: additional fields of the row with the comparison.
        how: changes of the variant: values of `layout`, `fused` and `cast_head`, see `_bare`.
    """
    rate = _bare(report, setting, peak, flops, f"plain loop, {title}", **how)
    if bare:
        report.add(f"gain of {title}", rate / bare, "x", **row)
