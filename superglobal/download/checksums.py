"""What a file must be: the md5 that its owners publish, or else the sha256 that it had when it was first loaded.

Both lie beside the file, as `<file>.md5` and `<file>.sha256` in the form that md5sum and sha256sum take.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from superglobal.errors import InputError
from superglobal.utils.io import write_atomically

_MD5, _SHA256 = re.compile(r"\b[0-9a-f]{32}\b"), re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Known:
    """A checksum and where it is known from.

    Attributes:
        kind: "md5" or "sha256".
        digest: hexadecimal.
        origin: for messages, with the way out.
    """

    kind: str
    digest: str
    origin: str


def published(address: str, load: Callable[[str], str]) -> Known:
    """The md5 that is published at an address.

    Args:
        address: of a text that begins with it.
        load: gives the text.

    Raises:
        InputError: what is at the address is no md5, or `load` has failed.
    """
    text = load(address)
    found = _MD5.search(text.lower())
    if found is None:
        raise InputError(f"{address} is no md5 (it begins {text[:40]!r}); expected 32 hexadecimal digits. Call again")
    return Known("md5", found[0], f"published at {address}")


def confirm(target: Path, known: Known) -> None:
    """Write down that `target` was found to have a published checksum."""
    write_atomically(_confirmation(target), f"{known.digest}  {target.name}\n".encode())


def is_confirmed(target: Path) -> bool:
    """Whether that was written down."""
    return _confirmation(target).is_file()


def recorded(target: Path) -> Known | None:
    """The sha256 that `target` had when it was first loaded; None if it never was."""
    beside = _beside(target)
    try:
        digest = beside.read_text().split()[0]
    except (OSError, UnicodeDecodeError, IndexError):
        return None
    if not _SHA256.fullmatch(digest):
        return None
    return Known("sha256", digest, f"recorded in {beside} when it was first loaded: remove that to take another file")


def record(target: Path) -> None:
    """Write down the sha256 of `target`, once it is known to be sound."""
    write_atomically(_beside(target), f"{_digest(target, 'sha256')}  {target.name}\n".encode())


def mismatch(path: Path, known: Known) -> str | None:
    """What is wrong with a file that must have a checksum, or None."""
    found = _digest(path, known.kind)
    return None if found == known.digest else f"its {known.kind} is {found}, expected {known.digest} ({known.origin})"


def _digest(path: Path, kind: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


def _confirmation(target: Path) -> Path:
    return target.with_name(f"{target.name}.md5")


def _beside(target: Path) -> Path:
    return target.with_name(f"{target.name}.sha256")
