"""The official hosts on a local server: the tiny toy set packed as they pack theirs, served well or badly."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from superglobal.data.catalogue import SOURCES, Remote

Member = tuple[str, bytes]


def packed(members: Iterable[Member | tarfile.TarInfo], compressed: bool = True) -> bytes:
    """A tar file of (name, content), or of headers as they are."""
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


def key(url: str) -> str:
    """Where the server has what is officially at `url`."""
    return url.partition("://")[2]


def toy_files(name: str, toy: Path) -> dict[str, bytes]:
    """All that is officially had for a source, with the toy set's photos in it: address (`key`) -> content."""
    source = SOURCES[name]
    if name.startswith("gldv2"):
        files = {key(file.urls[0]): _list(toy / "gldv2" / file.path) for file in source.files}
        photos = sorted((toy / "gldv2" / source.images).rglob("*.jpg")) if source.archives else []
        members = [(str(photo.relative_to(photo.parents[3])), photo.read_bytes()) for photo in photos]
        return files | _archives(source.archives, members, compressed=False)
    if name == "revisitop1m":
        files = {key(source.files[0].urls[0]): (toy / "toy_distractors" / "toy_distractors.txt").read_bytes()}
        photos = sorted((toy / "toy_distractors" / "jpg").iterdir())
        return files | _archives(source.archives, [(f"./{photo.name}", photo.read_bytes()) for photo in photos])
    files = {key(source.files[0].urls[0]): (toy / "toy" / "gnd_toy.pkl").read_bytes()}
    folder = "./" if name == "roxford5k" else "paris/tower/"
    members = [(f"{folder}{photo.name}", photo.read_bytes()) for photo in sorted((toy / "toy" / "jpg").iterdir())]
    members += [(f"paris/x/{corrupt}", b"<html>gone</html>") for corrupt in sorted(source.corrupt)]
    return files | _archives(source.archives, members)


def _list(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b"landmark_id,category\n101,x\n"  # of those that the toy set lacks


def _archives(archives: tuple[Remote, ...], members: list[Member], compressed: bool = True) -> dict[str, bytes]:
    files = {}
    for number, archive in enumerate(archives):
        data = files[key(archive.urls[0])] = packed(members[number :: len(archives)], compressed)
        if archive.md5:
            files[key(archive.md5)] = f"{hashlib.md5(data).hexdigest()}  {archive.name}\n".encode()
    return files


class Office(ThreadingHTTPServer):
    """Serves `files`, with HEAD, ranges and If-Range; `served` counts the bytes of each that GET has given.

    Attributes:
        cut: address -> bytes after which the next answer ends.
        stall: address -> bytes after which every answer is silent for as long as the server lives.
        status: address -> what is answered in place of the file.
        claimed: address -> length that HEAD says.
        ranges: whether they are served.
        etags: whether files have one.
        encoding: what the server calls the compression of its files.
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
        self.over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address) -> None:
        """A client that was killed."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Office

    def log_message(self, *_) -> None:
        """Nothing."""

    def do_HEAD(self) -> None:
        self._answer(head=True)

    def do_GET(self) -> None:
        self._answer(head=False)

    def _answer(self, head: bool) -> None:
        office, name = self.server, self.path.partition("://")[2] or self.path[1:]
        data, status = office.files.get(name), office.status.get(name)
        if not head:
            office.requests[name] += 1
        if status or data is None:
            self.send_response(status or 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        etag = f'"{hashlib.sha1(data).hexdigest()}"'
        first = self._first(etag, len(data))
        if first is not None and first >= len(data):
            self.send_response(416)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200 if first is None else 206)
        if first is not None:
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        body = data[first or 0 :]
        self.send_header("Content-Length", str(office.claimed.get(name, len(body)) if head else len(body)))
        if office.etags:
            self.send_header("ETag", etag)
        if office.encoding:
            self.send_header("Content-Encoding", office.encoding)
        self.end_headers()
        if not head:
            self._send(name, body)

    def _first(self, etag: str, length: int) -> int | None:
        wanted, same = self.headers.get("Range"), self.headers.get("If-Range", etag) == etag
        return int(wanted[6:-1]) if wanted and same and self.server.ranges else None

    def _send(self, name: str, body: bytes) -> None:
        office = self.server
        end = office.cut.pop(name, office.stall.get(name))
        self.wfile.write(body[:end])
        office.served[name] += len(body[:end])
        if name in office.stall:
            self.wfile.flush()
            office.over.wait(30)
        if end is not None:
            self.close_connection = True


@contextmanager
def serving(files: dict[str, bytes]) -> Iterator[Office]:
    """A server of `files`, meanwhile."""
    with Office() as office:
        office.files = dict(files)
        thread = threading.Thread(target=office.serve_forever, args=[0.02], daemon=True)
        thread.start()
        yield office
        office.over.set()
        office.shutdown()
        thread.join()
