"""Print the progress of commands that process many images."""

from __future__ import annotations

import sys
import time


class Progress:
    """Callback that prints the number of finished images to stderr.

    On a terminal, it updates a single line. In a log file, it prints a new line after each tenth of the images, and
    whenever 30 seconds have passed since the previous line.

    Args:
        verb: first word of each line, such as "rendered".
    """

    def __init__(self, verb: str) -> None:
        self.verb = verb
        self.start = self.last_print = time.monotonic()
        self.tenths = 0

    def __call__(self, done: int, total: int) -> None:
        """Report that `done` of `total` images are finished.

        In a log file, print a line only after another tenth of the images or 30 seconds.
        """
        text = f"{self.verb} {done}/{total} images, {time.monotonic() - self.start:.0f} s"
        if sys.stderr.isatty():
            print(f"\r{text}", end="\n" if done == total else "", file=sys.stderr, flush=True)
        elif done * 10 // total > self.tenths or time.monotonic() > self.last_print + 30:
            self.tenths, self.last_print = done * 10 // total, time.monotonic()
            print(text, file=sys.stderr, flush=True)
