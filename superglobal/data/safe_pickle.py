"""Load pickle files of plain data without running code that they may contain.

A pickle file can name any Python function, which is called when the file is loaded. Here, only those functions and
classes are allowed that are needed for lists, numbers, strings and NumPy arrays. NumPy's classes are replaced by the
classes of this module, because the `__setstate__` methods of NumPy trust the item size and the flags in the file, and a
malicious file could use them to forge object pointers.
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
    """Error for a pickle file that names a function or class that is not allowed. The message is `module.name`."""


def load_plain_pickle(data: bytes) -> Any:
    """Unpickle data that consists only of containers, numbers, strings and NumPy arrays.

    Files written by Python 2 and by any version of NumPy are supported.

    Args:
        data: contents of the pickle file.

    Returns:
        The unpickled object. NumPy arrays are converted to nested lists.

    Raises:
        BlockedGlobalError: the data names a function or class that is not needed for these types. No code was run.
        Exception: the data is damaged. The error can have any type.
    """
    return _PlainUnpickler(io.BytesIO(data), encoding="latin1").load()


class _PlainUnpickler(pickle.Unpickler):
    """Unpickler that raises an error if the file names a function or class that is not in `_ALLOWED`."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise BlockedGlobalError(f"{module}.{name}") from None


class _Dtype:
    """Replacement for numpy.dtype. It stores the type code and the byte order of arrays of numbers or strings."""

    def __init__(self, code: str, align: bool = False, copy: bool = True) -> None:
        self.code, self.big_endian = code, False

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.big_endian = state[1] == ">"

    def values(self, raw: bytes | str) -> np.ndarray:
        """Convert the raw bytes of an array to a one-dimensional array of values.

        `raw` is a str, one character per byte, if Python 2 wrote the file.
        """
        if not re.fullmatch(r"b1|[iu][1248]|f[248]|[SU][1-9]\d{0,4}", self.code):
            raise pickle.UnpicklingError(f"array of type {self.code!r}, expected numbers or strings")
        data = raw.encode("latin1") if isinstance(raw, str) else bytes(raw)
        return np.frombuffer(data, np.dtype((">" if self.big_endian else "<") + self.code))


class _Array(list):
    """Replacement for numpy.ndarray: a list. `__setstate__` fills it with the values of the array as nested lists."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, raw = state
        # The raw data of an object array is the list of its elements, which this unpickler has already created.
        self[:] = raw if isinstance(raw, list) else _from_buffer(raw, dtype, shape, "F" if fortran else "C")


def _reconstruct(cls: type, shape: tuple[int, ...], code: bytes) -> _Array:
    """Replacement for NumPy's `_reconstruct`: return an empty `_Array`, which `__setstate__` fills afterwards."""
    return _Array()


def _from_buffer(raw: bytes | str, dtype: _Dtype, shape: tuple[int, ...], order: str) -> list[Any]:
    """Replacement for NumPy's `_frombuffer`: convert the raw bytes of an array to nested lists of values.

    Args:
        raw: bytes of the array; a str, one character per byte, if Python 2 wrote the file.
        dtype: type of the values.
        shape: shape of the array.
        order: "C" if the values are stored row by row, "F" if column by column.
    """
    values = dtype.values(raw)
    if not values.size:
        return []  # The lists of an empty array can need any amount of memory, as in the shape (10**9, 0).
    if len(shape) != 1 and math.prod(shape) != values.size:
        raise pickle.UnpicklingError(f"array of shape {shape} with {values.size} values, expected {math.prod(shape)}")
    return values.reshape(shape, order="F" if order == "F" else "C").tolist() if shape else [values[0].item()]


def _scalar(dtype: _Dtype, raw: bytes | str) -> Any:
    """Replacement for NumPy's `scalar`: convert the raw bytes of one value to a number or a string."""
    return dtype.values(raw)[0].item()


def _set(elements: list[Any] | tuple[Any, ...] = ()) -> set[Any]:
    """Replacement for `set` and `frozenset`, which would turn a range into a set of any size."""
    if not isinstance(elements, list | tuple):
        raise pickle.UnpicklingError(f"set of a {type(elements).__name__}, expected a list of elements")
    return set(elements)


def _encode(text: str, encoding: str) -> bytes:
    """Replacement for `_codecs.encode`. Pickle files of protocols 0 to 2 call this function to create bytes objects."""
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
    _ALLOWED[_builtins, "set"], _ALLOWED[_builtins, "frozenset"], _ALLOWED[_builtins, "range"] = _set, _set, range
