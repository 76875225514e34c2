"""Measure the speed of descriptor extraction.

The speed is compared with that of two baselines: an unoptimized network that processes one image at a time, and timm's
network, which processes batches. The section also measures the time of each operation, and the speed of the whole
pipeline from JPEG files to stored descriptors.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from gpu_sections.common import Report, Skip, sizes, write_jpegs
from gpu_sections.pipeline import extract_all
from superglobal import load_model
from superglobal.data.images import decode_image, read_image
from superglobal.models.backbone import Backbone
from superglobal.models.inference import optimize_for_inference
from superglobal.models.network import RetrievalNetwork, forward_variants
from superglobal.models.pooling import gem
from superglobal.utils.precision import full_precision

DIM, SCALES = 2048, 3
# Operation -> substrings of kernel names. A GPU kernel belongs to the first operation of which a substring occurs in
# the name of the kernel.
KERNELS = {
    "copies": ("memcpy", "memset"),
    "resize": ("upsample",),
    "pooling": ("avg_pool", "reflection", "pow", "reduce"),
    "max pooling of the stem": ("max_pool",),
    "network": ("conv", "gemm", "cutlass", "xmma", "nvjet", "sm90", "sm80", "implicit", "cudnn", "winograd"),
    "elementwise": ("elementwise", "clamp", "relu"),
}


def main(report: Report) -> None:
    """Measure the peak speed of the device, extraction with ResNet-50, the pipeline, and extraction with ResNet-101."""
    photos = write_jpegs(report.work / "photos", sizes(report.pick(1024, 384, 6)))
    peaks = report.run("peak speeds", lambda: _ceilings(report)) or {}
    backbones = report.pick(["resnet50", "resnet101"], ["resnet50"], ["test_resnet"])
    report.run(backbones[0], lambda: _rates(report, backbones[0], peaks))
    report.run("pipeline", lambda: _pipeline(report, backbones[0], photos), need=20)
    for backbone in backbones[1:]:
        report.run(backbone, lambda backbone=backbone: _rates(report, backbone, peaks), need=20)  # type: ignore[misc]
    report.run("compiled", lambda: _compiled(report, backbones[0], "float16" if report.cuda else "float32"), need=240)


def _ceilings(report: Report) -> dict[str, float]:
    """Measure the speed of a large matrix product in each precision, and the bandwidth of a copy on the device.

    Returns:
        Precision -> FLOP/s of the matrix product, the upper limit for the speed of a network.
    """
    side = report.pick(8192, 8192, 512)
    peaks = {}
    for name, dtype, setting in (
        ("float32", torch.float32, "ieee"),
        ("tf32", torch.float32, "tf32"),
        ("float16", torch.float16, "ieee"),
        ("bfloat16", torch.bfloat16, "ieee"),
    ):
        if name in ("tf32", "float16") and not report.cuda:
            continue
        a, b = (torch.randn(side, side, device=report.device).to(dtype) for _ in range(2))
        with full_precision(), _precision(matmul=setting):
            seconds = report.seconds(lambda a=a, b=b: a @ b, repeats=report.pick(5, 5, 1))  # type: ignore[misc]
        peaks[name] = 2 * side**3 / seconds
        report.add(f"peak: matrix product of {side} x {side}, {name}", peaks[name] / 1e12, "TFLOP/s")
    x = torch.empty(report.pick(2**30, 2**30, 2**22), dtype=torch.float32, device=report.device)
    seconds = report.seconds(lambda: torch.empty_like(x).copy_(x))
    report.add("peak: copy on the device, bytes read and written", 2 * x.numel() * 4 / seconds / 1e12, "TB/s")
    return peaks


@contextmanager
def _precision(**settings: str) -> Iterator[None]:
    """Context manager that sets how a GPU computes float32 operations: "ieee" (strict float32) or "tf32".

    Args:
        **settings: type of operation -> value. The types are `matmul` (matrix products) and `conv` (convolutions).
    """
    library: Any = torch.backends
    backends = {"matmul": library.cuda.matmul, "conv": library.cudnn.conv}
    before = {name: backends[name].fp32_precision for name in settings}
    try:
        for name, value in settings.items():
            backends[name].fp32_precision = value
        yield
    finally:
        for name, value in before.items():
            backends[name].fp32_precision = value


@contextmanager
def _benchmark() -> Iterator[None]:
    """Context manager that lets cuDNN measure several algorithms for each convolution, and use the fastest."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _shape(report: Report) -> tuple[int, int, int]:
    """Return the height and the width of images in pixels, and the number of images per batch, for this report."""
    return report.pick((768, 1024, 16), (768, 1024, 16), (96, 128, 2))


def _images(report: Report) -> Tensor:
    """Return a batch of random images on the device, (B, 3, H, W) uint8."""
    height, width, batch = _shape(report)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator).to(report.device)


