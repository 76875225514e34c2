"""HTTP downloads from a local server that cuts, stalls, changes files or fails."""

from __future__ import annotations

import hashlib
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from file_server import FileServer, serve

from superglobal.download.fetch import DownloadOptions, download_file, part_path
from superglobal.errors import InputError

FILE = "a.example/file"
CHUNK = 1 << 16


@pytest.fixture
def server():
    """Serve one file of 300,000 bytes."""
    with serve({FILE: np.random.default_rng(0).bytes(300_000)}) as server:
        yield server


def download(server: FileServer, target: Path, checksum: str | None = None, **options) -> None:
    """Download the file from the local server."""
    download_file([f"https://{FILE}"], target, server.options(**options), lambda *_: None, checksum)


def test_a_cut_transfer_is_resumed(server, tmp_path):
    server.cut[FILE] = 200_000
    download(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == server.files[FILE]
    assert server.requests[FILE] == 2
    assert 300_000 <= server.served[FILE] < 300_000 + CHUNK
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_later_call_resumes_a_partial_download(server, tmp_path):
    server.cut[FILE] = 200_000
    with pytest.raises(InputError, match=r"file could not be downloaded \(\d+ bytes are on disk\)") as caught:
        download(server, tmp_path / "file", tries=1)
    assert f"{server.url}/{FILE}" in str(caught.value)
    assert "run the command again to resume" in str(caught.value)
    assert part_path(tmp_path / "file").stat().st_size > 100_000
    download(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == server.files[FILE]
    assert server.served[FILE] < 300_000 + CHUNK


@pytest.mark.parametrize("etags", [True, False], ids=["etag", "length only"])
def test_a_file_that_changed_on_the_server_is_downloaded_from_the_start(server, tmp_path, etags):
    server.cut[FILE], server.etags = 200_000, etags
    with pytest.raises(InputError):
        download(server, tmp_path / "file", tries=1)
    server.files[FILE] = np.random.default_rng(1).bytes(300_000 if etags else 310_000)
    download(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == server.files[FILE]


def test_a_file_shorter_than_the_partial_download_is_downloaded_from_the_start(server, tmp_path):
    server.cut[FILE], server.etags = 200_000, False
    with pytest.raises(InputError):
        download(server, tmp_path / "file", tries=1)
    server.files[FILE] = b"short"
    download(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"short"


@pytest.mark.parametrize("tries", [1, 3])
def test_a_damaged_partial_download_is_replaced(server, tmp_path, tries):
    checksum = f"sha256:{hashlib.sha256(server.files[FILE]).hexdigest()}"
    server.cut[FILE] = 200_000
    with pytest.raises(InputError):
        download(server, tmp_path / "file", checksum, tries=1)
    part = part_path(tmp_path / "file")
    part.write_bytes(bytes(part.stat().st_size))
    if tries == 1:
        with pytest.raises(InputError, match="its sha256 is"):
            download(server, tmp_path / "file", checksum, tries=1)
        assert not list(tmp_path.iterdir())
    download(server, tmp_path / "file", checksum, tries=tries)
    assert (tmp_path / "file").read_bytes() == server.files[FILE]


def test_a_server_without_ranges_sends_the_file_from_the_start(server, tmp_path):
    server.cut[FILE], server.ranges = 200_000, False
    download(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == server.files[FILE]


def test_a_download_from_a_silent_server_times_out_and_can_be_resumed(server, tmp_path):
    server.stall[FILE] = 200_000
    start = time.monotonic()
    with pytest.raises(InputError, match="no data from the server for longer than --timeout"):
        download(server, tmp_path / "file", tries=1, timeout=0.3)
    assert time.monotonic() - start < 5
    server.stall.clear()
    download(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == server.files[FILE]
    assert server.served[FILE] < 300_000 + 2 * CHUNK


def test_a_missing_file_is_requested_once(server, tmp_path):
    server.status[FILE] = 404
    with pytest.raises(InputError, match=r"a\.example/file: status 404 \(Not Found\), expected 200") as caught:
        download(server, tmp_path / "file")
    assert "--base-url" in str(caught.value)
    assert server.requests[FILE] == 1


def test_requests_to_an_overloaded_server_are_repeated(server, tmp_path):
    server.status[FILE] = 503
    with pytest.raises(InputError, match="status 503"):
        download(server, tmp_path / "file", tries=3)
    assert server.requests[FILE] == 3


def test_an_unreachable_server_is_named(tmp_path):
    options = DownloadOptions(("http://127.0.0.1:9",), 2, 1)
    with pytest.raises(InputError, match=r"http://127\.0\.0\.1:9/a\.example/file: ConnectionError"):
        download_file([f"https://{FILE}"], tmp_path / "file", options, lambda *_: None)


def test_proxies_come_from_the_environment(server, tmp_path, monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", server.url)
    download_file([f"http://{FILE}"], tmp_path / "file", DownloadOptions(tries=1), lambda *_: None)
    assert (tmp_path / "file").read_bytes() == server.files[FILE]


def test_an_invalid_content_length_is_ignored(tmp_path):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "nonsense")
            self.end_headers()
            self.wfile.write(b"complete")

        def log_message(self, *args):
            """Print nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/f"
        download_file((url,), tmp_path / "f", DownloadOptions(timeout=5, tries=1), lambda *_: None)
        server.shutdown()
    assert (tmp_path / "f").read_bytes() == b"complete"
