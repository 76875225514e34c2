"""Provide sequences whose elements are created only when they are accessed, for lists of millions of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Generic, SupportsIndex, TypeVar, overload

import numpy as np

from superglobal.data.download_links import tree_path
from superglobal.data.images import ImageItem
from superglobal.errors import printable

T = TypeVar("T")


class LazySequence(Sequence[T], Generic[T]):
    """Sequence of the elements `make(0)`, ..., `make(count - 1)`. An element is created each time it is accessed.

    Slicing returns a list of elements.

    Args:
        count: number of elements.
        make: function that returns the element with a given index.
    """

    def __init__(self, count: int, make: Callable[[int], T]) -> None:
        self._indices = range(count)
        self._make = make

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: SupportsIndex) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> list[T]: ...

    def __getitem__(self, index: SupportsIndex | slice) -> T | list[T]:
        selected = self._indices[index]
        return self._make(selected) if isinstance(selected, int) else [self._make(i) for i in selected]


# The functions below pass `_tree_item`, `_chained_item` or `_file_name` to `LazySequence` instead of a lambda.
# Sequences are sent to worker processes by pickle, which supports only functions at the top level of a module.
def tree_items(root: Path, ids: np.ndarray) -> LazySequence[ImageItem]:
    """Return the GLDv2 images with the given `ids`, (N,) S16, in the order of `ids`.

    The path of an image is `<root>/a/b/c/<id>.jpg`, where a, b and c are the first three characters of its id.
    """
    return LazySequence(len(ids), partial(_tree_item, root, ids))


def chain_sequences(first: Sequence[T], second: Sequence[T]) -> Sequence[T]:
    """Return the concatenation of two sequences, without copying their elements."""
    return LazySequence(len(first) + len(second), partial(_chained_item, first, second)) if len(second) else first


def file_names(items: Sequence[ImageItem], root: Path) -> LazySequence[str]:
    """Return the path of each image relative to the folder `root`, with escape sequences for unprintable characters.

    For an image outside this folder, return its `path`.
    """
    return LazySequence(len(items), partial(_file_name, items, root))


def _tree_item(root: Path, ids: np.ndarray, index: int) -> ImageItem:
    """Return the GLDv2 image with the id `ids[index]`, which is stored as `<root>/a/b/c/<id>.jpg`."""
    return ImageItem(root / tree_path(ids[index]))


def _chained_item(first: Sequence[T], second: Sequence[T], index: int) -> T:
    """Return the element at position `index` of the sequence that consists of `first` followed by `second`."""
    return first[index] if index < len(first) else second[index - len(first)]


def _file_name(items: Sequence[ImageItem], root: Path, index: int) -> str:
    """Return the path of the image `items[index]` relative to the folder `root`.

    If the image is outside this folder, return its `path`. Unprintable characters are escaped.
    """
    path = items[index].path
    return printable(path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path))
