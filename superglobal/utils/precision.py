"""Precision of the backbone, and strict float32 (TF32 disabled) for what decides an order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What `extraction.precision=auto` means on CUDA devices: the fastest precision that changes mAP by at most 0.05 points.
# It stays float32 until that is measured on a GPU: scripts/gpu_report.py does so on the toy set, and
# `eval.py -m extraction.precision=float32,bfloat16,float16` on yours.
AUTO_ON_CUDA = "float32"


def resolve_precision(precision: str, accelerator: str) -> str:
    """Return the precision that "auto" stands for on the devices of a Lightning accelerator; any other as it is."""
    if precision != "auto":
        return precision
    cuda = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return AUTO_ON_CUDA if cuda else "float32"


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute in strict float32 (TF32 disabled), and half-precision matrix products with float32 sums.

    The settings from before are restored at the end.
    """
    backends: Any = torch.backends  # The type stubs lack these attributes.
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
