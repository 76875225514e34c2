"""One file by HTTP: gone on with where it broke off, from several addresses in turn.

`<target>.part` holds what has come, `<target>.part.json` which file on which server that is (length, ETag, date). Bytes
are added only to a part of the same file: the server is asked by If-Range, and its Content-Range must agree.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from superglobal.download.checksums import Known, mismatch
from superglobal.errors import InputError
from superglobal.utils.io import write_atomically

try:
    import pooch
    import requests
except ImportError as error:
    raise InputError(f"downloads need {error.name}: pip install pooch requests") from error
Report = Callable[[int, int | None], None]
"""Told how many bytes of how many (None: not said) are there; may raise to end the transfer."""
_CHUNK = 1 << 16
_LATER = (408, 425, 429)  # and all from 500: another try may do
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")


class DiskFullError(InputError):
    """What comes cannot be written: no other file could be either."""


@dataclass(frozen=True)
class Way:
    """How files are had.

    Attributes:
        bases: servers in place of the official ones: `https://host/path` is taken from `<base>/host/path`.
        timeout: seconds that a server may be silent.
        tries: in a row without a new byte, before an address is given up.
        pause: seconds before the second try; doubled for each further one.
    """

    bases: tuple[str, ...] = ()
    timeout: float = 60.0
    tries: int = 5
    pause: float = 1.0

    def addresses(self, urls: Sequence[str]) -> list[str]:
        """Where to look, in order."""
        if not self.bases:
            return list(urls)
        hosts = [url.split("://", 1)[1] for url in urls]
        return list(dict.fromkeys(f"{base.rstrip('/')}/{host}" for host in hosts for base in self.bases))


def fetch(urls: Sequence[str], target: Path, way: Way, report: Report, known: Known | None = None) -> None:
    """Load `target`, or what is missing of it; it is whole or not there.

    Args:
        urls: official addresses of the same file.
        target: its folder is made.
        way: see `Way`.
        report: see `Report`.
        known: the checksum that it must have.

    Raises:
        InputError: no address gave it: each with what went wrong and what was expected.
        DiskFullError: it cannot be written.
    """
    failures = []
    target.parent.mkdir(parents=True, exist_ok=True)
    for url in way.addresses(urls):
        reason = _from(url, target, way, report, known)
        if reason is None:
            return
        failures.append(f"  {url}: {reason}")
    part = part_of(target)
    size = part.stat().st_size if part.is_file() else 0
    there = f", {size} bytes of it are there" if size else ""
    raise InputError(
        "\n".join([f"{target.name} could not be loaded{there}:", *failures])
        + f"\ncall again to go on; or load it by other means to {target}; or name a server that has it with --base-url"
    )


def part_of(target: Path) -> Path:
    """What has come of a file so far."""
    return target.with_name(f"{target.name}.part")


def size_at(urls: Sequence[str], way: Way) -> int | None:
    """Bytes that a server says the file has, by the first address that says it; None if none does."""
    for url in way.addresses(urls):
        with suppress(requests.RequestException, ValueError):
            response = requests.head(
                url, timeout=way.timeout, allow_redirects=True, headers={"Accept-Encoding": "identity"}
            )
            if response.status_code == 200 and "Content-Length" in response.headers:
                return int(response.headers["Content-Length"])
    return None


def text_at(url: str, way: Way) -> str:
    """A short text; `InputError` as `fetch`."""
    failures = []
    for address in way.addresses([url]):
        for attempt in range(way.tries):
            if attempt:
                time.sleep(way.pause * 2 ** (attempt - 1))
            try:
                response = requests.get(address, timeout=way.timeout)
                if response.status_code == 200:
                    return response.text
                reason = _status(response)
                if not _may_pass(response.status_code):
                    break
            except requests.RequestException as error:
                reason = _words(error)
        failures.append(f"  {address}: {reason}")
    raise InputError("\n".join([f"{url.rpartition('/')[2]} could not be loaded:", *failures, "call again later"]))


@dataclass(frozen=True)
class _State:
    """Which file a part is of."""

    url: str
    length: int | None
    etag: str | None
    modified: str | None

    @property
    def validator(self) -> str | None:
        """For If-Range, which takes no weak ETag."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.modified


class _ChangedError(Exception):
    """The server's file is not the one that the part is of."""


