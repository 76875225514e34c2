"""Serve the search page.

The server provides thumbnails of the images of the data set, and those parts of Gradio that the page uses. It rejects
all requests for anything else.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import shutil
import signal
import socket
import stat
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from superglobal.config.search_page import ServeConfig
from superglobal.data.images import CorruptImageError, ImageItem, decode_image, image_size, shrink
from superglobal.errors import InputError
from superglobal.search_page.html import encode_jpeg
from superglobal.search_page.image_search import SearchDatabase
from superglobal.utils.io import file_lock, read_file, temporary_folder, write_error

log = logging.getLogger(__name__)
THUMBNAIL_SIDES = {"small": 240, "large": 1280}  # longer side in pixels of the thumbnails of each size
_MAX_DECODED = 4  # maximum number of images decoded at the same time
_CACHED_THUMBNAILS = 4096  # maximum number of small thumbnails in memory, about 15 KB each
# Paths of the requests that are accepted. Without this restriction, Gradio would, for example, also serve uploaded
# files and fetch URLs on request.
_ALLOWED = re.compile(
    r"/|/(photos|assets|static|svelte)/.*|/(theme\.css|favicon\.ico|manifest\.json|config|robots\.txt)/?|"
    r"/gradio_api/(upload|upload_progress|run/predict|heartbeat/\w+|startup-events)/?"
)
# Headers of every response. With this content security policy, the browser sends no requests to other servers, even if
# a script tries to send one. With the resource policy, pages of other servers cannot show the photos.
_HEADERS = [
    (
        b"content-security-policy",
        b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        b"img-src 'self' data: blob:; frame-ancestors 'none'",
    ),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
]
_UPLOADS = "superglobal-page"  # start of the name of the folder that contains the uploads of all servers of a user


class Thumbnails:
    """Create JPEG thumbnails of images; recently used small thumbnails are cached in memory.

    Args:
        lists: lists of images by title, such as "database".
    """

    def __init__(self, lists: Mapping[str, Sequence[ImageItem]]) -> None:
        self._lists = dict(lists)
        self._small = lru_cache(_CACHED_THUMBNAILS)(lambda title, number: self._render(title, number, "small"))
        # Decoding takes tens of MB per image, so the number of images that are decoded at the same time is limited.
        self._decoding = threading.BoundedSemaphore(min(_MAX_DECODED, os.cpu_count() or 1))

    def jpeg(self, title: str, number: int, size: str) -> bytes | None:
        """Return a thumbnail as a JPEG file.

        Args:
            title: title of the list.
            number: index of the image in the list.
            size: "small" or "large", see `THUMBNAIL_SIDES`.

        Returns:
            The contents of the file; None if an argument is invalid, or if the image is missing or corrupt.
        """
        if title not in self._lists or size not in THUMBNAIL_SIDES or not 0 <= number < len(self._lists[title]):
            return None
        try:
            return self._small(title, number) if size == "small" else self._render(title, number, size)
        except (OSError, CorruptImageError):
            return None

    def _render(self, title: str, number: int, size: str) -> bytes:
        """Decode and shrink an image, and return it as the contents of a JPEG file.

        Args:
            title: title of the list.
            number: index of the image in the list.
            size: "small" or "large", see `THUMBNAIL_SIDES`.

        Raises:
            OSError: the file cannot be read.
            CorruptImageError: the file is not a valid image.
        """
        side = THUMBNAIL_SIDES[size]
        with self._decoding:
            data = read_file(self._lists[title][number].path)
            factor = max(image_size(data)) // (2 * side)
            pixels = decode_image(data, next((step for step in (8, 4, 2) if factor >= step), 1))
            return encode_jpeg(shrink(pixels, side))


@contextmanager
def open_socket(host: str, port: int) -> Iterator[socket.socket]:
    """Open a socket that listens on an address.

    Raises:
        InputError: the address is in use, or does not belong to this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(128)
        except OSError as error:
            raise InputError(
                f"page.host={host} page.port={port}: cannot listen on this address ({error.strerror or error}); use "
                "another page.port, or page.port=0 for any free port"
            ) from error
        yield listener


