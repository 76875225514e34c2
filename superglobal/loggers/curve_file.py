"""The curves of a training as a CSV."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from superglobal.errors import InputError
from superglobal.files import write_atomically


class CurveFile(Logger):
    """A CSV with a row per step, one column per number, that a resumed run goes on writing.

    Args:
        path: of the file.
        step: where the run goes on; rows beyond it are dropped.
    """

    def __init__(self, path: Path, step: int) -> None:
        super().__init__()
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path.is_file() and step:
            # A row that was cut off has no end of line.
            whole = path.read_text().rpartition("\n")[0]
            self.rows = [row for row in csv.DictReader(io.StringIO(whole)) if int(row["step"]) <= step]
        self.columns: list[str] = list(dict.fromkeys(key for row in self.rows for key in row)) or ["step"]
        self.fresh = True

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """They are in training.json."""

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        row = {"step": step, **metrics}
        self.rows.append(row)
        new = [key for key in row if key not in self.columns]
        self.columns += new
        if new or self.fresh:
            write_atomically(self.path, self._text(self.rows, header=True).encode())
            self.fresh = False
        else:
            try:
                with self.path.open("a", newline="") as file:
                    file.write(self._text([row], header=False))
            except OSError as error:
                raise InputError(f"{self.path}: cannot be written ({error.strerror}); free space") from error

    def _text(self, rows: list[dict[str, Any]], header: bool) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, restval="", lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()