class _Transfer:
    """One request; also the progress bar that pooch tells."""

    def __init__(self, url: str, target: Path, timeout: float, report: Report) -> None:
        self.url, self.part, self.timeout, self.report = url, part_of(target), timeout, report
        self.record = self.part.with_name(f"{self.part.name}.json")
        self.total = 0  # pooch sets it; ours is in the state
        self.resumed = False

    def run(self) -> None:
        """Load the rest.

        Raises:
            _ChangedError: the server has another file by now.
            requests.RequestException: anything that went wrong on the way.
            OSError: it cannot be written.
        """
        with self.part.open("ab") as self.file:
            self.state = self._state()
            self.offset = self.file.tell()
            if self.state is None or self.offset > (self.state.length or 0):
                self.offset = 0  # what is there goes once the server answers with something better
            self.resumed = self.offset > 0
            if not (self.state and self.offset == self.state.length):
                self._request()
            os.fsync(self.file.fileno())
        size, length = self.part.stat().st_size, self.state and self.state.length
        if length is not None and size != length:
            raise requests.ConnectionError(f"the connection ended after {size} of {length} bytes")

    def _request(self) -> None:
        headers = {"Accept-Encoding": "identity"}
        if self.offset and self.state:
            headers["Range"] = f"bytes={self.offset}-"
            if self.state.validator:
                headers["If-Range"] = self.state.validator
        load = pooch.HTTPDownloader(
            progressbar=self,
            chunk_size=_CHUNK,
            headers=headers,
            timeout=self.timeout,
            hooks={"response": self._begin},
        )
        load(self.url, self.file, None)

    def _begin(self, response: requests.Response, **_: Any) -> None:
        """Before the first byte of the answer: is it the rest of our part, or the whole?"""
        if response.is_redirect or not self._answers(response.status_code):
            return  # pooch raises for the status
        if self.url.endswith("gz"):  # some servers call the compression that a .tgz has the transfer's own
            response.headers.pop("Content-Encoding", None)
            response.raw.headers.pop("Content-Encoding", None)
        plain = response.headers.get("Content-Encoding", "identity") == "identity"
        if not response.headers.get("Content-Length", "0").isdecimal():  # pooch takes it for a number, too
            del response.headers["Content-Length"]
        if response.status_code == 206:
            said = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
            expected = (self.offset, self.state and self.state.length)
            if not said or (int(said[1]), int(said[2])) != expected:
                raise _ChangedError(f"Content-Range is {response.headers.get('Content-Range')}, expected {expected}")
            return
        self.file.truncate(0)
        self.resumed = False
        validators = (response.headers.get(key) for key in ("ETag", "Last-Modified"))
        length = int(response.headers["Content-Length"]) if plain and "Content-Length" in response.headers else None
        self.state = _State(self.url, length, *validators)
        write_atomically(self.record, json.dumps(asdict(self.state)).encode())

    def _answers(self, status: int) -> bool:
        if status == 416 or (status == 206 and not self.offset):
            raise _ChangedError(f"status {status} to a request from byte {self.offset}")
        return status in (200, 206)

    def _state(self) -> _State | None:
        """Of the part that is there, if it can be gone on with from this address."""
        try:
            state = _State(**json.loads(self.record.read_text()))
        except (OSError, ValueError, TypeError):
            return None
        return state if state.url == self.url and state.length is not None else None

    def update(self, _: int) -> None:
        self.report(self.file.tell(), self.state.length if self.state else None)

    def reset(self) -> None:
        """Of a bar; nothing to do."""

    close = reset


def _from(url: str, target: Path, way: Way, report: Report, known: Known | None) -> str | None:
    """Load from one address, in several tries; the reason if it is given up."""
    reason, tries, most, again = "", 0, 0, False
    while tries < way.tries:
        if tries:
            time.sleep(min(60.0, way.pause * 2 ** (tries - 1)))
        transfer = _Transfer(url, target, way.timeout, report)
        try:
            transfer.run()
            wrong = known and mismatch(transfer.part, known)
            if not wrong:
                os.replace(transfer.part, target)
                _discard(transfer)
                return None
            _discard(transfer)
            if not transfer.resumed or again:
                return wrong
            again = True  # perhaps the part was bad: once more, from the beginning
            continue
        except _ChangedError as error:
            _discard(transfer)
            reason = f"the file changed meanwhile ({error})"
        except requests.RequestException as error:
            reason = _words(error)
            status = error.response.status_code if error.response is not None else None
            if (status and not _may_pass(status)) or isinstance(error, ValueError):  # a URL that is none
                break
        except OSError as error:
            raise _full(transfer.part, error) from error
        size = transfer.part.stat().st_size if transfer.part.is_file() else 0
        tries, most = (1, size) if size > most else (tries + 1, most)
    return reason


def _discard(transfer: _Transfer) -> None:
    for path in (transfer.record, transfer.part):
        path.unlink(missing_ok=True)


def _may_pass(status: int) -> bool:
    return status in _LATER or status >= 500


def _status(response: requests.Response) -> str:
    return f"status {response.status_code} ({response.reason}), expected 200"


def _words(error: requests.RequestException) -> str:
    """In a line."""
    if error.response is not None:
        return _status(error.response)
    if isinstance(error, requests.Timeout) or "Read timed out" in str(error):
        return "the server was silent for longer than --timeout"
    return f"{type(error).__name__}: {error}"


def _full(path: Path, error: OSError) -> DiskFullError:
    free = shutil.disk_usage(path.parent).free
    return DiskFullError(
        f"{path}: cannot be written ({error.strerror or error}); {free / 1e6:.1f} MB are free: make room or choose "
        "another --data, then call again to go on"
    )
