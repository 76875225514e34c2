"""Which images are described together: those of exactly the same size, so that nothing is padded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

_DEALT = 32  # at most so many images of neighbouring size go to one process together

Size = tuple[int, int]


class ImageBatch(NamedTuple):
    """Images of one list: its number, their rows in it, and their size (height, width) in pixels."""

    number: int
    rows: tuple[int, ...]
    size: Size


def plan_batches(
    lists: Sequence[Sequence[Size]],
    pixels: int,
    most: int,
    share: tuple[int, int] = (0, 1),
    rank: tuple[int, int] = (0, 1),
) -> list[ImageBatch]:
    """Batches of the images of several lists, the largest images first, so that memory runs out at the start if at all.

    The plan depends on the sizes and these arguments alone, never on what is stored already: batches are the same
    when a run goes on, and so are their descriptors, bit for bit. Which images belong to a share does not depend on
    the size of batches nor on ranks: shares of machines with other memory or devices still cover every image once.

    Args:
        lists: (height, width) of every image that is described, in pixels.
        pixels: most of a batch; one image may have more.
        most: images of a batch.
        share: (k, n): part k of n, counted from 0.
        rank: (k, n): process k of the n that share this part.
    """
    found: list[ImageBatch] = []
    for number, sizes in enumerate(lists):
        rows = sorted(range(len(sizes)), key=lambda row: (-_area(sizes[row]), sizes[row], row))
        mine = _dealt(_dealt(rows, share), rank)
        for size, group in groupby(mine, key=lambda row: sizes[row]):
            same = list(group)
            count = max(1, min(most, pixels // max(1, _area(size))))
            found += [ImageBatch(number, tuple(same[i : i + count]), size) for i in range(0, len(same), count)]
    return sorted(found, key=lambda batch: -_area(batch.size))


def _dealt(rows: list[int], share: tuple[int, int]) -> list[int]:
    """Part k of n, in blocks of neighbours."""
    k, n = share
    together = max(1, min(_DEALT, len(rows) // (4 * n)))
    return [row for place, row in enumerate(rows) if place // together % n == k]


def missing_in(batches: Iterable[ImageBatch], missing: Sequence[set[int]]) -> list[ImageBatch]:
    """What is left to do of a plan, given the missing rows of each list: whole batches but for rows found elsewhere."""
    left = []
    for batch in batches:
        rows = tuple(row for row in batch.rows if row in missing[batch.number])
        if rows:
            left.append(batch._replace(rows=rows))
    return left


def _area(size: Size) -> int:
    return size[0] * size[1]
