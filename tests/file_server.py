"""Local server of the toy images in archives like the official ones; it can also simulate failures."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from superglobal.data.download_links import SOURCES, RemoteFile
from superglobal.download.fetch import DownloadOptions

Member = tuple[str, bytes]


def pack(members: Iterable[Member | tarfile.TarInfo], compressed: bool = True) -> bytes:
    """Return a tar file of members given as (name, content) or as complete headers."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            header = tarfile.TarInfo(member[0])
            header.size = len(member[1])
            tar.addfile(header, io.BytesIO(member[1]))
    return gzip.compress(buffer.getvalue(), 1) if compressed else buffer.getvalue()


def address(url: str) -> str:
    """Return the address on the local server of an official URL."""
    return url.partition("://")[2]


def toy_files(name: str, toy: Path) -> dict[str, bytes]:
    """Return all files of a source with the toy images in its archives: address -> content."""
    source = SOURCES[name]
    if name.startswith("gldv2"):
        files = {address(file.urls[0]): _list(toy / "gldv2" / file.path) for file in source.files}
        images = sorted((toy / "gldv2" / source.image_folder).rglob("*.jpg")) if source.archives else []
        members = [(str(image.relative_to(image.parents[3])), image.read_bytes()) for image in images]
        return files | _archives(source.archives, members, compressed=False)
    if name == "revisitop1m":
        files = {address(source.files[0].urls[0]): (toy / "toy_distractors" / "toy_distractors.txt").read_bytes()}
        images = sorted((toy / "toy_distractors" / "jpg").iterdir())
        return files | _archives(source.archives, [(f"./{image.name}", image.read_bytes()) for image in images])
    files = {address(source.files[0].urls[0]): (toy / "toy" / "gnd_toy.pkl").read_bytes()}
    folder = "./" if name == "roxford5k" else "paris/tower/"
    members = [(f"{folder}{image.name}", image.read_bytes()) for image in sorted((toy / "toy" / "jpg").iterdir())]
    members += [(f"paris/x/{corrupt}", b"<html>gone</html>") for corrupt in sorted(source.corrupt)]
    return files | _archives(source.archives, members)


def _list(path: Path) -> bytes:
    return (
        path.read_bytes() if path.is_file() else b"landmark_id,category\n101,x\n"
    )  # the toy set does not have this list


def _archives(archives: tuple[RemoteFile, ...], members: list[Member], compressed: bool = True) -> dict[str, bytes]:
    files = {}
    for number, archive in enumerate(archives):
        data = files[address(archive.urls[0])] = pack(members[number :: len(archives)], compressed)
        if archive.md5_url:
            files[address(archive.md5_url)] = f"{hashlib.md5(data).hexdigest()}  {archive.name}\n".encode()
    return files


class FileServer(ThreadingHTTPServer):
    """Serve `files`, with HEAD, ranges and If-Range.

    Attributes:
        files: address -> content.
        served: address -> bytes that GET has sent.
        requests: address -> number of GET requests.
        cut: address -> bytes after which the next response ends.
        stall: address -> bytes after which every response sends nothing more.
        status: address -> status sent instead of the file.
        claimed: address -> length that HEAD claims.
        ranges: whether ranges are supported.
        etags: whether responses have an ETag.
        encoding: Content-Encoding that the server claims.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.cut: dict[str, int] = {}
        self.stall: dict[str, int] = {}
        self.status: dict[str, int] = {}
        self.claimed: dict[str, int] = {}
        self.served: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        self.ranges = self.etags = True
        self.encoding: str | None = None
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def options(self, tries: int = 3, timeout: float = 5, **others) -> DownloadOptions:
        """Return options that download from this server."""
        return DownloadOptions((self.url,), timeout, tries, pause=0.01, **others)

    def handle_error(self, request, client_address) -> None:
        """Ignore clients that were killed."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FileServer

    def log_message(self, *_) -> None:
        """Print nothing."""

    def do_HEAD(self) -> None:
        self._respond(head=True)

    def do_GET(self) -> None:
        self._respond(head=False)

    def _respond(self, head: bool) -> None:
        server, name = self.server, self.path.partition("://")[2] or self.path[1:]
        data, status = server.files.get(name), server.status.get(name)
        if not head:
            server.requests[name] += 1
        if status or data is None:
            self.send_response(status or 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        etag = f'"{hashlib.sha1(data).hexdigest()}"'
        first = self._first(etag)
        if first is not None and first >= len(data):
            self.send_response(416)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200 if first is None else 206)
        if first is not None:
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        body = data[first or 0 :]
        self.send_header("Content-Length", str(server.claimed.get(name, len(body)) if head else len(body)))
        if server.etags:
            self.send_header("ETag", etag)
        if server.encoding:
            self.send_header("Content-Encoding", server.encoding)
        self.end_headers()
        if not head:
            self._send(name, body)

    def _first(self, etag: str) -> int | None:
        wanted, same = self.headers.get("Range"), self.headers.get("If-Range", etag) == etag
        return int(wanted[6:-1]) if wanted and same and self.server.ranges else None

    def _send(self, name: str, body: bytes) -> None:
        server = self.server
        end = server.cut.pop(name, server.stall.get(name))
        self.wfile.write(body[:end])
        server.served[name] += len(body[:end])
        if name in server.stall:
            self.wfile.flush()
            server.closing.wait(30)
        if end is not None:
            self.close_connection = True


@contextmanager
def serve(files: dict[str, bytes]) -> Iterator[FileServer]:
    """Run a server of `files`."""
    with FileServer() as server:
        server.files = dict(files)
        thread = threading.Thread(target=server.serve_forever, args=[0.02], daemon=True)
        thread.start()
        yield server
        server.closing.set()
        server.shutdown()
        thread.join()


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Wait until a condition is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
