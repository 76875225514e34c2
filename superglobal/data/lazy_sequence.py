"""Provide sequences whose elements are created only when they are accessed, for lists of millions of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Generic, SupportsIndex, TypeVar, overload

import numpy as np

from superglobal.data.download_links import tree_path
from superglobal.data.images import ImageItem

T = TypeVar("T")


class LazySequence(Sequence[T], Generic[T]):
    """The sequence `make(0)`, ..., `make(count - 1)`, whose elements are created when they are accessed.

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


# The functions that create the elements (below) are module-level functions, so that worker processes can unpickle them.
def tree_items(root: Path, ids: np.ndarray) -> LazySequence[ImageItem]:
    """Return the images `<root>/a/b/c/<id>.jpg` with the given GLDv2 ids, (N,) S16, in this order."""
    return LazySequence(len(ids), partial(_tree_item, root, ids))


def chain_sequences(first: Sequence[T], second: Sequence[T]) -> Sequence[T]:
    """Return the concatenation of two sequences, without copying their elements."""
    return LazySequence(len(first) + len(second), partial(_chained_item, first, second)) if len(second) else first


def file_names(items: Sequence[ImageItem], root: Path) -> LazySequence[str]:
    """Return the path of each image relative to `root`. An image that is not inside `root` keeps its full path."""
    return LazySequence(len(items), partial(_file_name, items, root))


def _tree_item(root: Path, ids: np.ndarray, index: int) -> ImageItem:
    """Return element `index` of `tree_items`."""
    return ImageItem(root / tree_path(ids[index]))


def _chained_item(first: Sequence[T], second: Sequence[T], index: int) -> T:
    """Return element `index` of the concatenation of two sequences."""
    return first[index] if index < len(first) else second[index - len(first)]


def _file_name(items: Sequence[ImageItem], root: Path, index: int) -> str:
    """Return element `index` of `file_names`."""
    path = items[index].path
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
