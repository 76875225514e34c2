"""Compute exact scores of pairs of a query and a database row. These scores define every ranking in this package."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from superglobal.retrieval.rows import CHUNK_ELEMENTS, as_rows, is_host, run_in_threads

TOLERANCE = 1e-6
"""Largest error of float32 inner products of typical unit vectors.

Scores that differ by less than twice this error are compared in float64. `scan` increases the tolerance for descriptors
with larger errors.
"""
_FEW_PAIRS = 2048  # up to this number of pairs, finding equal rows takes longer than scoring all pairs
_DEVICE_CHUNK_ELEMENTS = 1 << 23  # elements that are multiplied at a time on an accelerator: 64 MB of float64
_KEY_DIMS = 8  # maximum number of components of a row that are compared before whole rows are
_LANES = 64  # number of partial sums of a pair score


def pair_scores(Q: np.ndarray, X: Any, query_of: np.ndarray, row_of: np.ndarray) -> np.ndarray:
    """Compute the inner products of pairs of a query and a row in float64.

    Products of float32 numbers are exact in float64, and each pair is summed separately in an order that depends only
    on D. Equal vectors therefore have equal scores at every position and on every device, and all backends rank rows in
    the same order: by descending score, then by ascending id.

    Args:
        Q: (Q, D) float32 queries.
        X: (N, D) database, or anything that `as_rows` accepts.
        query_of: (P,) query index of each pair.
        row_of: (P,) database row of each pair.

    Returns:
        Scores (P,) float64.
    """
    rows = as_rows(X)
    scores = np.empty(len(query_of), np.float64)
    tensor = rows.tensor
    if tensor is not None:
        return pair_scores_on(torch.from_numpy(Q).to(tensor.device), tensor, query_of, row_of)
    # Pairs are scored in the order of their rows, so that each chunk reads from only a few shards and memory pages.
    order = np.argsort(row_of, kind="stable")

    def score(chunks: Iterable[slice]) -> None:
        for chunk in chunks:
            pairs = order[chunk]
            products = rows.take(row_of[pairs]).astype(np.float64)  # NumPy multiplies arrays of mixed dtypes slowly
            products *= Q[query_of[pairs]].astype(np.float64)
            scores[pairs] = _sum_rows(products)

    run_in_threads(score, len(scores), max(1, CHUNK_ELEMENTS // rows.dim), rows.concurrent)
    return scores


def pair_scores_on(
    queries: torch.Tensor, vectors: torch.Tensor, query_of: np.ndarray, row_of: np.ndarray
) -> np.ndarray:
    """Compute the inner products of pairs of a query and a row in float64, on the device of the tensors.

    The results are bitwise equal to those of `pair_scores`.

    Args:
        queries: (Q, D) float32.
        vectors: (n, D) database rows on the device of the queries; they are converted to float32.
        query_of: (P,) query index of each pair.
        row_of: (P,) row of each pair.

    Returns:
        Scores (P,) float64.
    """
    scores = np.empty(len(query_of), np.float64)
    pairs = torch.from_numpy(np.stack([query_of, row_of])).to(vectors.device)
    step = max(1, _DEVICE_CHUNK_ELEMENTS // vectors.shape[1])
    for start in range(0, len(scores), step):
        chunk = slice(start, start + step)
        products = vectors[pairs[1, chunk]].float().double()
        products *= queries[pairs[0, chunk]]  # a product of float32 numbers is exact in float64
        scores[chunk] = _sum_rows(products).cpu().numpy()
    return scores


def _sum_rows(products: Any) -> Any:
    """Sum each row of an array or tensor (P, D) float64 in a fixed order, and return (P,) sums.

    Each of 64 partial sums adds every 64th element in sequence. Then the two halves of the partial sums are added
    elementwise until one sum remains. The fixed order gives bitwise equal results on every device.
    """
    count, dim = products.shape
    rounds = dim // _LANES
    lanes = products[:, : rounds * _LANES].reshape(count, rounds, _LANES)
    if isinstance(lanes, np.ndarray):
        sums = lanes.sum(axis=1)  # NumPy adds in sequence here; it uses pairwise summation only along the last axis
    else:
        sums = lanes.new_zeros(count, _LANES)
        for number in range(rounds):
            sums += lanes[:, number]
    sums[:, : dim % _LANES] += products[:, rounds * _LANES :]
    while sums.shape[1] > 1:
        half = sums.shape[1] // 2
        sums = sums[:, :half] + sums[:, half:]
    return sums[:, 0]


def block_pair_scores(Q: np.ndarray, block: np.ndarray, query_of: np.ndarray, row_of: np.ndarray) -> np.ndarray:
    """Compute the inner products of pairs of a query and a row of a block in memory, in float64.

    The results are bitwise equal to those of `pair_scores`. If several rows of the block are bitwise equal, their
    scores are computed only once, which saves time if the database contains many copies of an image.

    Args:
        Q: (Q, D) float32 queries.
        block: (n, D) float32 rows.
        query_of: (P,) query index of each pair.
        row_of: (P,) row of each pair in the block.

    Returns:
        Scores (P,) float64.
    """
    if len(row_of) <= _FEW_PAIRS:
        return pair_scores(Q, block, query_of, row_of)
    used, row_of = np.unique(row_of, return_inverse=True)
    first_equal = _first_equal(block, used)
    pairs, pair_of = np.unique(query_of * len(used) + first_equal[row_of], return_inverse=True)
    return pair_scores(Q, block, pairs // len(used), used[pairs % len(used)])[pair_of]


def _first_equal(block: np.ndarray, row_of: np.ndarray) -> np.ndarray:
    """Find, for each row of a selection, the first row of the selection that is bitwise equal to it.

    Args:
        block: (n, D) float32 rows.
        row_of: (P,) positions of the selected rows in the block.

    Returns:
        Positions (P,) int64 in the selection.
    """
    # A few components distinguish nearly all different rows, so that only the others need to be hashed.
    components = np.ascontiguousarray(block[row_of, :: -(-block.shape[1] // _KEY_DIMS)])
    keys = components.view(np.dtype((np.void, components.itemsize * components.shape[1]))).ravel()
    _, key_of, counts = np.unique(keys, return_inverse=True, return_counts=True)
    similar = np.flatnonzero(counts[key_of] > 1)
    digests = [hashlib.blake2b(block[row].data, digest_size=16).digest() for row in row_of[similar]]
    first = dict(zip(reversed(digests), reversed(similar.tolist()), strict=True))
    first_equal = np.arange(len(row_of))
    first_equal[similar] = [first[digest] for digest in digests]
    return first_equal


def scored_where(mask: torch.Tensor, scores: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the positions and scores of the true entries of a mask.

    Args:
        mask: (R, C) bool.
        scores: (R, C) float32, on the device of the mask.

    Returns:
        Rows (n,) int64, columns (n,) int64 and scores (n,) float64 of the entries, as NumPy arrays.
    """
    if is_host(mask.device):
        # NumPy finds the true entries faster than torch.
        rows, columns = np.divmod(np.flatnonzero(mask.numpy()), mask.shape[1])
        return rows, columns, scores[rows, columns].double().numpy()
    flat = mask.ravel().nonzero()[:, 0]
    # Indices and scores are copied to the CPU in one transfer, as float64, which represents indices up to 2^53 exactly.
    packed = torch.stack((flat.double(), scores.ravel()[flat].double())).cpu().numpy()
    rows, columns = np.divmod(packed[0].astype(np.int64), scores.shape[1])
    return rows, columns, packed[1]
