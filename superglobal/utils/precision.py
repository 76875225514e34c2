"""Select the precision of the backbone. Compute in strict float32 (TF32 disabled) where rankings must be exact."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Precision of `extraction.precision=auto` on CUDA devices. It should be the fastest precision that changes mAP by at
# most 0.05 points, and stays float32 until this has been measured on a GPU. To measure it, run scripts/gpu_report.py
# for the toy data set, or `eval.py -m extraction.precision=float32,bfloat16,float16` for your own images.
AUTO_ON_CUDA = "float32"


def resolve_precision(precision: str, accelerator: str) -> str:
    """Return the precision that "auto" stands for on an accelerator. Return any other precision unchanged.

    Args:
        precision: "auto" or a key of `PRECISIONS`.
        accelerator: Lightning accelerator, e.g. "auto", "gpu" or "cpu".
    """
    if precision != "auto":
        return precision
    cuda = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return AUTO_ON_CUDA if cuda else "float32"


@contextmanager
def full_precision() -> Iterator[None]:
    """Disable TF32 and reduced-precision accumulation during a `with` statement.

    Float32 products are then computed in full float32, and half-precision matrix products are accumulated in float32.
    The previous settings are restored at the end.
    """
    backends: Any = torch.backends  # torch's type stubs lack these attributes.
    matmul = backends.cuda.matmul
    modules = (matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
    settings: list[tuple[Any, str, Any]] = [(module, "fp32_precision", "ieee") for module in modules]
    settings += [(matmul, f"allow_{kind}_reduced_precision_reduction", False) for kind in ("fp16", "bf16")]
    before = [getattr(module, name) for module, name, _ in settings]
    try:
        for module, name, value in settings:
            setattr(module, name, value)
        yield
    finally:
        for (module, name, _), value in zip(settings, before, strict=True):
            setattr(module, name, value)
