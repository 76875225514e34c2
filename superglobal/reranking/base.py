"""Declaration of rerankers, and operations on shortlists that they share."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch

from superglobal.errors import InputError
from superglobal.retrieval.rows import is_unit, norm_fault, to_tensor
from superglobal.utils.precision import full_precision


@dataclass(frozen=True)
class Parameter:
    """A parameter of a reranker.

    Args:
        help: short description.
        minimum, maximum: inclusive range of a number.
        choices: allowed values of a string.
        default: default value, which `register_reranker` takes from the function's signature; its type is the type of
            the parameter.
    """

    help: str
    minimum: float = -math.inf
    maximum: float = math.inf
    choices: tuple[str, ...] = ()
    default: Any = None

    def validate(self, name: str, value: Any) -> None:
        """Raise InputError if the value has another type, is out of range, or is not among the choices."""
        kind = type(self.default)
        if kind is str:
            valid, expected = value in self.choices, f"one of {', '.join(self.choices)}"
        elif kind is bool:
            valid, expected = isinstance(value, bool | np.bool_), "true or false"
        else:
            types = (int, np.integer) if kind is int else (int, float, np.integer, np.floating)
            number = isinstance(value, types) and not isinstance(value, bool)
            valid = number and math.isfinite(value) and self.minimum <= value <= self.maximum
            expected = "an integer" if kind is int else "a finite number"
            expected += (
                f" >= {self.minimum:g}" if self.maximum == math.inf else f" in {self.minimum:g}..{self.maximum:g}"
            )
        if not valid:
            raise InputError(f"{name}={value}: expected {expected}")


@dataclass(frozen=True)
class Reranker:
    """Reranking method that was registered by `register_reranker`."""

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
            prefix: text before a parameter's name in messages.

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
"""All registered rerankers by name; `superglobal.reranking.registry` registers those of this folder."""
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

    Without `searches_again`, the function scores shortlists. It is called with queries (B, D), shortlists T (B, M, D),
    their Gram matrices T T^T (B, M, M), which it may overwrite, and its parameters by name. It returns scores (B, M).
    With "queries", it is called with (Q, X, **parameters, exclude, backend, device); with "database", it is called with
    (X, **parameters, path, backend, device). See `expand_queries` and `augment_database`.

    Args:
        name: value of `rerank.kind` and of `method` in `superglobal.rerank`.
        help: one line of documentation.
        parameters: parameters of the function that users can set; each needs a default in the function's signature.
        searches_again: "queries" if the function returns new queries (Q, D) for a second search, "database" if it
            returns a new database.
        distances: set if scores are negative distances, because their sums have no meaning.
        dtype: dtype of the function's input tensors.
        ties: order of equal scores: "id" for the lower id first, "first" for the order of the shortlist.

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
    """Return module and name, which do not change when a module is reloaded or run again in a notebook."""
    return function.__module__, function.__qualname__


def score_batch(
    reranker: Reranker,
    values: Mapping[str, Any],
    queries: np.ndarray,
    shortlists: torch.Tensor,
    numbers: np.ndarray,
    name: str,
) -> np.ndarray:
    """Compute the scores (B, M) float32 of shortlists, on their device.

    Args:
        reranker: reranker of shortlists.
        values: values of its parameters.
        queries: (B, D).
        shortlists: (B, M, D).
        numbers: (B, M) numbers of the rows, for messages about invalid rows.
        name: name of a row, for these messages.
    """
    q, T = to_tensor(queries, shortlists.device).to(reranker.dtype), shortlists.to(reranker.dtype)
    with full_precision():
        gram = gram_of(T)
        _check_norms(gram, numbers, name)
        scores = reranker.function(q, T, gram, **{key: value for key, value in values.items() if key != "M"})
        # The conversion to float32 is before sorting, so that scores that are equal in the result are sorted as equal.
        return scores.cpu().numpy().astype(np.float32)


def _check_norms(gram: torch.Tensor, numbers: np.ndarray, name: str) -> None:
    """Raise InputError for a row that is not a unit vector; the diagonal of `gram` contains the squared norms."""
    norms = gram.diagonal(dim1=1, dim2=2).sqrt().cpu().numpy()
    valid = is_unit(norms)
    if not valid.all():
        query, row = np.argwhere(~valid)[0]
        raise InputError(f"{name} {numbers[query, row]} {norm_fault(float(norms[query, row]))}")


def gram_of(T: torch.Tensor) -> torch.Tensor:
    """Return T T^T (B, M, M), for which four strips of the upper triangle (5/8 of it) are computed and mirrored."""
    depth = T.shape[1]
    step = -(-depth // 4)
    gram = T.new_empty(len(T), depth, depth)
    for start in range(0, depth, step):
        stop = min(start + step, depth)
        gram[:, start:stop, start:] = torch.bmm(T[:, start:stop], T[:, start:].transpose(1, 2))
        gram[:, stop:, start:stop] = gram[:, start:stop, stop:].transpose(1, 2)
    return gram


def dots(T: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return T v (B, M) for vectors v (B, D)."""
    # The product is computed as v^T T^T, which the CPU's matrix library computes several times faster than T v.
    return torch.bmm(v[:, None, :], T.transpose(1, 2))[:, 0]


def nearest(similarity: torch.Tensor, count: int) -> torch.Tensor:
    """Return the `count` most similar columns of each row, the row itself first: (B, N, min(count, N)) int64.

    The order is that of `first_columns`.

    Args:
        similarity: (B, N, N); its diagonal is ignored.
        count: number of columns.
    """
    keys = _order_keys(similarity)
    # By rounding, a duplicate may score higher than the row itself. Infinity keeps the row in the first position.
    keys.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    return keys.topk(min(count, keys.shape[-1]), dim=-1).indices


def first_columns(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return the columns of the `count` largest scores (B, N), best first, ties by the lower column: (B, count).

    Scores are compared in steps of about 1e-6, so that rounding, which differs between devices, rarely decides the
    order of two copies of an image.
    """
    return _order_keys(scores).topk(count, dim=-1).indices


def in_steps(scores: torch.Tensor) -> torch.Tensor:
    """Convert scores to whole numbers of steps of about 1e-6, float64; scores outside -256..256 are clamped."""
    return torch.round(scores.double() * 2**20).clamp(-(2.0**28), 2.0**28)


def _order_keys(scores: torch.Tensor) -> torch.Tensor:
    """Return sort keys (..., N), distinct within a row, that order by `in_steps` and then by the lower column."""
    columns = torch.arange(scores.shape[-1], dtype=torch.float64, device=scores.device)
    # Whole numbers below 2^53 are exact in float64.
    return in_steps(scores) * 2**24 - columns


def mask_of(near: torch.Tensor, columns: int) -> torch.Tensor:
    """Convert lists of columns (B, N, k) to a bool matrix (B, N, columns)."""
    mask = torch.zeros(*near.shape[:2], columns, dtype=torch.bool, device=near.device)
    return mask.scatter_(2, near, True)
