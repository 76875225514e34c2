"""Float32 that is float32: what decides an order is never computed in TF32 or bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Within it, matrix products and convolutions run in true float32, whatever was set before; restored after."""
    library: Any = torch.backends  # its typing lacks these
    backends = (
        library.cuda.matmul,
        library.cudnn.conv,
        library.mkldnn.matmul,
        library.mkldnn.conv,
    )
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value
