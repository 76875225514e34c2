"""Export of a network to a single ONNX or torch.export file, which can be used without this package.

The input of the exported graph is `images` (B, 3, H, W) float32 RGB in 0..1, and its output is `descriptors` (B, D)
float32, unit norm. The graph includes the normalization of the images and all scales. Its descriptors are compared with
those of the network before the file is written to its path. The metadata of the file list the supported input sizes.
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
from superglobal.models.weights import pooling_to_json
from superglobal.utils.io import write_error
from superglobal.utils.precision import full_precision

SUFFIXES = (".onnx", ".pt2")
METADATA = "superglobal"
"""Key of the JSON metadata in an ONNX file. In a .pt2 file, the metadata are in the extra file `superglobal.json`."""
_MAX_SIDE, _MAX_BATCH = 4096, 1024
_INPUT = "images: (B, 3, H, W) float32 RGB in 0..1; normalization and all scales are inside"
_OUTPUT = "descriptors: (B, D) float32, unit L2 norm, compared by inner product"
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class InputSizes:
    """Input sizes that an exported file accepts.

    Attributes:
        size: fixed image size (H, W) in pixels; None if both sides may be any multiples of `multiple` from `min_side`
            to `max_side`.
        batch: fixed number of images; None for any number.
        min_side, max_side, multiple: if `size` is None, the smallest and the largest side, and the number that divides
            every side, in pixels.
    """

    size: tuple[int, int] | None
    batch: int | None
    min_side: int
    max_side: int
    multiple: int

    def comparison_shapes(self) -> list[tuple[int, int, int]]:
        """Return the input shapes (B, H, W) at which the file is compared with the network.

        If the size is not fixed, the shapes include the smallest and the largest side. The first shape is also used for
        tracing.
        """
        batch = self.batch or 3
        if self.size is not None:
            return [(batch, *self.size)] + ([] if self.batch else [(1, *self.size)])
        side, step = self.min_side, self.multiple
        sizes = [(side + 3 * step, side + 8 * step), (side, side)]
        sizes += [(2 * side // step * step + step, side + 5 * step), (side, self.max_side)]
        return [(self.batch or (batch, 1, 2, 1)[i], *size) for i, size in enumerate(sizes)]

    def dynamic_dims(self) -> dict[int, Any]:
        """Return the free dimensions of the input for torch.export, a dict from axis to `torch.export.Dim`."""
        dims: dict[int, Any] = {} if self.batch else {0: torch.export.Dim("batch", min=1, max=_MAX_BATCH)}
        for index, name in () if self.size else ((2, "height"), (3, "width")):
            dim = torch.export.Dim(name, min=self.min_side // self.multiple, max=self.max_side // self.multiple)
            dims[index] = dim if self.multiple == 1 else self.multiple * dim
        return dims


@dataclass(frozen=True)
class Comparison:
    """Comparison of the descriptors of an exported file and of the network, on images of one shape.

    Attributes:
        shape: number, height and width (B, H, W) of the images.
        min_cosine: smallest cosine, over the images, between the two descriptors of an image.
        max_difference: largest absolute difference, over the images, between a component of the two descriptors.
    """

    shape: tuple[int, int, int]
    min_cosine: float
    max_difference: float


def export_network(
    network: RetrievalNetwork,
    path: Path,
    size: tuple[int, int] | None = None,
    batch: int | None = None,
    tolerance: float = 1e-4,
) -> list[Comparison]:
    """Export a network to an ONNX (.onnx) or torch.export (.pt2) file, and verify that it gives the same descriptors.

    Args:
        network: network on the CPU, in evaluation mode.
        path: file to write; the suffix determines the format.
        size: fixed image size (H, W) in pixels; None for all sizes from the network's smallest side to 4096 px.
        batch: fixed number of images; None for any number.
        tolerance: largest allowed difference between corresponding components of the descriptors.

    Returns:
        One comparison per tested shape.

    Raises:
        InputError: the suffix is unknown, a package is missing, the format does not support an operation, or a
            difference exceeds `tolerance`. An existing file at `path` then stays unchanged.
    """
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: expected a name that ends with {' or '.join(SUFFIXES)}")
    onnx = path.suffix == ".onnx"
    missing = [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None] if onnx else []
    if missing:
        raise InputError(
            f"{path}: packages for ONNX are not installed: pip install {' '.join(missing)}, or give a .pt2 name"
        )
    sizes = _input_sizes(network, size, batch)
    graph = _Graph(network, sizes).eval()
    write = _write_onnx if onnx else _write_pt2
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            temporary = Path(folder) / path.name
            with _silence_exporters(), torch.no_grad():
                run = write(_trace(graph, sizes), sizes, temporary, _metadata(network, sizes))
                comparisons = [_compare(network, run, shape) for shape in sizes.comparison_shapes()]
            for c in comparisons:
                if not c.max_difference <= tolerance:
                    raise InputError(
                        f"{path}: not written: at {' x '.join(map(str, c.shape))} descriptors differ by up to "
                        f"{c.max_difference:.1e} (smallest cosine {c.min_cosine:.7f}), more than {tolerance:g}"
                    )
            os.replace(temporary, path)
    except OSError as error:
        raise write_error(path, error) from error
    return comparisons


class _Graph(nn.Module):
    """Module that computes the same as `RetrievalNetwork.forward`, with operations that torch.export can trace.

    torch.export cannot trace some operations of `RetrievalNetwork.forward` if the image size is free.
    """

    def __init__(self, network: RetrievalNetwork, sizes: InputSizes) -> None:
        super().__init__()
        self.network = _traceable(network)
        self.factors = [_fraction(scale, sizes) for scale in network.scales]

    def forward(self, images: Tensor) -> Tensor:
        x = self.network.normalize(images)
        return self.network.descriptors(self.network.backbone(self._resize(x, factor)) for factor in self.factors)

    def _resize(self, x: Tensor, factor: Fraction) -> Tensor:
        """Resize standardized images (B, 3, H, W) by a scale factor."""
        if factor == 1:
            return x
        # The new sides are computed in integers, which is exact. ONNX would multiply in float32, and for some sizes and
        # scales, the new side would then differ by a pixel.
        height, width = (side * factor.numerator // factor.denominator for side in x.shape[-2:])
        antialias = self.network.antialias
        return F.interpolate(x, (height, width), mode="bilinear", align_corners=False, antialias=antialias)


class _IntegerSamePadding(nn.Module):
    """Convolution with TensorFlow's "same" padding, computed in integers.

    It replaces timm's `Conv2dSame`, whose floating-point rounding is not supported by graphs with free sizes.
    """

    def __init__(self, convolution: Conv2dSame) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, x: Tensor) -> Tensor:
        c: Any = self.convolution
        pads: list[Any] = []
        for side, kernel, stride, dilation in zip(x.shape[-2:], c.kernel_size, c.stride, c.dilation, strict=True):
            padding = (kernel - 1) * dilation + 1 - stride + (side + stride - 1) // stride * stride - side
            pads = [padding // 2, padding - padding // 2, *pads]
        return F.conv2d(F.pad(x, pads), c.weight, c.bias, c.stride, 0, c.dilation, c.groups)


def _traceable(network: RetrievalNetwork) -> RetrievalNetwork:
    """Copy a network, and replace operations that torch.export cannot trace by equivalent operations.

    Raises:
        InputError: the network resizes images with OpenCV, for which there is no equivalent operation.
    """
    if network.config.opencv_resize and network.scales != (1.0,):
        raise InputError(
            "export: pooling.opencv_resize resizes with OpenCV, which an exported graph cannot do; export at one scale "
            "(--scales 1), or without pooling.opencv_resize"
        )
    backbone = copy.deepcopy(network.backbone)
    for name, module in list(backbone.net.named_modules()):
        # If the stride is larger than the kernel, the padding could be negative, so such a layer is not replaced.
        if isinstance(module, Conv2dSame) and all(
            k >= s for k, s in zip(module.kernel_size, module.stride, strict=True)
        ):
            replace_module(backbone.net, name, _IntegerSamePadding(module))
    return network.with_backbone(backbone, replace(network.config, opencv_resize=False)).eval()


def _fraction(scale: float, sizes: InputSizes) -> Fraction:
    """Convert a scale to a fraction, so that the graph can compute the sizes of resized images in integers.

    Raises:
        InputError: for some supported image size, the fraction gives another size than the network's floating-point
            computation.
    """
    factor = Fraction(str(scale))
    sides = sizes.size or range(sizes.min_side, sizes.max_side + 1)
    if any(int(side * scale) != side * factor.numerator // factor.denominator for side in sides):
        raise InputError(
            f"export: scale {scale}: the network's floating-point rounding of some sides cannot be reproduced in a "
            f"graph; use a scale such as {scale + 0.0001:.4f}, or give --size H W"
        )
    return factor


def _input_sizes(network: RetrievalNetwork, size: tuple[int, int] | None, batch: int | None) -> InputSizes:
    """Return the input sizes that the file will support. Raises InputError if the network does not support them."""
    min_side = network.min_side()
    if batch is not None and batch < 1:
        raise InputError(f"export: batch={batch}: expected an integer >= 1")
    if size is not None:
        if min(size) < min_side:
            raise InputError(
                f"export: size {size[0]} x {size[1]}: expected sides of at least {min_side} px, because the graph does "
                "not enlarge small images; enlarge them before you pass them to the graph"
            )
        return InputSizes(size, batch, min(size), max(size), 1)
    # torch.export treats a dimension of size 1 as constant, so a graph with free sizes needs feature maps larger than
    # 1 x 1 cell. The minimum is set to 3 x 3 cells at the smallest scale, which Regional-GeM needs, too.
    min_side = max(min_side, math.ceil(network.backbone.min_side(3) / min(network.scales)))
    multiple = network.backbone.multiple
    if multiple > 1 and network.scales != (1.0,):
        raise InputError(
            f"export: {network.backbone.name} pads images to multiples of {multiple} px, which a graph with free sizes "
            "does not support at several scales; give --size H W, or --scales 1"
        )
    return InputSizes(None, batch, -(-min_side // multiple) * multiple, _MAX_SIDE // multiple * multiple, multiple)


def _metadata(network: RetrievalNetwork, sizes: InputSizes) -> str:
    """Return JSON text that describes the input, output, input sizes and network of an exported file."""
    sides = f"{sizes.min_side} to {sizes.max_side} px"
    sides += f", multiples of {sizes.multiple}" if sizes.multiple > 1 else ""
    metadata = {
        "input": _INPUT,
        "output": _OUTPUT,
        "batch": sizes.batch or "any",
        "height, width": list(sizes.size) if sizes.size else f"{sides}; enlarge smaller images first",
        "network": {**network.identity(), "pooling": pooling_to_json(vars(network.config)), "precision": "float32"},
    }
    return json.dumps(metadata)


def _trace(graph: nn.Module, sizes: InputSizes) -> Any:
    """Trace the graph with `torch.export`, and return the `torch.export.ExportedProgram`.

    The batch size, height and width of the input stay variable if `sizes` does not fix them.

    Raises:
        InputError: torch.export does not support an operation of the network.
    """
    batch, height, width = sizes.comparison_shapes()[0]
    try:
        return torch.export.export(
            graph,
            (torch.rand(batch, 3, height, width),),
            dynamic_shapes={"images": sizes.dynamic_dims() or None},
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
    except Exception as error:  # the traced code can raise any exception
        hint = "give --size H W" if sizes.size is None else "use another backbone"
        raise InputError(f"export: torch.export does not support this network ({first_line(error)}); {hint}") from error


def _write_onnx(program: Any, sizes: InputSizes, path: Path, metadata: str) -> Callable[[Tensor], Tensor]:
    """Write the traced program as an ONNX file, and return a function that runs the file with ONNX Runtime.

    Args:
        program: traced program from `_trace`.
        sizes: input sizes that the file supports.
        path: file to write.
        metadata: JSON text that is stored in the file.

    Returns:
        Function from images (B, 3, H, W) float32 in 0..1 to descriptors (B, D) float32.
    """
    import onnxruntime

    try:
        onnx = torch.onnx.export(
            program, dynamo=True, verbose=False, input_names=["images"], output_names=["descriptors"]
        )
        assert onnx is not None
        _name_dimensions(onnx.model.graph, sizes)
        onnx.model.metadata_props.update({METADATA: metadata, "input": _INPUT, "output": _OUTPUT})
        onnx.save(path, external_data=False)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # errors of torch, onnxscript and onnxruntime have no common base class
        raise InputError(
            f"{path.name}: ONNX does not support this network ({first_line(error)}); give a .pt2 name"
        ) from error
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _name_dimensions(graph: Any, sizes: InputSizes) -> None:
    """Rename the free dimensions of an ONNX graph to "batch", "height" and "width", instead of the tracer's symbols."""
    inputs, outputs = graph.inputs[0].shape, graph.outputs[0].shape
    for index, name in ((0, "batch"), (2, "height"), (3, "width")):
        if index in sizes.dynamic_dims():
            inputs[index] = name
    if sizes.batch is None:
        outputs[0] = "batch"


