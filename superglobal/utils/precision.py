"""Strict float32: what decides an order is never computed in TF32 or bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute matrix products and convolutions in strict float32 (TF32 disabled), and half-precision ones with float32
    sums, whatever was set before; restore that afterwards.
    """
    library: Any = torch.backends  # its typing lacks these
    matmul = library.cuda.matmul
    wanted: list[tuple[Any, str, Any]] = [(one, "fp32_precision", "ieee") for one in (matmul, library.cudnn.conv)]
    wanted += [(one, "fp32_precision", "ieee") for one in (library.mkldnn.matmul, library.mkldnn.conv)]
    wanted += [(matmul, f"allow_{kind}_reduced_precision_reduction", False) for kind in ("fp16", "bf16")]
    before = [getattr(one, name) for one, name, _ in wanted]
    try:
        for one, name, value in wanted:
            setattr(one, name, value)
        yield
    finally:
        for (one, name, _), value in zip(wanted, before, strict=True):
            setattr(one, name, value)
