"""Escape file names and other text from outside for the formats of the outputs."""

import re
from typing import Any

from superglobal.errors import printable

_FORMULA = re.compile(r"(?![-+\d.,%e ]*(?: to [-+\d.,%e ]*)?$)[=+\-@]")
_MARKDOWN = re.compile(r"[\\`*\[|]")


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
