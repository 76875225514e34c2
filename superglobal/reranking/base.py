"""Register rerankers, and provide operations on shortlists that several rerankers use."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch

from superglobal.errors import InputError, in_range, integer_limit
from superglobal.retrieval.rows import to_tensor
from superglobal.utils.norms import is_unit, norm_fault
from superglobal.utils.precision import full_precision


@dataclass(frozen=True)
class Parameter:
    """Parameter of a reranker that users can set.

    Args:
        help: description of the parameter for help texts, in a few words.
        minimum, maximum: smallest and largest valid value of a numeric parameter.
        choices: valid values of a string parameter.
        default: default value, whose type is the type of the parameter. `register_reranker` reads it from the
            function's signature.
    """

    help: str
    minimum: float = -math.inf
    maximum: float = math.inf
    choices: tuple[str, ...] = ()
    default: Any = None

    def validate(self, name: str, value: Any) -> None:
        """Raise InputError if `value` is not a valid value of the parameter `name`."""
        kind = type(self.default)
        if kind is str:
            valid, expected = value in self.choices, f"one of {', '.join(self.choices)}"
        elif kind is bool:
            valid, expected = isinstance(value, bool | np.bool_), "true or false"
        else:
            types = (int, np.integer) if kind is int else (int, float, np.integer, np.floating)
            number = isinstance(value, types) and not isinstance(value, bool)
            valid = number and in_range(value, self.minimum, self.maximum)
            expected = "an integer" if kind is int else "a finite number"
            expected += (
                f" >= {self.minimum:g}" if self.maximum == math.inf else f" in {self.minimum:g}..{self.maximum:g}"
            )
            expected += integer_limit(value, self.maximum)
        if not valid:
            raise InputError(f"{name}={value}: expected {expected}")


@dataclass(frozen=True)
class Reranker:
    """A reranking method. `register_reranker` creates these objects, and describes their attributes."""

    name: str
    help: str
    function: Callable[..., Any]
    parameters: Mapping[str, Parameter]
    searches_again: str | None
    distances: bool
    dtype: torch.dtype
    ties: str

    def complete(self, values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        """Return the values of all parameters, with defaults for those that are missing.

        Args:
            values: values by parameter name.
            prefix: text before a parameter's name in messages, such as "rerank.".

        Raises:
            InputError: a parameter is unknown, or a value is invalid.
        """
        for name, value in values.items():
            if name not in self.parameters:
                known = ", ".join(self.parameters)
                raise InputError(f"{prefix}{name}={value}: {self.name} has no parameter {name}; choose from {known}")
        result = {name: values.get(name, parameter.default) for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            parameter.validate(prefix + name, result[name])
        return result


RERANKERS: dict[str, Reranker] = {}
"""All registered rerankers by name; importing `superglobal.reranking.registry` registers those of this folder."""
_SHORTLIST_SIZE = Parameter("images in the shortlist", minimum=1, default=400)
F = TypeVar("F", bound=Callable[..., Any])


def register_reranker(
    name: str,
    help: str,
    parameters: Mapping[str, Parameter],
    *,
    searches_again: str | None = None,
    distances: bool = False,
    dtype: torch.dtype = torch.float32,
    ties: str = "id",
) -> Callable[[F], F]:
    """Return a decorator that registers a function as a reranker.

    `searches_again` defines the interface of the function:

    - None: the function scores shortlists. It is called with queries (B, D), shortlists T (B, M, D), their Gram
      matrices T T^T (B, M, M), which the function may overwrite, and its parameters by name. It returns scores (B, M).
    - "queries": the function is called with the queries, the database and, by name, its parameters, `exclude`,
      `backend` and `device`. It returns new queries (Q, D), with which the database is searched again. An example is
      `expand_queries`.
    - "database": the function is called with the database and, by name, its parameters, `path`, `backend` and
      `device`. It returns a new database, which is then searched. An example is `augment_database`.

    Args:
        name: value of `rerank.kind` and of `method` in `superglobal.rerank`.
        help: one line of documentation.
        parameters: parameters of the function that users can set; each needs a default in the function's signature.
        searches_again: None, "queries" or "database", as above.
        distances: True if the scores are negative distances, which cannot be summed as votes for a landmark.
        dtype: dtype of the function's input tensors.
        ties: order of images with equal scores: "id" (the lower id first) or "first" (as in the shortlist).

    Raises:
        InputError: another function has this name, a parameter is not in the function's signature or has no default
            there, or the value of `searches_again` or `ties` is unknown.
    """
    for label, value, choices in (
        ("searches_again", searches_again, (None, "queries", "database")),
        ("ties", ties, ("id", "first")),
    ):
        if value not in choices:
            raise InputError(f"reranker {name}: {label}={value}: expected one of {', '.join(map(str, choices))}")

    def register(function: F) -> F:
        arguments = inspect.signature(function).parameters
        for key in parameters:
            if key not in arguments or arguments[key].default is inspect.Parameter.empty:
                raise InputError(f"reranker {name}: {function.__name__} needs a parameter {key} with a default value")
        known = RERANKERS.get(name)
        if known is not None and _source(known.function) != _source(function):
            raise InputError(f"reranker {name}: the name is used by {known.function.__module__}; choose another name")
        declared = {key: replace(value, default=arguments[key].default) for key, value in parameters.items()}
        if searches_again is None:
            declared = {"M": _SHORTLIST_SIZE, **declared}
        RERANKERS[name] = Reranker(name, help, function, declared, searches_again, distances, dtype, ties)
        return function

    return register


def _source(function: Callable[..., Any]) -> tuple[str, str]:
    """Return the name of a function's module and the name of the function.

    These names identify a function even if its module is reloaded or its notebook cell is run again, which creates a
    new function object with the same names.
    """
    return function.__module__, function.__qualname__


def score_batch(
    reranker: Reranker,
    values: Mapping[str, Any],
    queries: np.ndarray,
    shortlists: torch.Tensor,
    numbers: np.ndarray,
    name: str,
) -> np.ndarray:
    """Score a batch of shortlists with a reranker, on the device of the shortlists.

    Args:
        reranker: reranker that scores shortlists.
        values: values of the reranker's parameters by name.
        queries: (B, D) queries.
        shortlists: (B, M, D) descriptors of the shortlists.
        numbers: (B, M) ids of the descriptors in the shortlists, for error messages.
        name: what error messages call a descriptor of a shortlist, such as "database row".

    Returns:
        Scores (B, M) float32.

    Raises:
        InputError: a descriptor is not a unit vector.
    """
    q, T = to_tensor(queries, shortlists.device).to(reranker.dtype), shortlists.to(reranker.dtype)
    with full_precision():
        gram = gram_of(T)
        _check_norms(gram, numbers, name)
        scores = reranker.function(q, T, gram, **{key: value for key, value in values.items() if key != "M"})
        # Rerankers may return float64 scores. Scores that are equal in float32 must be ties, so all scores are
        # converted to float32 before they are sorted.
        return scores.cpu().numpy().astype(np.float32)


def _check_norms(gram: torch.Tensor, numbers: np.ndarray, name: str) -> None:
    """Raise InputError for a descriptor that is not a unit vector.

    Args:
        gram: (B, M, M) Gram matrices, whose diagonals contain the squared norms.
        numbers: (B, M) ids of the descriptors, for the error message.
        name: what the error message calls a descriptor, such as "database row".
    """
    norms = gram.diagonal(dim1=1, dim2=2).sqrt().cpu().numpy()
    valid = is_unit(norms)
    if not valid.all():
        query, row = np.argwhere(~valid)[0]
        raise InputError(f"{name} {numbers[query, row]} {norm_fault(float(norms[query, row]))}")


def gram_of(T: torch.Tensor) -> torch.Tensor:
    """Compute the Gram matrices T T^T (B, M, M) of descriptors T (B, M, D)."""
    # The matrices are symmetric, so only their upper triangles are computed and then mirrored. Each triangle is covered
    # by four horizontal strips, which together have 5/8 of the elements of a matrix.
    depth = T.shape[1]
    step = -(-depth // 4)
    gram = T.new_empty(len(T), depth, depth)
    for start in range(0, depth, step):
        stop = min(start + step, depth)
        gram[:, start:stop, start:] = torch.bmm(T[:, start:stop], T[:, start:].transpose(1, 2))
        gram[:, stop:, start:stop] = gram[:, start:stop, stop:].transpose(1, 2)
    return gram


def dots(T: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return the dot products (B, M) of descriptors T (B, M, D) with one vector v (B, D) per shortlist."""
    # On the CPU, the product v^T T^T is several times faster than the equivalent T v.
    return torch.bmm(v[:, None, :], T.transpose(1, 2))[:, 0]


