"""Define `InputError`, which is raised for every problem that the user can fix."""

import heapq
import math
import os
import re
import sys
from collections.abc import Iterable
from difflib import SequenceMatcher
from numbers import Integral
from typing import Any

MAX_INTEGER = 2**31 - 1
"""Largest value of an integer setting that has no maximum of its own."""
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_MAX_LINE = 2000  # maximum number of characters of a line of a message
_MIN_SIMILARITY, _MAX_SIMILAR = 0.7, 3  # minimum ratio of `SequenceMatcher`, and maximum number of names
_MAX_COMPARED = 1000  # number of names that `SequenceMatcher` compares; each takes about 0.1 ms


class InputError(ValueError):
    """Error for invalid input. The message says what is wrong, where it is wrong, and how to fix it.

    All commands print the message without a traceback and exit with status 2.
    """

    def __str__(self) -> str:
        # The message may contain file names with control characters or bytes that are not UTF-8, and long values.
        lines = (printable(line) for line in super().__str__().split("\n"))
        return "\n".join(line if len(line) <= _MAX_LINE else f"{line[:_MAX_LINE]}..." for line in lines)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, cut to 200 characters.

    If the error has no message, return the name of the error's type.
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return a hint for a mistyped name, such as "; did you mean vit_tiny_patch16_224?".

    Args:
        name: name that does not exist.
        names: names that exist. They may be longer, as vit_tiny_patch16_224 is for vit_tinny, or have a prefix that
            ends in a dot, as dataset.database has for dattabase.

    Returns:
        The hint with up to three names; empty if no name is similar.
    """
    names = heapq.nlargest(_MAX_COMPARED, names, key=lambda known: _common_ends(name, known))
    scores = {known: _similarity(name.lower(), known.lower()) for known in names}
    least = max(_MIN_SIMILARITY, max(scores.values(), default=0) - 0.1)
    similar = [known for known, score in scores.items() if score >= least]
    similar.sort(key=lambda known: (-scores[known], len(known), known))
    return f"; did you mean {' or '.join(similar[:_MAX_SIMILAR])}?" if similar else ""


def one_of(name: str, names: Iterable[str]) -> str:
    """Return "one of a, b" for the message about a name that is not one of `names`, with the hint `did_you_mean`."""
    names = list(names)
    return f"one of {', '.join(names)}{did_you_mean(name, names)}"


def _common_ends(name: str, known: str) -> int:
    """Return the number of characters at the start and at the end that a typed name shares with a known name."""
    pairs = (name, known), (name[::-1], known[::-1])
    return sum(len(os.path.commonprefix(pair)) for pair in pairs)  # noqa: RUF071 -- names are compared, not paths


def _similarity(name: str, known: str) -> float:
    """Return the similarity of a typed name to a known name, from 0 to 1."""
    variants = {known: 1.0, known[: len(name)] if len(name) > 3 else known: 0.98}
    if "." not in name:
        variants.setdefault(known.rpartition(".")[2], 0.97)
    if len(name) > 2 and name in known:
        return 0.9
    return max(weight * SequenceMatcher(None, name, variant).ratio() for variant, weight in variants.items())


def in_range(value: Any, minimum: float, maximum: float) -> bool:
    """Return True if a number is finite and within its range.

    Args:
        value: integer or floating-point number of any size.
        minimum: smallest valid value.
        maximum: largest valid value; infinity for `MAX_INTEGER`, or for the largest finite number.
    """
    largest = sys.float_info.max if isinstance(value, float) else MAX_INTEGER
    return bool(minimum <= value <= (maximum if math.isfinite(maximum) else largest))


def integer_limit(value: Any, maximum: float) -> str:
    """Return the end of a message about a value that is not `in_range`: the limit of integers, if it is exceeded."""
    exceeded = isinstance(value, Integral) and int(value) > MAX_INTEGER and maximum == math.inf
    return f" and <= {MAX_INTEGER}" if exceeded else ""


def printable(text: str) -> str:
    r"""Escape control characters, line breaks and bytes that are not UTF-8, such as `\n` and `\xe9`."""
    return _UNPRINTABLE.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    # Python stores the byte 0xNN of a file name that is not UTF-8 as the character U+DCNN.
    code = ord(match[0])
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else match[0].encode("unicode_escape").decode()
