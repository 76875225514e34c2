"""Download files over HTTP: resume partial downloads, try several addresses, and verify checksums.

`<file>.part` is a partial download. `<file>.part.json` identifies the version of the file on the server. `<file>.md5`
or `<file>.sha256` contains the checksum of a verified file, in the format of the md5sum and sha256sum commands.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from superglobal.download.archives import disk_error
from superglobal.errors import InputError
from superglobal.utils.io import open_file, read_json, write_atomically

try:
    import requests
except ImportError as error:
    raise InputError("downloads need the package requests; install it: pip install requests") from error

_CHUNK = 1 << 16
Report = Callable[[int, int | None], None]
"""Callback that receives the number of bytes on disk, and the size of the file in bytes or None if it is unknown.

It may raise an error to stop the download.
"""


@dataclass(frozen=True)
class DownloadOptions:
    """Options of `superglobal download`.

    Attributes:
        base_urls: mirrors to use instead of the official servers; https://host/path is downloaded from
            <base_url>/host/path.
        timeout: seconds without data after which a connection is closed.
        tries: maximum number of consecutive attempts without new data before the next address is tried.
        jobs: number of archives to download at the same time.
        keep: whether to keep archives after unpacking them.
        packed: whether to leave archives packed; only for GLDv2, whose archives can be read with `data.tars`.
        pause: seconds to wait before the second attempt. The pause doubles before each further attempt.
    """

    base_urls: tuple[str, ...] = ()
    timeout: float = 60.0
    tries: int = 5
    jobs: int = 4
    keep: bool = False
    packed: bool = False
    pause: float = 1.0

    def addresses(self, urls: Sequence[str]) -> list[str]:
        """Return the addresses to try, in order: `urls`, or their copies on the mirrors if there are any."""
        if not self.base_urls:
            return list(urls)
        paths = [url.split("://", 1)[1] for url in urls]
        return list(dict.fromkeys(f"{base.rstrip('/')}/{path}" for path in paths for base in self.base_urls))


def part_path(target: Path) -> Path:
    """Return the path of the partial download of `target`."""
    return target.with_name(f"{target.name}.part")


def download_file(
    urls: Sequence[str], target: Path, options: DownloadOptions, report: Report, checksum: str | None = None
) -> None:
    """Download a file, or the rest of it if there is a partial download.

    The file appears at `target` only when it is complete and has the right checksum.

    Args:
        urls: official addresses of the file, tried in order.
        target: path of the file; its folder is created if necessary.
        options: mirrors, timeout and number of attempts.
        report: callback for the progress.
        checksum: expected checksum as "<algorithm>:<digest>"; None to accept any contents.

    Raises:
        InputError: the file could not be downloaded from any address.
        DiskFullError: the disk is full.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    failures = []
    for url in options.addresses(urls):
        reason = _download_from(url, target, options, report, checksum)
        if reason is None:
            return
        failures.append(f"  {url}: {reason}")
    size = file_size(part_path(target))
    partial = f" ({size} bytes are on disk)" if size else ""
    raise InputError(
        "\n".join([f"{target.name} could not be downloaded{partial}:", *failures])
        + f"\nrun the command again to resume, save the file as {target}, or give another server with --base-url"
    )


def _download_from(
    url: str, target: Path, options: DownloadOptions, report: Report, checksum: str | None
) -> str | None:
    """Try to download a file from one address, in several attempts.

    Args:
        url: address of the file.
        target: path of the file.
        options: timeout and number of attempts.
        report: callback for the progress.
        checksum: expected checksum as "<algorithm>:<digest>"; None to accept any contents.

    Returns:
        None if the file has been downloaded, else the reason of the failure.
    """
    part, state, reason, failures, largest = part_path(target), _state_path(target), "", 0, 0
    while failures < options.tries:
        if failures:
            time.sleep(min(60.0, options.pause * 2 ** (failures - 1)))
        try:
            resumed = _transfer(url, part, state, options.timeout, report)
        except requests.RequestException as error:
            reason = _reason(error)
            status = error.response.status_code if error.response is not None else 500
            if isinstance(error, ValueError) or (status < 500 and status not in (408, 425, 429)):
                # Another attempt would fail too: the address is invalid, or the HTTP status is a permanent error.
                return reason
        except OSError as error:
            raise disk_error(f"{part}: cannot be written", part.parent, error) from error
        else:
            state.unlink(missing_ok=True)
            problem = checksum_problem(part, checksum)
            if problem is None:
                os.replace(part, target)
                return None
            part.unlink()
            if not resumed:
                return problem
            reason = problem  # The partial download from an earlier run may have been damaged, so start over.
        size = file_size(part)
        failures, largest = (1, size) if size > largest else (failures + 1, largest)
    return reason