def with_query(first: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Return the Gram matrices (B, M+1, M+1) of each query, at index 0, and its shortlist.

    Args:
        first: (B, M) cosines of the query with its shortlist.
        gram: (B, M, M) cosines within the shortlist.
    """
    column = first[..., None]
    top = torch.cat([torch.ones_like(column[:, :1]), column], dim=1)
    return torch.cat([top, torch.cat([column.transpose(1, 2), gram], dim=1)], dim=2)


def nearest(similarity: torch.Tensor, count: int) -> torch.Tensor:
    """Find the nearest images of each image in a shortlist, among the images of the same shortlist.

    Args:
        similarity: (B, N, N) similarities of the images of each shortlist; the diagonals are ignored.
        count: number of indices per image; the first one is the image itself.

    Returns:
        Indices (B, N, min(count, N)) int64: the image itself first, then the others by descending similarity.
        Similarities are rounded to multiples of about 1e-6. Among equal rounded similarities, the lower index is first.
    """
    keys = _order_keys(similarity)
    # Due to rounding, a duplicate may score higher than the image itself. Infinity keeps the image first.
    keys.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    return keys.topk(min(count, keys.shape[-1]), dim=-1).indices


def first_columns(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return the column indices of the largest scores in each row.

    Scores are rounded to multiples of about 1e-6 before they are compared. Two copies of an image have scores that
    differ only by floating-point errors. Because such scores are usually rounded to the same value, the order of the
    copies rarely depends on the device.

    Args:
        scores: (B, N) scores.
        count: number of columns, <= N.

    Returns:
        Indices (B, count) int64, best first; among equal rounded scores, the lower index is first.
    """
    return _order_keys(scores).topk(count, dim=-1).indices


def in_steps(scores: torch.Tensor) -> torch.Tensor:
    """Clamp scores to -256..256, divide them by 2^-20 (about 1e-6), and round them to whole numbers, as float64."""
    return (scores.double() * 2**20).round_().clamp_(-(2.0**28), 2.0**28)


def _order_keys(scores: torch.Tensor) -> torch.Tensor:
    """Return float64 keys (..., N) for sorting the columns of scores (..., N); a better column has a larger key.

    Columns are sorted by descending score, rounded to multiples of about 1e-6 by `in_steps`. Columns with equal rounded
    scores are sorted by ascending index, so all keys of a row are distinct.
    """
    columns = torch.arange(scores.shape[-1], dtype=torch.float64, device=scores.device)
    # The keys are exact, because float64 represents all whole numbers below 2^53.
    return in_steps(scores).mul_(2**24).sub_(columns)


def mask_of(near: torch.Tensor, columns: int) -> torch.Tensor:
    """Convert column indices `near` (B, N, k) to a bool mask (B, N, columns) that is True at these columns."""
    mask = torch.zeros(*near.shape[:2], columns, dtype=torch.bool, device=near.device)
    return mask.scatter_(2, near, True)
