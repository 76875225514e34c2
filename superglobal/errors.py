"""Define `InputError`, which is raised for every problem that the user can fix."""

import math
import re
import sys
from numbers import Integral
from typing import Any

MAX_INTEGER = 2**31 - 1
"""Largest value of an integer setting that has no maximum of its own."""
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
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
