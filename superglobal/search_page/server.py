"""The page's server: the data set's pictures by number, Gradio for the rest, and every other door shut."""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from superglobal.config.tuning import DemoConfig
from superglobal.errors import InputError

if TYPE_CHECKING:
    from superglobal.search_page.image_search import Opened
log = logging.getLogger(__name__)
# Gradio also serves what was uploaded, fetches addresses for whoever asks, and more that this page has no use for.
_NEEDED = re.compile(
    r"/|/(photos|assets|static|svelte)/.*|/(theme\.css|favicon\.ico|manifest\.json|config|robots\.txt)/?|"
    r"/gradio_api/(upload|upload_progress|run/predict|heartbeat/\w+|startup-events)/?"
)
# Whatever a script may want, the browser asks nobody else.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; frame-ancestors 'none'"
)


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens at the address.

    Raises:
        InputError: it is taken, or is none of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as found:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((host, port))
            found.listen(128)
        except OSError as error:
            raise InputError(
                f"page.host={host} page.port={port}: cannot listen there ({error.strerror or error}); page.port=0 "
                "takes any free port"
            ) from error
        yield found


def run_server(config: DemoConfig, opened: Opened, sock: socket.socket) -> None:
    """Serve the page on a listening socket until Ctrl-C or SIGTERM; uploads are gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="superglobal-page-") as uploads:
        # Gradio reads these when it is imported: uploads of this page alone, nothing told to anybody.
        os.environ.update(GRADIO_TEMP_DIR=uploads, GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")
        import uvicorn

        app = make_app(config, opened, Path(uploads))
        # An open page holds a connection, which is not waited for.
        options: dict[str, Any] = {"log_level": "warning", "access_log": False, "timeout_graceful_shutdown": 1}
        server = uvicorn.Server(uvicorn.Config(app, **options))
        logging.getLogger("uvicorn.error").addFilter(lambda _: not server.should_exit)
        # uvicorn hands the signal on when it has ended; what was uploaded is to be removed first.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        host, port = sock.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        if _own_names(config.page.host) is None:
            log.warning("page.host=%s: whoever reaches this machine can search, and sees these photos", host)
        print(f"the page: http://{shown}:{port}    (Ctrl-C ends it)", flush=True)
        try:
            server.run(sockets=[sock])
        except KeyboardInterrupt:
            print("the page is closed", flush=True)


def make_app(config: DemoConfig, opened: Opened, uploads: Path) -> Any:
    """The ASGI application.

    Args:
        uploads: folder of uploaded files.
    """
    import gradio as gr
    from fastapi import FastAPI, Response

    from superglobal.search_page.page import make_page
    from superglobal.search_page.thumbnails import Thumbnails

    pictures = Thumbnails({"database": opened.search.images, "queries": opened.queries})
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/photos/{version}/{title}/{size}/{number}.jpg")
    def photo(version: str, title: str, size: str, number: int) -> Response:
        data = pictures.jpeg(title, number, size)
        if data is None:
            return Response(status_code=404)
        headers = {"Cache-Control": "private, max-age=86400", "X-Content-Type-Options": "nosniff"}
        return Response(data, media_type="image/jpeg", headers=headers)

    page, look = make_page(config, opened, uploads)
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
    app.add_middleware(_Doors, own_names=_own_names(config.page.host))
    return app


def _own_names(host: str) -> frozenset[str] | None:
    """How a page for this machine alone is called; None for one that others reach by names unknown here."""
    try:
        alone = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        alone = False
    return frozenset({host, "localhost", "127.0.0.1"}) if alone else None


class _Doors:
    """ASGI middleware: of Gradio's interface only what the page itself calls is answered, to nobody else."""

    def __init__(self, app: Any, own_names: frozenset[str] | None) -> None:
        self.app, self.own_names = app, own_names

    def _refusal(self, scope: Any) -> int | None:
        """The status that a request ends with here."""
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        if self.own_names is not None:
            # A page elsewhere may have its own name resolve to this machine, or send something unasked.
            if urlsplit(f"//{host}").hostname not in self.own_names:
                return 400
            origin = headers.get(b"origin")
            if origin is not None and urlsplit(origin.decode("latin-1")).netloc != host:
                return 403
        return None if _NEEDED.fullmatch(scope["path"]) else 404

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and (status := self._refusal(scope)) is not None:
            await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})
            return

        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", _POLICY.encode())]
            await send(message)

        await self.app(scope, receive, send_with_policy)
