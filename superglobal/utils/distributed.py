"""Identify the first process of a run, count the available CPUs, and control how processes end."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Windows lacks SIGUSR1 and SIGUSR2.
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT") if hasattr(signal, name)
)
"""Signals that end a training run after the current step."""


def first_process() -> bool:
    """Return True if this process has the global rank 0. Only the process with this rank writes files.

    The rank is read from the environment variables of torchrun, Lightning or SLURM, in the order that Lightning uses.
    """
    if int(os.environ.get("NODE_RANK", 0)) > 0:
        return False
    ranks = (os.environ.get(key) for key in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    return int(next((rank for rank in ranks if rank is not None), 0)) == 0


def available_cpus() -> int:
    """Return the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def exit_on_interrupt() -> None:
    """Make Ctrl-C end this process immediately, with status 130, without waiting for its threads.

    Use this only in commands that write every file atomically or can resume it. Otherwise, the interrupted command
    could leave an incomplete file.
    """

    def exit_now(number: int, frame: object) -> None:
        os.write(2, b"\ninterrupted: run the same command again to resume\n")
        os._exit(130)

    signal.signal(signal.SIGINT, exit_now)


class _PipeOutput(io.FileIO):
    """Output file that ends the process quietly when nobody reads the pipe any more, as in `command | head`.

    SIGPIPE would do the same, but also for lost network connections. The first write that fails exits with the status
    of this signal in a shell; later output is discarded.
    """

    discards = False

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            if in_main_thread() and not self.discards:  # In another thread, only the thread would end.
                self.discards = True
                sys.exit(128 + 13)
            return len(data)


@contextmanager
def exit_on_closed_output() -> Iterator[None]:
    """Let the body of a `with` statement end quietly when the reader of its output has ended, as in `command | head`.

    BrokenPipeError would otherwise appear as a traceback, or as an error of the file that is being written. Characters
    that the encoding of the output lacks are escaped.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        if stream is not None and stream is getattr(sys, f"__{name}__") and not stream.isatty():
            file = io.BufferedWriter(_PipeOutput(stream.fileno(), "w", closefd=False))
            options = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
            setattr(sys, name, io.TextIOWrapper(file, stream.encoding, stream.errors, **options))
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()


def in_main_thread() -> bool:
    """Return True if the caller runs in the main thread. Python allows only this thread to set signal handlers."""
    return threading.current_thread() is threading.main_thread()


def end_with_parent() -> None:
    """Start a thread that ends this process as soon as its parent ends or is killed.

    In a process that `multiprocessing` did not start, do nothing. The thread does not check the parent process ID
    (`os.getppid`), because it would be the ID of the fork server if such a server started this process. The server may
    outlive the process that requested the start.
    """
    parent = multiprocessing.parent_process()

    def watch() -> None:
        assert parent is not None
        parent.join()
        os._exit(1)

    if parent is not None:
        threading.Thread(target=watch, daemon=True).start()
