"""Read pickle files of plain data without running code that they contain.

A pickle file can name any Python function. Only the names that lists, numbers, strings and NumPy arrays need are
allowed. NumPy's classes are replaced by classes of this module, because the `__setstate__` of NumPy trusts the item
size and the flags in the file: a malicious file could use them to forge object pointers.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np


class BlockedGlobalError(pickle.UnpicklingError):
    """Error for a pickle that names a function or class that is not allowed. The message is `module.name`."""


def load_plain_pickle(data: bytes) -> Any:
    """Unpickle containers, numbers, strings and NumPy arrays. Arrays are returned as (nested) lists.

    Pickles of Python 2 and of any version of NumPy are supported.

    Raises:
        BlockedGlobalError: the data contain anything else; no code was run.
        Exception: the data are damaged; the error can have any type.
    """
    return _PlainUnpickler(io.BytesIO(data), encoding="latin1").load()


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise BlockedGlobalError(f"{module}.{name}") from None


class _Dtype:
    """Replacement for numpy.dtype, with the type code and the byte order of numbers and strings."""

    def __init__(self, code: str, align: bool = False, copy: bool = True) -> None:
        self.code, self.big_endian = code, False

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.big_endian = state[1] == ">"

    def values(self, raw: bytes | str) -> np.ndarray:
        """Return the flat array in `raw`, which is a str in pickles of Python 2."""
        if not re.fullmatch(r"b1|[iu][1248]|f[248]|[SU][1-9]\d{0,4}", self.code):
            raise pickle.UnpicklingError(f"array of type {self.code!r}, expected numbers or strings")
        data = raw.encode("latin1") if isinstance(raw, str) else bytes(raw)
        return np.frombuffer(data, np.dtype((">" if self.big_endian else "<") + self.code))


class _Array(list):
    """Replacement for numpy.ndarray: a list that `__setstate__` fills with the (nested) values."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, raw = state
        # The elements of an object array are a list, which this unpickler has read already.
        self[:] = raw if isinstance(raw, list) else _from_buffer(raw, dtype, shape, "F" if fortran else "C")


def _reconstruct(cls: type, shape: tuple[int, ...], code: bytes) -> _Array:
    return _Array()


def _from_buffer(raw: bytes | str, dtype: _Dtype, shape: tuple[int, ...], order: str) -> list[Any]:
    values = dtype.values(raw)
    if len(shape) != 1 and math.prod(shape) != values.size:
        raise pickle.UnpicklingError(f"array of shape {shape} with {values.size} values, expected {math.prod(shape)}")
    return values.reshape(shape, order="F" if order == "F" else "C").tolist() if shape else [values[0].item()]


def _scalar(dtype: _Dtype, raw: bytes | str) -> Any:
    return dtype.values(raw)[0].item()


def _encode(text: str, encoding: str) -> bytes:
    """Replacement for _codecs.encode, which protocols 0-2 use for bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes encoded as {encoding!r}, expected latin1")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "xrange"): range,
}
for _core in ("numpy.core", "numpy._core"):
    _ALLOWED[f"{_core}.multiarray", "_reconstruct"] = _reconstruct
    _ALLOWED[f"{_core}.multiarray", "scalar"] = _scalar
    _ALLOWED[f"{_core}.numeric", "_frombuffer"] = _from_buffer
for _builtins in ("builtins", "__builtin__"):
    for _plain in (set, frozenset, range):
        _ALLOWED[_builtins, _plain.__name__] = _plain
