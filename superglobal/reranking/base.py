"""Declare rerankers and compute the similarities inside a shortlist, which they share."""

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
        help: what it sets, in a few words.
        minimum, maximum: range of a number, both included.
        choices: values of a text.
        default: filled in by `register_reranker`, from the function's signature; its type is the parameter's.
    """

    help: str
    minimum: float = -math.inf
    maximum: float = math.inf
    choices: tuple[str, ...] = ()
    default: Any = None

    def validate(self, name: str, value: Any) -> None:
        """Raise InputError for a value of another type, outside the range, or not among the choices."""
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
    """A reranking method, from `register_reranker`."""

    name: str
    help: str
    function: Callable[..., Any]
    parameters: Mapping[str, Parameter]
    searches_again: str | None
    distances: bool
    dtype: torch.dtype
    ties: str

    def complete(self, values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        """Return the value of every parameter: the given one, or its default.

        `prefix` precedes a parameter's name in messages. Raises InputError for an unknown parameter or a bad value.
        """
        for name, value in values.items():
            if name not in self.parameters:
                known = ", ".join(self.parameters)
                raise InputError(f"{prefix}{name}={value}: {self.name} has no parameter {name}; it has {known}")
        result = {name: values.get(name, parameter.default) for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            parameter.validate(prefix + name, result[name])
        return result


RERANKERS: dict[str, Reranker] = {}
"""Every registered reranker by name; `superglobal.reranking.registry` imports those of this folder."""
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

    Without `searches_again` the function scores shortlists: it gets queries (B, D), shortlists T (B, M, D), their Gram
    matrices T T^T (B, M, M), which it may overwrite, and its parameters by name; it returns scores (B, M). With
    "queries" it gets (Q, X, **parameters, exclude, backend, device), with "database" (X, **parameters, path, backend,
    device), see `expand_queries` and `augment_database`.

    Args:
        name: what `rerank.kind` and `superglobal.rerank(method=...)` call it.
        help: a line of documentation.
        parameters: those of the function that users set; each has its default in the function's signature.
        searches_again: "queries" if the function returns new queries (Q, D) for a second search, "database" if it
            returns a new database.
        distances: scores are negative distances, of which sums have no meaning.
        dtype: of the tensors that the function gets.
        ties: order of equal scores: by the lower "id", or as in the shortlist, "first".

    Raises:
        InputError: the name is taken by another function, a parameter is not in the function's signature or has no
            default there, or an unknown value of `searches_again` or `ties`.
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
                raise InputError(f"reranker {name}: {function.__name__} needs a parameter {key} with a default")
        known = RERANKERS.get(name)
        if known is not None and _source(known.function) != _source(function):
            raise InputError(f"reranker {name}: the name is taken by {known.function.__module__}; choose another")
        declared = {key: replace(value, default=arguments[key].default) for key, value in parameters.items()}
        if searches_again is None:
            declared = {"M": _SHORTLIST_SIZE, **declared}
        RERANKERS[name] = Reranker(name, help, function, declared, searches_again, distances, dtype, ties)
        return function

    return register


def _source(function: Callable[..., Any]) -> tuple[str, str]:
    """Return module and name, which stay the same when a module is reloaded or run again in a notebook."""
    return function.__module__, function.__qualname__


def score_batch(
    reranker: Reranker,
    values: Mapping[str, Any],
    queries: np.ndarray,
    shortlists: torch.Tensor,
    numbers: np.ndarray,
    name: str,
) -> np.ndarray:
    """Return the scores (B, M) float32 of queries (B, D) and shortlists (B, M, D), computed on the latter's device.

    `name` and `numbers` (B, M) identify a row in the message about a bad one.
    """
    q, T = to_tensor(queries, shortlists.device).to(reranker.dtype), shortlists.to(reranker.dtype)
    with full_precision():
        gram = gram_of(T)
        _check_norms(gram, numbers, name)
        scores = reranker.function(q, T, gram, **{key: value for key, value in values.items() if key != "M"})
        # float32 before sorting: scores that are returned as equal are sorted as equal.
        return scores.cpu().numpy().astype(np.float32)


def _check_norms(gram: torch.Tensor, numbers: np.ndarray, name: str) -> None:
    """Raise InputError for a row that is not a unit vector; the diagonal of `gram` holds the squared norms."""
    norms = gram.diagonal(dim1=1, dim2=2).sqrt().cpu().numpy()
    valid = is_unit(norms)
    if not valid.all():
        query, row = np.argwhere(~valid)[0]
        raise InputError(f"{name} {numbers[query, row]} {norm_fault(float(norms[query, row]))}")


def gram_of(T: torch.Tensor) -> torch.Tensor:
    """Return T T^T (B, M, M), by four strips of the upper triangle: 5/8 of the whole product, then mirrored."""
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
    # v^T T^T: the CPU's matrix library computes it several times faster.
    return torch.bmm(v[:, None, :], T.transpose(1, 2))[:, 0]


def nearest(similarity: torch.Tensor, count: int) -> torch.Tensor:
    """Return per row its `count` most similar columns, itself first: (B, N, min(count, N)) int64.

    similarity: (B, N, N); its diagonal is not read. The order is that of `first_columns`.
    """
    keys = _order_keys(similarity)
    # A duplicate may score above the row itself by rounding; infinity keeps the row in slot 0.
    keys.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    return keys.topk(min(count, keys.shape[-1]), dim=-1).indices


def first_columns(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return the columns of the `count` largest scores (B, N), best first, equal ones by the lower column: (B, count).

    Scores are compared in steps of about 1e-6, so that rounding, which differs between devices, seldom decides
    between two copies of an image.
    """
    return _order_keys(scores).topk(count, dim=-1).indices


def in_steps(scores: torch.Tensor) -> torch.Tensor:
    """Return scores as whole numbers of steps of about 1e-6, float64; scores beyond -256..256 are clamped."""
    return torch.round(scores.double() * 2**20).clamp(-(2.0**28), 2.0**28)


def _order_keys(scores: torch.Tensor) -> torch.Tensor:
    """Return numbers (..., N), no two of a row equal, that sort as `in_steps` does, then by the lower column."""
    columns = torch.arange(scores.shape[-1], dtype=torch.float64, device=scores.device)
    # Whole numbers below 2^53 are exact in float64.
    return in_steps(scores) * 2**24 - columns


def mask_of(near: torch.Tensor, columns: int) -> torch.Tensor:
    """Return lists of columns (B, N, k) as a bool matrix (B, N, columns)."""
    mask = torch.zeros(*near.shape[:2], columns, dtype=torch.bool, device=near.device)
    return mask.scatter_(2, near, True)
