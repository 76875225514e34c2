"""Escape file names and other text from outside for the formats of the outputs."""

import re
from typing import Any

_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_FORMULA = re.compile(r"(?![-+\d.,%e ]*(?: to [-+\d.,%e ]*)?$)[=+\-@]")
_MARKDOWN = re.compile(r"[\\`*\[|]")


def printable(text: str) -> str:
    r"""Escape control characters, line breaks and bytes that are not UTF-8, such as `\n` and `\xe9`."""
    return _UNPRINTABLE.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    # Python stores the byte 0xNN of a file name that is not UTF-8 as the character U+DCNN.
    code = ord(match[0])
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else match[0].encode("unicode_escape").decode()


def csv_cell(value: Any) -> Any:
    """Return a cell of a CSV file. A text that a spreadsheet would take for a formula gets a leading apostrophe.

    Numbers and intervals, such as "+1.5" and "-1.5 to +0.5", are not changed.
    """
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if _FORMULA.match(text) else text


def markdown(text: str) -> str:
    """Escape text for Markdown, so that it contains no HTML, links, code, emphasis or column separators."""
    text = printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKDOWN.sub(r"\\\g<0>", text)
