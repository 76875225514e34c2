"""Serve the page: thumbnails of the data set by number, of Gradio only what the page uses, and nothing else."""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from superglobal.config.search_page import ServeConfig
from superglobal.data.images import CorruptImageError, ImageItem, decode_image, image_size, shrink
from superglobal.errors import InputError
from superglobal.search_page.html import encode_jpeg
from superglobal.search_page.image_search import SearchDatabase

log = logging.getLogger(__name__)
THUMBNAIL_SIDES = {"small": 240, "large": 1280}  # pixels, longer side
_CACHED_THUMBNAILS = 4096  # small ones, about 15 KB each
# Gradio also serves uploads, fetches URLs on request, and has more that this page does not use.
_ALLOWED = re.compile(
    r"/|/(photos|assets|static|svelte)/.*|/(theme\.css|favicon\.ico|manifest\.json|config|robots\.txt)/?|"
    r"/gradio_api/(upload|upload_progress|run/predict|heartbeat/\w+|startup-events)/?"
)
# The browser sends no request to other servers, whatever a script attempts.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; frame-ancestors 'none'"
)


class Thumbnails:
    """JPEGs of the images of several lists; recent small ones are cached.

    Args:
        lists: title -> images, by number.
    """

    def __init__(self, lists: Mapping[str, Sequence[ImageItem]]) -> None:
        self._lists = dict(lists)
        self._small = lru_cache(_CACHED_THUMBNAILS)(lambda title, number: self._render(title, number, "small"))
        # Decoding takes tens of MB per image, so the number of images at the same time is limited.
        self._decoding = threading.BoundedSemaphore(os.cpu_count() or 1)

    def jpeg(self, title: str, number: int, size: str) -> bytes | None:
        """Return the thumbnail; None for an unknown list, number or size, and for a missing or damaged file."""
        if title not in self._lists or size not in THUMBNAIL_SIDES or not 0 <= number < len(self._lists[title]):
            return None
        try:
            return self._small(title, number) if size == "small" else self._render(title, number, size)
        except (OSError, CorruptImageError):
            return None

    def _render(self, title: str, number: int, size: str) -> bytes:
        side = THUMBNAIL_SIDES[size]
        with self._decoding:
            data = self._lists[title][number].path.read_bytes()
            factor = max(image_size(data)) // (2 * side)
            pixels = decode_image(data, next((step for step in (8, 4, 2) if factor >= step), 1))
            return encode_jpeg(shrink(pixels, side))


@contextmanager
def open_socket(host: str, port: int) -> Iterator[socket.socket]:
    """Open a socket that listens at an address; raises InputError if the address is taken or not of this machine."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(128)
        except OSError as error:
            raise InputError(
                f"page.host={host} page.port={port}: cannot listen there ({error.strerror or error}); page.port=0 "
                "takes any free port"
            ) from error
        yield listener


def run_server(config: ServeConfig, database: SearchDatabase, listener: socket.socket) -> None:
    """Serve the page on a listening socket until Ctrl-C or SIGTERM; then delete the uploads."""
    with tempfile.TemporaryDirectory(prefix="superglobal-page-") as uploads:
        # Gradio reads these when it is imported: a folder for the uploads of this page alone, no telemetry.
        os.environ.update(GRADIO_TEMP_DIR=uploads, GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")
        import uvicorn

        app = make_app(config, database, Path(uploads))
        # An open page holds a connection, which would delay the end of the server.
        options: dict[str, Any] = {"log_level": "warning", "access_log": False, "timeout_graceful_shutdown": 1}
        server = uvicorn.Server(uvicorn.Config(app, **options))
        logging.getLogger("uvicorn.error").addFilter(lambda _: not server.should_exit)
        # uvicorn raises the signal again when it has ended, before the uploads are deleted.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        host, port = listener.getsockname()[:2]
        if _local_names(config.page.host) is None:
            log.warning("page.host=%s: everyone who can reach this machine can search and see these photos", host)
        print(f"the page: http://{f'[{host}]' if ':' in host else host}:{port}    (Ctrl-C ends it)", flush=True)
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:
            print("the page is closed", flush=True)


def make_app(config: ServeConfig, database: SearchDatabase, uploads: Path) -> Any:
    """Return the ASGI application; `uploads` is the folder of uploaded files."""
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
        headers = {"Cache-Control": "private, max-age=86400", "X-Content-Type-Options": "nosniff"}
        return Response(data, media_type="image/jpeg", headers=headers)

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
    """Return the host names of a page for this machine only; None if other machines can reach it."""
    try:
        is_local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_local = False
    return frozenset({host, "localhost", "127.0.0.1"}) if is_local else None


class _RequestFilter:
    """ASGI middleware that rejects requests which the page does not send itself, and adds the security policy."""

    def __init__(self, app: Any, local_names: frozenset[str] | None) -> None:
        self.app, self.local_names = app, local_names

    def _rejection(self, scope: Any) -> int | None:
        """Return the HTTP status of a request that is rejected; None for others."""
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        if self.local_names is not None:
            # Another site may resolve its name to this machine (DNS rebinding), or send requests across origins.
            if urlsplit(f"//{host}").hostname not in self.local_names:
                return 400
            origin = headers.get(b"origin")
            if origin is not None and urlsplit(origin.decode("latin-1")).netloc != host:
                return 403
        return None if _ALLOWED.fullmatch(scope["path"]) else 404

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and (status := self._rejection(scope)) is not None:
            await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})
            return

        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", _POLICY.encode())]
            await send(message)

        await self.app(scope, receive, send_with_policy)
