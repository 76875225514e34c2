"""What W&B and TensorBoard have written, read back from their own files."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK, HEADER = 32768, 7  # of the log: LevelDB's format, after 7 bytes of W&B's own


@dataclass
class Recorded:
    """An offline run."""

    run: Any = None
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None
    """None for a run that was never finished."""


def records(path: Path) -> Iterator[Any]:
    """The protocol's records of a .wandb file, in their order."""
    data, place, parts = path.read_bytes(), HEADER, b""
    while place + HEADER <= len(data):
        left = BLOCK - place % BLOCK
        if left < HEADER:
            place += left
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + HEADER])
        if place + HEADER + size > len(data):
            return
        parts += data[place + HEADER : place + HEADER + size]
        place += HEADER + size
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def recorded(folder: Path) -> Recorded:
    """The newest run in a result folder; W&B's service may still be writing its last records."""
    path = sorted(folder.glob("wandb/offline-run-*/*.wandb"))[-1]
    deadline = time.monotonic() + 10
    while (found := _read(path)).exit_code is None and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def _read(path: Path) -> Recorded:
    found = Recorded()
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.run = record.run
            _update(found.config, record.run.config.update)
        elif kind == "config":
            _update(found.config, record.config.update)
        elif kind == "summary":
            _update(found.summary, record.summary.update)
        elif kind == "history":
            found.history.append({})
            _update(found.history[-1], record.history.item)
        elif kind == "artifact":
            found.artifacts[record.artifact.name] = record.artifact
        elif kind == "exit":
            found.exit_code = record.exit.exit_code
    return found


def _update(target: dict[str, Any], items: Any) -> None:
    for item in items:
        *outer, last = list(item.nested_key) or [item.key]
        place = target
        for key in outer:
            place = place.setdefault(key, {})
        place[last] = json.loads(item.value_json)


def table(run: Recorded, name: str) -> tuple[list[str], list[list[Any]], dict[str, Path]]:
    """Columns, rows and pictures (by their names in the rows) of a logged table."""
    (artifact,) = [one for key, one in run.artifacts.items() if key.endswith(f"-{name}")]
    files = {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}
    content = json.loads(files[f"{name}.table.json"].read_text())
    return content["columns"], content["data"], files


def references(run: Recorded, kind: str) -> list[str]:
    """Where the artifacts of a kind say that their contents lie."""
    return [
        entry.ref for one in run.artifacts.values() if one.type == kind for entry in one.manifest.contents if entry.ref
    ]


def events(folder: Path) -> Any:
    """All of TensorBoard's events below a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(
        str(folder), size_guidance=dict.fromkeys(("scalars", "images", "tensors", "histograms"), 0)
    )
    found.Reload()
    return found
