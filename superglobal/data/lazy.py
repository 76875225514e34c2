"""Sequences whose elements are made when they are asked for: a million photos cost the 16 bytes of their ids each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Generic, SupportsIndex, TypeVar, overload

import numpy as np

from superglobal.data.images import ImageItem
from superglobal.data.sources import relative_path

T = TypeVar("T")


class Lazy(Sequence[T], Generic[T]):
    """`make(0)`, ..., `make(count - 1)`; a slice is a list. Goes to other processes if `make` does."""

    def __init__(self, count: int, make: Callable[[int], T]) -> None:
        self._places = range(count)
        self._make = make

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, place: SupportsIndex) -> T: ...

    @overload
    def __getitem__(self, place: slice) -> list[T]: ...

    def __getitem__(self, place: SupportsIndex | slice) -> T | list[T]:
        chosen = self._places[place]
        return self._make(chosen) if isinstance(chosen, int) else [self._make(i) for i in chosen]


def tree_items(root: Path, ids: np.ndarray) -> Lazy[ImageItem]:
    """The photos `<root>/a/b/c/<id>.jpg` of (N,) S16 ids."""
    return Lazy(len(ids), partial(_tree_item, root, ids))


def chained(first: Sequence[T], second: Sequence[T]) -> Sequence[T]:
    """One sequence behind the other, neither copied."""
    return Lazy(len(first) + len(second), partial(_either, first, second)) if len(second) else first


def file_names(items: Sequence[ImageItem], root: Path) -> Lazy[str]:
    """Each image's path below `root`, or the whole path of one that lies elsewhere."""
    return Lazy(len(items), partial(_file_name, items, root))


def _tree_item(root: Path, ids: np.ndarray, place: int) -> ImageItem:
    return ImageItem(root / relative_path(ids[place]))


def _either(first: Sequence[T], second: Sequence[T], place: int) -> T:
    return first[place] if place < len(first) else second[place - len(first)]


def _file_name(items: Sequence[ImageItem], root: Path, place: int) -> str:
    path = items[place].path
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