def _write_pt2(program: Any, sizes: InputSizes, path: Path, metadata: str) -> Callable[[Tensor], Tensor]:
    """Write the traced program as a torch.export (.pt2) file, and return a function that runs the file with PyTorch.

    Args:
        program: traced program from `_trace`.
        sizes: input sizes that the file supports.
        path: file to write.
        metadata: JSON text that is stored in the file.

    Returns:
        Function from images (B, 3, H, W) float32 in 0..1 to descriptors (B, D) float32.
    """
    torch.export.save(program, path, extra_files={f"{METADATA}.json": metadata})
    return torch.export.load(path).module()


def _compare(network: RetrievalNetwork, run: Callable[[Tensor], Tensor], shape: tuple[int, int, int]) -> Comparison:
    """Compute descriptors of random images with the network and with the exported file, and compare them.

    Args:
        network: exported network.
        run: function that computes descriptors (B, D) of images (B, 3, H, W) with the exported file.
        shape: number, height and width (B, H, W) of the images.
    """
    batch, height, width = shape
    generator = torch.Generator().manual_seed(height * width)
    coarse, fine = (torch.rand(batch, 3, *size, generator=generator) for size in ((8, 8), (height, width)))
    images = 0.7 * F.interpolate(coarse, (height, width), mode="bilinear") + 0.3 * fine
    network_input = images
    if network.config.opencv_resize:  # this setting requires uint8 images
        network_input = (images * 255).round().to(torch.uint8)
        images = network_input / 255
    with full_precision():
        expected = network(network_input).double()
    actual = run(images).double()
    if actual.shape != expected.shape:
        return Comparison(shape, math.nan, math.nan)
    cosines = F.cosine_similarity(expected, actual)
    return Comparison(shape, float(cosines.min()), float((expected - actual).abs().max()))


@contextmanager
def _silence_exporters() -> Iterator[None]:
    """Silence the export libraries inside a `with` statement.

    Python warnings are hidden. Log messages of the libraries are shown only if they have the level ERROR or higher. At
    the end of the `with` statement, the previous log levels are restored.
    """
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
    """Read the metadata of an exported file, a dict that describes its input, output, image sizes and network."""
    if path.suffix == ".pt2":
        extra = {f"{METADATA}.json": ""}
        torch.export.load(path, extra_files=extra)
        return json.loads(extra[f"{METADATA}.json"])
    import onnx

    model = onnx.load(path, load_external_data=False)
    return json.loads({entry.key: entry.value for entry in model.metadata_props}[METADATA])
