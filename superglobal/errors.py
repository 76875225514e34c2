"""Define `InputError`, which is raised for every problem that the user can fix."""

import math
import sys
from typing import Any

from superglobal.utils.escape import printable

MAX_INTEGER = 2**31 - 1
"""Largest value of an integer setting that has no maximum of its own."""
_MAX_LINE = 2000  # maximum number of characters of a line of a message


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


def in_range(value: Any, minimum: float, maximum: float) -> bool:
    """Return True if a number is finite and within its range.

    Args:
        value: integer or floating-point number of any size.
        minimum: smallest valid value.
        maximum: largest valid value; infinity for `MAX_INTEGER`, or for the largest finite number.
    """
    largest = sys.float_info.max if isinstance(value, float) else MAX_INTEGER
    return bool(minimum <= value <= (maximum if math.isfinite(maximum) else largest))