def _transfer(url: str, part: Path, state_path: Path, timeout: float, report: Report) -> bool:
    """Download a file to `part`, or append what is missing if `part` is a partial download.

    Data is appended only if the server confirms, in its response to the headers Range and If-Range, that the file has
    not changed. Otherwise the download starts over.

    Args:
        url: address of the file.
        part: path of the partial download.
        state_path: file that identifies the version of the file on the server.
        timeout: seconds without data after which the connection is closed.
        report: callback for the progress.

    Returns:
        True if data was appended to a partial download.

    Raises:
        RequestException: the connection failed or ended early, or the server returned an error.
        OSError: `part` cannot be written.
    """
    state = _read_state(state_path, url)
    with part.open("ab") as file:
        offset, length = file.tell(), state["length"]
        if length is None or offset > length:
            offset = 0
        if offset == 0 or offset < length:
            headers = {"Accept-Encoding": "identity"}
            if offset:
                # requests does not send a header whose value is None.
                headers |= {"Range": f"bytes={offset}-", "If-Range": state["validator"]}
            with requests.get(url, headers=headers, stream=True, timeout=timeout) as response:
                if url.endswith("gz"):  # Some servers wrongly declare the gzip format of the file as Content-Encoding.
                    response.raw.headers.pop("Content-Encoding", None)
                if response.status_code in (206, 416):
                    content_range = response.headers.get("Content-Range")
                    if content_range != f"bytes {offset}-{(length or 0) - 1}/{length}":
                        state_path.unlink(missing_ok=True)
                        file.truncate(0)
                        raise requests.ConnectionError(f"the file on the server changed ({content_range})")
                else:
                    response.raise_for_status()
                    state = _new_state(url, response)
                    offset, length = 0, state["length"]
                    file.truncate(0)
                    write_atomically(state_path, json.dumps(state).encode())
                for chunk in response.iter_content(_CHUNK):
                    file.write(chunk)
                    report(file.tell(), length)
        file.flush()
        os.fsync(file.fileno())
    if length is not None and file_size(part) != length:
        raise requests.ConnectionError(f"the connection ended after {file_size(part)} of {length} bytes")
    return offset > 0


def _new_state(url: str, response: requests.Response) -> dict[str, Any]:
    """Return the data that identify the version of the file that a server sends.

    The data are stored next to the partial download, so that a later run can check that the file has not changed.

    Returns:
        "url"; "length", the size in bytes or None if it is unknown; and "validator", the ETag or date for the If-Range
        header, or None if the server sends neither.
    """
    encoded = response.raw.headers.get("Content-Encoding", "identity") != "identity"
    size = response.headers.get("Content-Length", "")
    etag = response.headers.get("ETag", "W/")
    return {
        "url": url,
        "length": int(size) if size.isdecimal() and not encoded else None,
        "validator": response.headers.get("Last-Modified") if etag.startswith("W/") else etag,
    }


def _read_state(path: Path, url: str) -> dict[str, Any]:
    """Load the data that `_new_state` returned for a partial download, from the file `path`.

    Returns:
        "length" and "validator". Both are None if the file is missing or damaged, or if the partial download came from
        another address than `url`.
    """
    with suppress(OSError, ValueError, AttributeError):
        state = read_json(path)
        if state.get("url") == url:
            return {"length": state.get("length"), "validator": state.get("validator")}
    return {"length": None, "validator": None}


def _state_path(target: Path) -> Path:
    """Return the path of the file that identifies the version of a partially downloaded file on the server."""
    return target.with_name(f"{target.name}.part.json")


def _reason(error: requests.RequestException) -> str:
    """Return a description of why a request failed, for error messages."""
    if error.response is not None:
        return f"status {error.response.status_code} ({error.response.reason}), expected 200"
    if isinstance(error, requests.Timeout) or "Read timed out" in str(error):
        return "no data from the server for longer than --timeout"
    return f"{type(error).__name__}: {error}"