def _flops(network: RetrievalNetwork, height: int, width: int) -> int:
    """Return the number of floating-point operations of the backbone for one image at all scales.

    A multiplication and an addition count as two operations.
    """
    backbone = Backbone(network.backbone.name).eval().to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for scale in network.scales:
            backbone(torch.empty(1, 3, int(height * scale), int(width * scale), device="meta"))
    return counter.get_total_flops()


def _timm_batched(backbone: str, device: torch.device, half: bool) -> Callable[[Tensor], Tensor]:
    """Return a function that extracts descriptors with timm and plain PyTorch, without superglobal's network.

    The returned function computes timm's feature maps of a batch at three scales in the memory layout NHWC, and applies
    GeM pooling and a linear layer to each of them.

    Args:
        backbone: name of the backbone in timm.
        device: device of the computation.
        half: compute the feature maps in bfloat16 with autocast, instead of in float32.
    """
    net: Any = timm.create_model(backbone, num_classes=0).eval().to(device, memory_format=torch.channels_last)
    layer = torch.nn.Linear(net.num_features, DIM).to(device)
    mean, std = (
        torch.tensor(v, device=device).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )

    def extract(images: Tensor) -> Tensor:
        x = (images.float() / 255 - mean) / std
        vectors = []
        for scale in (0.7071, 1.0, 1.4142):
            resized = x if scale == 1 else F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)
            resized = resized.contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                feature_map = net.forward_features(resized)
            vectors.append(F.normalize(layer(gem(feature_map))))
        return F.normalize(torch.stack(vectors).mean(0))

    return extract


def _rates(report: Report, backbone: str, peaks: dict[str, float]) -> None:
    """Measure how many images per second superglobal (in several precisions) and the baselines process.

    Args:
        report: report of the section.
        backbone: name of the backbone.
        peaks: precision -> FLOP/s of a matrix product, from `_ceilings`. The speed of the network is compared with it.
    """
    height, width, batch = _shape(report)
    repeats = report.pick(5, 3, 1)
    images = _images(report)
    plain = load_model("random", backbone=backbone, dim=DIM, scales=SCALES)
    flops = _flops(plain, height, width)
    what = f"{backbone}, {width} x {height}, {SCALES} scales"
    report.add(f"{what}: FLOPs per image", flops / 1e9, "GFLOP")
    copies = {}
    for name in report.pick(
        ("float32", "float16", "bfloat16"), ("float32", "float16", "bfloat16"), ("float32", "bfloat16")
    ):
        plain.precision = name
        copies[name] = optimize_for_inference([plain])[0].to(report.device)
    plain.precision = "float32"
    plain.to(report.device)

    def one_at_a_time() -> Tensor:
        return torch.cat([plain(image[None]) for image in images])

    base = "reference loop"

    def add(name: str, function: Callable[[], Tensor], peak: str, truth: Tensor | None = None, **more: Any) -> float:
        seconds = report.seconds(function, repeats)
        note = f"{flops * batch / seconds / peaks[peak]:.0%} of the {peak} peak" if peak in peaks else ""
        if truth is not None:
            note += f"; smallest cosine to strict float32 {float((function() * truth).sum(1).min()):.7f}"
        rate = batch / seconds
        more.setdefault("ratio", rate / rates[base] if base in rates else None)
        report.add(f"{what}: {name}", rate, "images/s", baseline=base, note=note, **more)
        return rate

    rates: dict[str, float] = {}
    tf32 = "tf32" if report.cuda else "float32"
    with torch.inference_mode():
        # The authors' code extracts in such a loop with PyTorch's default settings, which enable TF32 in convolutions.
        rates[base] = add(
            f"{base} (one image at a time, NCHW, separate batch normalization, TF32 convolutions)", one_at_a_time, tf32
        )
        timm_rates = {}
        for half in (False, True):
            name = f"plain timm batched, {'bfloat16 autocast' if half else 'TF32 convolutions'}"
            extract = _timm_batched(backbone, report.device, half)
            timm_rates[half] = add(name, lambda extract=extract: extract(images), "bfloat16" if half else tf32)
        with full_precision():
            add("one image at a time, strict float32", one_at_a_time, "float32")
            truth = forward_variants([copies["float32"]], images)[0]
            speeds = {}
            for name, network in copies.items():
                run = lambda network=network: forward_variants([network], images)[0]  # noqa: E731
                speeds[name] = add(f"superglobal {name}", run, name, truth)
            network = copies["float32"]
            half = copies["float16" if report.cuda else "bfloat16"]
            if report.cuda:
                with _precision(conv="tf32"):
                    run = lambda: forward_variants([network], images)[0]  # noqa: E731
                    add("superglobal, TF32 in the network only", run, "tf32", truth, predicted="6 x float32")
                with _benchmark():
                    for name in ("float32", "float16"):
                        run = lambda name=name: forward_variants([copies[name]], images)[0]  # noqa: E731
                        gain = {"predicted": "1.1 x without", "ratio": None}
                        rate = add(f"superglobal {name}, cudnn.benchmark", run, name, truth, **gain)
                        report.add(f"{what}: gain of cudnn.benchmark, {name}", rate / speeds[name], "x")
            report.add(
                f"{what}: superglobal in bfloat16 divided by plain timm in bfloat16",
                speeds["bfloat16"] / timm_rates[True],
                "x",
            )
            for size in report.pick((1, 4, 32), (1,), ()):
                some = images.repeat(2, 1, 1, 1)[:size]
                seconds = report.seconds(lambda some=some: forward_variants([half], some), repeats)  # type: ignore[misc]
                report.add(f"{what}: superglobal float16, batch {size}", size / seconds, "images/s")
            report.run("new sizes", lambda: _new_sizes(report, what, half, images))
            report.run("time per operation", lambda: _profile(report, what, half, images))
            report.run("pooling", lambda: _pooling(report, what, half, images))


