"""How far a download is: a bar on a terminal, elsewhere a line per tenth and at least one in 30 seconds."""

from __future__ import annotations

import sys
import threading
import time

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from superglobal.download.transfer import Report


class StoppedError(Exception):
    """Another file's failure, or the user, has ended the whole."""


class News:
    """Told by several threads; also what ends them.

    Args:
        title: of the whole.
        total: bytes that are to come in all, None if no server says it.
    """

    def __init__(self, title: str, total: int | None = None) -> None:
        self.title, self.total = title, total
        self.stopped = threading.Event()
        self._lock, self._sizes = threading.Lock(), dict[str, int]()
        self._tenths, self._said = dict[str, int](), time.monotonic()
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            columns = BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
            self._bar = Progress(TextColumn("{task.description}"), *columns, console=Console(stderr=True))
            self._task = self._bar.add_task(title, total=total)

    def __enter__(self) -> News:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def of(self, name: str) -> Report:
        """What the transfer of a file tells.

        Raises (when told):
            StoppedError: `stopped` is set.
        """

        def report(size: int, length: int | None) -> None:
            if self.stopped.is_set():
                raise StoppedError
            with self._lock:
                self._sizes[name] = size
                self._show(name, size, length)

        return report

    def _show(self, name: str, size: int, length: int | None) -> None:
        done, total, what = sum(self._sizes.values()), self.total, ""
        if total is None:
            done, total, what = size, length, f" {name}"
        if self._bar:
            self._bar.update(self._task, completed=done, total=total)
            return
        tenth = done * 10 // total if total else 0
        if tenth > self._tenths.get(what, 0) or time.monotonic() > self._said + 30:
            self._tenths[what], self._said = tenth, time.monotonic()
            of = f" of {total / 1e6:.1f}" if total else ""
            print(f"{self.title}{what}: {done / 1e6:.1f}{of} MB", file=sys.stderr, flush=True)
