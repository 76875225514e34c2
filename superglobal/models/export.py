"""A network as one file that needs none of this package: ONNX or torch.export, from image to descriptor.

Input: `images` (B, 3, H, W) float32 RGB in 0..1; normalisation and all scales are inside. Output: `descriptors` (B, D)
float32, unit norm. A file is compared with the network before it is left, and says what it takes in its metadata.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from torch import Tensor, nn

from superglobal.errors import InputError, first_line
from superglobal.models.backbone import replace_module
from superglobal.models.network import RetrievalNetwork
from superglobal.utils.precision import full_precision

SUFFIXES = (".onnx", ".pt2")
METADATA = "superglobal"
"""Key of an ONNX file's metadata, and with `.json` behind it the extra file of a .pt2: JSON."""
_MAX_SIDE, _MAX_BATCH = 4096, 1024
_INPUT = "images: (B, 3, H, W) float32 RGB in 0..1; normalisation and all scales are inside"
_OUTPUT = "descriptors: (B, D) float32, unit L2 norm, compared by inner product"
_EXTRA = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Sizes:
    """What a file takes: H x W px and `batch` images, or with None any."""

    size: tuple[int, int] | None
    batch: int | None
    least: int  # of a side
    most: int
    step: int  # sides are multiples of it

    def shapes(self) -> list[tuple[int, int, int]]:
        """(B, H, W) to compare at, the first one that is traced: with free sizes the least and the longest side too."""
        several = self.batch or 3
        if self.size is not None:
            return [(several, *self.size)] + ([] if self.batch else [(1, *self.size)])
        least, step = self.least, self.step
        sides = [(least + 3 * step, least + 8 * step), (least, least)]
        sides += [(2 * least // step * step + step, least + 5 * step), (least, self.most)]
        return [(self.batch or (several, 1, 2, 1)[i], *pair) for i, pair in enumerate(sides)]

    def dynamic(self) -> dict[int, Any]:
        """Dimension of the input -> what it may be, in torch.export's terms."""
        found: dict[int, Any] = {} if self.batch else {0: torch.export.Dim("batch", min=1, max=_MAX_BATCH)}
        for place, name in () if self.size else ((2, "height"), (3, "width")):
            many = torch.export.Dim(name, min=self.least // self.step, max=self.most // self.step)
            found[place] = many if self.step == 1 else self.step * many
        return found


@dataclass(frozen=True)
class Comparison:
    """File against network on images of one shape."""

    shape: tuple[int, int, int]  # B, H, W
    cosine: float  # least of the batch
    difference: float  # largest of a component


def export_network(
    network: RetrievalNetwork,
    path: Path,
    size: tuple[int, int] | None = None,
    batch: int | None = None,
    tolerance: float = 1e-4,
) -> list[Comparison]:
    """Write `network` to `path` as ONNX (.onnx) or torch.export (.pt2), if the file computes the same.

    Args:
        network: on the CPU, in evaluation mode.
        path: of the file.
        size: H and W in pixels; None for all sizes from the network's smallest side to 4096 px.
        batch: images at once; None for any number.
        tolerance: most that a component of a descriptor may differ.

    Returns:
        What was compared.

    Raises:
        InputError: another suffix, a missing package, what a graph cannot express, or a difference above `tolerance`,
            with the mend; what was at `path` is then untouched.
    """
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: expected a name that ends with {' or '.join(SUFFIXES)}")
    missing = [name for name in _EXTRA if importlib.util.find_spec(name) is None] if path.suffix == ".onnx" else []
    if missing:
        raise InputError(f"{path}: ONNX needs packages: pip install {' '.join(missing)}, or give a .pt2 name")
    sizes = _sizes(network, size, batch)
    graph = _Graph(network, sizes).eval()
    write = _write_onnx if path.suffix == ".onnx" else _write_pt2
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            draft = Path(folder) / path.name
            with _quiet(), torch.no_grad():
                run = write(_program(graph, sizes), sizes, draft, _about(network, sizes))
                compared = [_compare(network, run, shape) for shape in sizes.shapes()]
            for one in compared:
                if not one.difference <= tolerance:
                    raise InputError(
                        f"{path}: not written: at {' x '.join(map(str, one.shape))} its descriptors differ by "
                        f"{one.difference:.1e} (least cosine {one.cosine:.7f}), more than {tolerance:g}"
                    )
            os.replace(draft, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); choose another place") from error
    return compared


class _Graph(nn.Module):
    """`RetrievalNetwork.forward` in operations that a graph of free sizes can hold."""

    def __init__(self, network: RetrievalNetwork, sizes: Sizes) -> None:
        super().__init__()
        self.network = _traceable(network)
        self.factors = [_factor(scale, sizes) for scale in network.scales]

    def forward(self, images: Tensor) -> Tensor:
        x = self.network.normalize(images)
        return self.network.descriptors(self.network.backbone(self._scaled(x, factor)) for factor in self.factors)

    def _scaled(self, x: Tensor, factor: Fraction) -> Tensor:
        if factor == 1:
            return x
        # In whole numbers: ONNX would multiply in float32, and be a pixel off at some sizes of some scales.
        height, width = (side * factor.numerator // factor.denominator for side in x.shape[-2:])
        antialias = self.network.antialias
        return F.interpolate(x, (height, width), mode="bilinear", align_corners=False, antialias=antialias)


class _WholePadding(nn.Module):
    """TensorFlow's "same" padding in whole numbers: timm rounds floats, which a graph of free sizes cannot say."""

    def __init__(self, convolution: Conv2dSame) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, x: Tensor) -> Tensor:
        c: Any = self.convolution
        pads: list[Any] = []
        for side, kernel, stride, dilation in zip(x.shape[-2:], c.kernel_size, c.stride, c.dilation, strict=True):
            needed = (kernel - 1) * dilation + 1 - stride + (side + stride - 1) // stride * stride - side
            pads = [needed // 2, needed - needed // 2, *pads]
        return F.conv2d(F.pad(x, pads), c.weight, c.bias, c.stride, 0, c.dilation, c.groups)


def _traceable(network: RetrievalNetwork) -> RetrievalNetwork:
    """A copy without what no graph holds."""
    if network.config.opencv_resize and network.scales != (1.0,):
        raise InputError(
            "export: pooling.opencv_resize makes the scales by OpenCV, outside of any graph; export at one scale "
            "(--scales 1), or with another pooling"
        )
    backbone = copy.deepcopy(network.backbone)
    for name, module in list(backbone.net.named_modules()):
        # Where a stride leaves pixels out, the padding would have to be cut at 0.
        if isinstance(module, Conv2dSame) and all(
            k >= s for k, s in zip(module.kernel_size, module.stride, strict=True)
        ):
            replace_module(backbone.net, name, _WholePadding(module))
    return network.with_backbone(backbone, replace(network.config, opencv_resize=False)).eval()


def _factor(scale: float, sizes: Sizes) -> Fraction:
    """A fraction of which every side that can come makes what the network makes of it."""
    factor = Fraction(str(scale))
    sides = sizes.size or range(sizes.least, sizes.most + 1)
    if any(int(side * scale) != side * factor.numerator // factor.denominator for side in sides):
        raise InputError(
            f"export: at scale {scale} the network rounds exact sides now up and now down, as floats come out, which a "
            f"graph does not; take one like {scale + 0.0001:.4f}, or give --size H W"
        )
    return factor


def _sizes(network: RetrievalNetwork, size: tuple[int, int] | None, batch: int | None) -> Sizes:
    least = network.min_side()
    if batch is not None and batch < 1:
        raise InputError(f"export: batch={batch}: expected at least 1")
    if size is not None:
        if min(size) < least:
            raise InputError(
                f"export: size {size[0]} x {size[1]}: this network enlarges images to a side of {least} px, which "
                "is no part of the graph; give at least that, and enlarge smaller images beforehand"
            )
        return Sizes(size, batch, min(size), max(size), 1)
    # A dimension of 1 is another graph: free sizes begin with maps of three cells, whatever the pooling.
    least = max(least, math.ceil(network.backbone.min_side(3) / min(network.scales)))
    step = network.backbone.multiple
    if step > 1 and network.scales != (1.0,):
        raise InputError(
            f"export: {network.backbone.name} pads images to multiples of {step} px, which a graph of free sizes can "
            "leave to its user at one scale, but not at several; give --size H W, or --scales 1"
        )
    return Sizes(None, batch, -(-least // step) * step, _MAX_SIDE // step * step, step)


def _about(network: RetrievalNetwork, sizes: Sizes) -> str:
    pooling = {k: str(v) if v == float("inf") else v for k, v in vars(network.config).items()}
    free = f"{sizes.least} to {sizes.most} px" + (f", multiples of {sizes.step}" if sizes.step > 1 else "")
    about = {
        "input": _INPUT,
        "output": _OUTPUT,
        "batch": sizes.batch or "any",
        "height, width": list(sizes.size) if sizes.size else f"{free}; enlarge smaller images to that beforehand",
        "network": {**network.identity(), "pooling": pooling, "precision": "float32"},
    }
    return json.dumps(about)


def _program(graph: nn.Module, sizes: Sizes) -> Any:
    batch, height, width = sizes.shapes()[0]
    try:
        return torch.export.export(
            graph,
            (torch.rand(batch, 3, height, width),),
            dynamic_shapes={"images": sizes.dynamic() or None},
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
    except Exception as error:  # tracing raises whatever the traced code raises
        mend = "give --size H W" if sizes.size is None else "another backbone does"
        raise InputError(f"export: torch.export cannot express this network ({first_line(error)}); {mend}") from error


def _write_onnx(program: Any, sizes: Sizes, path: Path, about: str) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    try:
        onnx = torch.onnx.export(
            program, dynamo=True, verbose=False, input_names=["images"], output_names=["descriptors"]
        )
        assert onnx is not None
        _name_dimensions(onnx.model.graph, sizes)
        onnx.model.metadata_props.update({METADATA: about, "input": _INPUT, "output": _OUTPUT})
        onnx.save(path, external_data=False)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # torch, onnxscript and onnxruntime share no base class
        raise InputError(
            f"{path.name}: ONNX cannot express this network ({first_line(error)}); give a .pt2 name"
        ) from error
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _name_dimensions(graph: Any, sizes: Sizes) -> None:
    """Names in place of the tracer's symbols, for whoever looks into the file."""
    inputs, outputs = graph.inputs[0].shape, graph.outputs[0].shape
    for place, name in ((0, "batch"), (2, "height"), (3, "width")):
        if place in sizes.dynamic():
            inputs[place] = name
    if sizes.batch is None:
        outputs[0] = "batch"


def _write_pt2(program: Any, sizes: Sizes, path: Path, about: str) -> Callable[[Tensor], Tensor]:
    torch.export.save(program, path, extra_files={f"{METADATA}.json": about})
    return torch.export.load(path).module()


def _compare(network: RetrievalNetwork, run: Callable[[Tensor], Tensor], shape: tuple[int, int, int]) -> Comparison:
    batch, height, width = shape
    generator = torch.Generator().manual_seed(height * width)
    coarse, fine = (torch.rand(batch, 3, *size, generator=generator) for size in ((8, 8), (height, width)))
    images = 0.7 * F.interpolate(coarse, (height, width), mode="bilinear") + 0.3 * fine
    given = (images * 255).round().to(torch.uint8) if network.config.opencv_resize else images
    images = given / 255 if network.config.opencv_resize else images
    with full_precision():
        wanted = network(given).double()
    found = run(images).double()
    if found.shape != wanted.shape:
        return Comparison(shape, float("nan"), float("nan"))
    return Comparison(shape, float(F.cosine_similarity(wanted, found).min()), float((wanted - found).abs().max()))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' news, which concern their authors."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.__trace", "torch.fx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def read_metadata(path: Path) -> Mapping[str, Any]:
    """What a file says of itself: input, output, sizes, network."""
    if path.suffix == ".pt2":
        extra = {f"{METADATA}.json": ""}
        torch.export.load(path, extra_files=extra)
        return json.loads(extra[f"{METADATA}.json"])
    import onnx

    model = onnx.load(path, load_external_data=False)
    return json.loads({entry.key: entry.value for entry in model.metadata_props}[METADATA])