def run_server(config: ServeConfig, database: SearchDatabase, listener: socket.socket, uploads: Path) -> None:
    """Serve the page on a listening socket until Ctrl-C or SIGTERM; `uploads` is the folder of uploaded files."""
    # Gradio reads these variables when it is imported. They set a folder for uploads and disable telemetry.
    os.environ.update(GRADIO_TEMP_DIR=str(uploads), GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")
    import uvicorn

    app = make_app(config, database, uploads)
    # A page that is open in a browser keeps its connection. Without this timeout, a shutdown would wait for it.
    options: dict[str, Any] = {"log_level": "warning", "access_log": False, "timeout_graceful_shutdown": 1}
    server = uvicorn.Server(uvicorn.Config(app, **options))
    logging.getLogger("uvicorn.error").addFilter(lambda _: not server.should_exit)
    # After its shutdown, uvicorn sends SIGTERM to this process again. Without this handler, the signal would end
    # the process before the uploads are deleted.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    host, port = listener.getsockname()[:2]
    if _local_names(config.page.host) is None:
        log.warning("page.host=%s: everyone who can reach this machine can see and search these photos", host)
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    print(f"Open {address} in a browser; press Ctrl-C to stop the server.", flush=True)
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        print("The search page has stopped.", flush=True)


@contextmanager
def upload_folder() -> Iterator[Path]:
    """Create a folder for uploads during a `with` statement. Delete those of servers that were killed.

    Raises:
        InputError: there is no folder for temporary files to which only this user has access.
    """
    parent = _private_folder()
    for folder in [path for path in parent.iterdir() if path.is_dir()]:
        with suppress(InputError), _locked(folder):  # A running server holds the lock of its folder.
            shutil.rmtree(folder, ignore_errors=True)
    folder = parent / uuid.uuid4().hex
    with _locked(folder):
        folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _private_folder() -> Path:
    """Return the folder of the uploads of this user, in the folder for temporary files. Create it if necessary.

    All users can write to the folder for temporary files. Another user must not be able to read the uploads, or to
    redirect files by links that were created in advance.

    Raises:
        InputError: the folder cannot be created, belongs to another user, or is accessible to other users; or there is
            no folder for temporary files.
    """
    user = os.getuid() if hasattr(os, "getuid") else None  # On Windows, each user has a folder for temporary files.
    folder = temporary_folder() / (_UPLOADS if user is None else f"{_UPLOADS}-{user}")
    try:
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        status = folder.lstat()
    except OSError as error:
        raise write_error(folder, error, "set TMPDIR to another folder") from error
    is_private = user is None or (status.st_uid == user and not status.st_mode & 0o077)
    if not stat.S_ISDIR(status.st_mode) or not is_private:
        raise InputError(
            f"{folder}: expected a folder to which only you have access; remove it, or set TMPDIR to another folder"
        )
    return folder


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder of uploads during a `with` statement, and delete the lock afterwards.

    Raises:
        InputError: another process holds the lock, or the lock file cannot be written.
    """
    lock = Path(f"{folder}.lock")
    with file_lock(lock, f"{folder} is in use"):
        try:
            yield
        finally:
            with suppress(OSError):
                lock.unlink()


def make_app(config: ServeConfig, database: SearchDatabase, uploads: Path) -> Any:
    """Create the ASGI application that serves the page; `uploads` is the folder of uploaded files."""
    import gradio as gr
    from fastapi import FastAPI, Response

    from superglobal.search_page.page import make_page

    thumbnails = Thumbnails({"database": database.search.images, "queries": database.queries})
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/photos/{version}/{title}/{size}/{number}.jpg")
    def photo(version: str, title: str, size: str, number: int) -> Response:
        data = thumbnails.jpeg(title, number, size)
        if data is None:
            return Response(status_code=404)
        return Response(data, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=86400"})

    page, look = make_page(config, database, uploads)
    gr.mount_gradio_app(
        app,
        page,
        path="/",
        server_name=config.page.host,
        allowed_paths=[],
        max_file_size=config.page.max_upload * 10**6,
        show_error=False,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        run_history=False,
        footer_links=[],
        **look,
    )
    app.add_middleware(_RequestFilter, local_names=_local_names(config.page.host))
    return app


def _local_names(host: str) -> frozenset[str] | None:
    """Return the host names that the `Host` header of a request may contain.

    Args:
        host: host on which the server listens.

    Returns:
        The allowed host names, if only this machine can reach `host`; None if other machines can reach it, in which
        case any host name is allowed.
    """
    try:
        is_local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_local = False
    return frozenset({host, "localhost", "127.0.0.1"}) if is_local else None


class _RequestFilter:
    """ASGI middleware that rejects requests that the page never sends, and adds security headers to the responses.

    Args:
        app: ASGI application to protect.
        local_names: allowed host names, from `_local_names`; None to allow any.
    """

    def __init__(self, app: Any, local_names: frozenset[str] | None) -> None:
        self.app, self.local_names = app, local_names

    def _rejection(self, scope: Any) -> int | None:
        """Return the HTTP status code with which a request is rejected; None if the request is accepted.

        Args:
            scope: ASGI connection scope of the request.
        """
        headers = dict(scope["headers"])
        host, origin = (headers.get(name, b"").decode("latin-1") for name in (b"host", b"origin"))
        try:
            name, sender = urlsplit(f"//{host}").hostname, urlsplit(origin).netloc
        except ValueError:
            return 400
        # Without these checks, another web site could access the page by resolving its own name to this machine (DNS
        # rebinding), or by sending requests from its own origin.
        if self.local_names is not None and name not in self.local_names:
            return 400
        if origin and sender != host:
            return 403
        return None if _ALLOWED.fullmatch(scope["path"]) else 404

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and (status := self._rejection(scope)) is not None:
            headers = [(b"content-length", b"0"), *_HEADERS]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": b""})
            return

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *_HEADERS]
            await send(message)

        await self.app(scope, receive, send_with_headers)
