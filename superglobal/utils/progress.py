"""How far a long command is."""

from __future__ import annotations

import sys
import time


class Progress:
    """One line that is kept up to date on a terminal; elsewhere a line per tenth, and at least one in 30 seconds.

    Args:
        verb: what was done with the photos: "rendered".
    """

    def __init__(self, verb: str) -> None:
        self.verb = verb
        self.start, self.tenth = time.monotonic(), 0
        self.said = self.start

    def __call__(self, done: int, total: int) -> None:
        text = f"{self.verb} {done} of {total} photos, {time.monotonic() - self.start:.0f} s"
        if sys.stderr.isatty():
            print(f"\r{text}", end="\n" if done == total else "", file=sys.stderr, flush=True)
        elif done * 10 // total > self.tenth or time.monotonic() > self.said + 30:
            self.tenth, self.said = done * 10 // total, time.monotonic()
            print(text, file=sys.stderr, flush=True)