def _compiled(report: Report, backbone: str, precision: str) -> None:
    """Compare the speed of extraction with and without torch.compile. The backbone is compiled for images of any size.

    Args:
        report: report of the section.
        backbone: name of the backbone.
        precision: precision of the network, such as "float16".
    """
    images = _images(report)
    network = load_model("random", backbone=backbone, dim=DIM, scales=SCALES)
    network.precision = precision
    eager, compiled = (optimize_for_inference([network])[0].to(report.device) for _ in range(2))
    compiled.backbone.compile(dynamic=True)
    with torch.inference_mode(), full_precision():
        start = time.perf_counter()
        descriptors = forward_variants([compiled], images)[0]
        report.synchronize()
        note = f"first batch after {time.perf_counter() - start:.0f} s"
        note += (
            f"; smallest cosine to eager {float((forward_variants([eager], images)[0] * descriptors).sum(1).min()):.7f}"
        )
        base, seconds = (report.seconds(lambda n=n: forward_variants([n], images)) for n in (eager, compiled))
    what = f"{backbone}, {images.shape[3]} x {images.shape[2]}, {SCALES} scales"
    what += f": superglobal {precision}, backbone compiled"
    report.add(
        what, len(images) / seconds, "images/s", ratio=base / seconds, baseline="eager", note=note, predicted="1.2 x"
    )


def _new_sizes(report: Report, what: str, network: RetrievalNetwork, images: Tensor) -> None:
    """Measure how much longer the first batch of a new image size takes than later batches of this size.

    The first batch takes longer, because cuDNN chooses algorithms for all convolutions again.

    Args:
        report: report of the section.
        what: description of the inputs, put at the start of the row's name.
        network: network to use.
        images: (B, 3, H, W) uint8 images, which are cropped to new sizes.
    """
    height = images.shape[-2]
    first, again = [], []
    for less in range(1, report.pick(9, 5, 3)):
        some = images[:, :, : height - less]
        for times in (first, again):
            times.append(report.seconds(lambda some=some: forward_variants([network], some), 1, 0))  # type: ignore[misc]
    extra = 1e3 * (statistics.median(first) - statistics.median(again))
    report.add(f"{what}: additional time of the first batch of a size", extra, "ms")


def _pooling(report: Report, what: str, network: RetrievalNetwork, images: Tensor) -> None:
    """Measure the time to pool the feature maps of a batch of images at the largest scale.

    Args:
        report: report of the section.
        what: description of the inputs, put at the start of the row's name.
        network: network to use.
        images: (B, 3, H, W) uint8 images.
    """
    x = images.repeat(1, 1, 2, 2)[:, :, : int(images.shape[-2] * 1.4142), : int(images.shape[-1] * 1.4142)]
    feature_map = network.backbone(network.normalize(x)).clone()
    eager = report.seconds(lambda: network.pooling(feature_map))
    bytes_read = feature_map.numel() * feature_map.element_size()
    note = f"a feature map of {bytes_read / 1e6:.0f} MB"
    report.add(f"{what}: pooling of a batch at the largest scale", 1e3 * eager, "ms", note=note)