def remote_size(urls: Sequence[str], options: DownloadOptions) -> int | None:
    """Return the size of a file on the servers in bytes, or None if no server reports the size."""
    for url in options.addresses(urls):
        with suppress(requests.RequestException, ValueError, KeyError):
            headers = {"Accept-Encoding": "identity"}
            response = requests.head(url, timeout=options.timeout, allow_redirects=True, headers=headers)
            if response.status_code == 200:
                return int(response.headers["Content-Length"])
    return None


def file_size(path: Path) -> int:
    """Return the size of a file in bytes, or 0 if it does not exist."""
    return path.stat().st_size if path.is_file() else 0


def published_md5(url: str, target: Path, options: DownloadOptions) -> str:
    """Download the MD5 checksum that the authors publish for a file, and return it as "md5:<digest>".

    Args:
        url: address of a text file that contains the checksum.
        target: path of the downloaded file that the checksum is for, used in error messages.
        options: mirrors, timeout and number of attempts.

    Raises:
        InputError: the text cannot be downloaded or contains no MD5 checksum.
    """
    text = _read_text(url, options, f"the MD5 of {target.name}")
    match = re.search(r"\b[0-9a-f]{32}\b", text.lower())
    if match is None:
        raise InputError(f"{url}: starts with {text[:40]!r}; expected an MD5 of 32 hexadecimal digits; try again later")
    return f"md5:{match[0]}"


def _read_text(url: str, options: DownloadOptions, name: str) -> str:
    """Return the first 1000 bytes of a short text file on a server.

    Args:
        url: official address of the file.
        options: mirrors, timeout and number of attempts.
        name: description of the file for the error message.

    Raises:
        InputError: the text cannot be downloaded.
    """
    addresses, problem = options.addresses([url]), ""
    for attempt in range(options.tries):
        if attempt:
            time.sleep(min(options.pause * 2 ** (attempt - 1), 60))
        for address in list(addresses):
            try:
                headers = {"Accept-Encoding": "identity"}
                with requests.get(address, timeout=options.timeout, headers=headers, stream=True) as response:
                    response.raise_for_status()
                    return next(response.iter_content(1000), b"").decode("ascii", "replace")
            except requests.RequestException as error:
                problem = _reason(error)
                if error.response is not None and 400 <= error.response.status_code < 500:
                    addresses.remove(address)  # The server would refuse another request, too.
        if not addresses:
            break
    raise InputError(f"{url}: {name} cannot be read ({problem}); run the command again later")


def recorded_sha256(target: Path) -> str | None:
    """Return the SHA-256 that was recorded when a file was first downloaded, as "sha256:<digest>".

    If no SHA-256 was recorded, return None.
    """
    path = checksum_file(target, "sha256")
    digest = path.read_text(errors="replace")[:64] if path.is_file() else ""
    return f"sha256:{digest}" if re.fullmatch("[0-9a-f]{64}", digest) else None


def record_checksum(target: Path, algorithm: str, digest: str | None = None) -> None:
    """Record the checksum of a verified file in the same folder.

    Args:
        target: the file.
        algorithm: "md5" or "sha256".
        digest: checksum in hexadecimal digits; by default, it is computed from the file.
    """
    text = f"{digest or _digest(target, algorithm)}  {target.name}\n"
    write_atomically(checksum_file(target, algorithm), text.encode())


def checksum_file(target: Path, algorithm: str) -> Path:
    """Return the path of the file that contains the checksum of `target`; `algorithm` is "md5" or "sha256"."""
    return target.with_name(f"{target.name}.{algorithm}")


def checksum_problem(path: Path, checksum: str | None) -> str | None:
    """Compare a file with its expected checksum, "<algorithm>:<digest>".

    Returns:
        A description of the difference, or None if the checksum is right or `checksum` is None.
    """
    algorithm, _, expected = (checksum or "").partition(":")
    if not expected or (digest := _digest(path, algorithm)) == expected:
        return None
    origin = {
        "md5": "(published)",
        "sha256": "(first download; remove the .sha256 file in the same folder to accept the new version)",
    }
    return f"its {algorithm} is {digest}: expected {expected} {origin[algorithm]}"


def _digest(path: Path, algorithm: str) -> str:
    """Compute the hash of a file with the given algorithm, and return it in hexadecimal digits."""
    with open_file(path) as file:
        return hashlib.file_digest(file, algorithm).hexdigest()