def _profile(report: Report, what: str, network: RetrievalNetwork, images: Tensor) -> None:
    """Profile extraction, and report the fraction of the GPU time that each operation takes.

    Args:
        report: report of the section.
        what: description of the inputs, put at the start of the rows' names.
        network: network to use.
        images: (B, 3, H, W) uint8 images.
    """
    report.require_gpu("the profile")
    from torch.profiler import ProfilerActivity, profile

    host = images.cpu().pin_memory()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        for _ in range(3):
            forward_variants([network], host.to(report.device, non_blocking=True))[0].cpu()
    spent: dict[str, float] = defaultdict(float)
    kernels: dict[str, float] = {}
    for event in profiler.key_averages():
        own = event.self_device_time_total
        if own <= 0 or event.device_type == torch.autograd.DeviceType.CPU:
            continue
        kernels[event.key] = own
        name = event.key.lower()
        kind = next((kind for kind, words in KERNELS.items() if any(word in name for word in words)), "other")
        spent[kind] += own
    total = sum(spent.values())
    for kind, own in sorted(spent.items(), key=lambda pair: -pair[1]):
        report.add(f"{what}, float16: fraction of the GPU time, {kind}", 100 * own / total, "%")
    for name, own in sorted(kernels.items(), key=lambda pair: -pair[1])[:15]:
        print(f"  {100 * own / total:5.1f} % {name[:150]}", flush=True)


def _pipeline(report: Report, backbone: str, photos: list[Path]) -> None:
    """Measure the speed of reading JPEG files, extracting descriptors and writing them to a descriptor store.

    Args:
        report: report of the section.
        backbone: name of the backbone.
        photos: JPEG files, whose sizes are those of images in ROxford5k and RParis6k.
    """
    cores = os.cpu_count() or 1
    workers = report.pick(cores - 2, cores - 2, 0)
    start = time.perf_counter()
    for photo in photos[: report.pick(32, 32, 2)]:
        read_image(photo)
    seconds = (time.perf_counter() - start) / report.pick(32, 32, 2)
    size = sum(photo.stat().st_size for photo in photos) / len(photos) / 1e3
    report.add("decoding a JPEG on one core", 1 / seconds, "images/s", note=f"{size:.0f} KB on average")
    report.run("GPU decoder", lambda: _decoder(report, photos))
    network = load_model("random", backbone=backbone, dim=DIM, scales=SCALES)
    variants: list[dict[str, Any]] = [{"precision": "float32"}]
    variants += [{"precision": "float16"}, {"precision": "float16", "decoder": "gpu"}] if report.cuda else []
    for how in variants:
        title = ", ".join(how.values())
        report.run(title, lambda how=how, title=title: _whole(report, network, photos, workers, how, title), need=10)  # type: ignore[misc]


def _whole(
    report: Report, network: RetrievalNetwork, photos: list[Path], workers: int, how: dict[str, Any], title: str
) -> None:
    """Measure the images per second of the whole pipeline, from JPEG files to a descriptor store.

    Args:
        report: report of the section.
        network: network to use.
        photos: JPEG files.
        workers: number of processes that read images.
        how: settings of `ExtractionConfig`: name -> value.
        title: description of the settings, used in the name of the row.
    """
    # The time of a run includes the start-up of the workers. To exclude it, extract few and then many images, and
    # divide the difference in images by the difference in time.
    few, many = photos[: len(photos) // 4], photos
    if how["precision"] == "float32":
        few, many = few[: len(few) // 4], few
    few_seconds, many_seconds = (
        extract_all(report, network, part, f"{title}-{len(part)}".replace(", ", "-"), workers, **how)[1]
        for part in (few, many)
    )
    rate = (len(many) - len(few)) / max(1e-9, many_seconds - few_seconds)
    note = f"{len(many)} images in {many_seconds:.1f} s including the start-up; {workers} workers"
    report.add(
        f"from files to store, {network.backbone.name}, sizes of ROxford5k: {title}", rate, "images/s", note=note
    )


def _decoder(report: Report, photos: list[Path]) -> None:
    """Measure how fast nvJPEG decodes JPEG files on the GPU, and how much the pixels differ from the CPU decoder's."""
    report.require_gpu("nvJPEG")
    from torchvision.io import ImageReadMode, decode_jpeg

    files = [torch.frombuffer(bytearray(photo.read_bytes()), dtype=torch.uint8) for photo in photos[:64]]
    try:
        decoded = decode_jpeg(files, ImageReadMode.RGB, device=report.device)
    except RuntimeError as error:
        raise Skip(f"torchvision cannot decode on this GPU: {error}") from error
    seconds = report.seconds(lambda: decode_jpeg(files, ImageReadMode.RGB, device=report.device))
    report.add("decoding JPEGs on the GPU in batches of 64", len(files) / seconds, "images/s")
    pairs = [
        (image.cpu().numpy().astype(int), decode_image(f.numpy().tobytes()))
        for image, f in zip(decoded, files, strict=True)
    ]
    differences = [np.abs(on_gpu.transpose(1, 2, 0) - on_cpu) for on_gpu, on_cpu in pairs]
    mean, largest = np.mean([d.mean() for d in differences]), max(int(d.max()) for d in differences)
    report.add(
        "pixels of the GPU decoder: mean difference from the CPU decoder", mean, "of 255", note=f"largest {largest}"
    )
