"""Read the files that W&B and TensorBoard write."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK, HEADER = 32768, 7  # W&B writes the log format of LevelDB after a header of 7 bytes


@dataclass
class OfflineRun:
    """Content of an offline run."""

    run: Any = None
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None
    """None if the run was not finished."""


def records(path: Path) -> Iterator[Any]:
    """Yield the records of a .wandb file in order."""
    data, position, parts = path.read_bytes(), HEADER, b""
    while position + HEADER <= len(data):
        remaining = BLOCK - position % BLOCK
        if remaining < HEADER:
            position += remaining
            continue
        _, size, kind = struct.unpack("<IHB", data[position : position + HEADER])
        if position + HEADER + size > len(data):
            return
        parts += data[position + HEADER : position + HEADER + size]
        position += HEADER + size
        if kind in (1, 4):  # a complete record, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def read_offline_run(folder: Path) -> OfflineRun:
    """Read the newest run in a result folder, and wait until the W&B service has written its last records."""
    path = sorted(folder.glob("wandb/offline-run-*/*.wandb"))[-1]
    deadline = time.monotonic() + 10
    while (run := _read(path)).exit_code is None and time.monotonic() < deadline:
        time.sleep(0.1)
    return run


def _read(path: Path) -> OfflineRun:
    run = OfflineRun()
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.run = record.run
            _update(run.config, record.run.config.update)
        elif kind == "config":
            _update(run.config, record.config.update)
        elif kind == "summary":
            _update(run.summary, record.summary.update)
        elif kind == "history":
            run.history.append({})
            _update(run.history[-1], record.history.item)
        elif kind == "artifact":
            run.artifacts[record.artifact.name] = record.artifact
        elif kind == "exit":
            run.exit_code = record.exit.exit_code
    return run


def _update(target: dict[str, Any], items: Any) -> None:
    for item in items:
        *outer, last = list(item.nested_key) or [item.key]
        section = target
        for key in outer:
            section = section.setdefault(key, {})
        section[last] = json.loads(item.value_json)


def table(run: OfflineRun, name: str) -> tuple[list[str], list[list[Any]], dict[str, Path]]:
    """Return columns, rows and image files (by their names in the rows) of a logged table."""
    (artifact,) = [value for key, value in run.artifacts.items() if key.endswith(f"-{name}")]
    files = {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}
    content = json.loads(files[f"{name}.table.json"].read_text())
    return content["columns"], content["data"], files


def references(run: OfflineRun, kind: str) -> list[str]:
    """Return the locations that the artifacts of a kind refer to."""
    artifacts = [artifact for artifact in run.artifacts.values() if artifact.type == kind]
    return [entry.ref for artifact in artifacts for entry in artifact.manifest.contents if entry.ref]


def events(folder: Path) -> Any:
    """Load all TensorBoard events below a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(
        str(folder), size_guidance=dict.fromkeys(("scalars", "images", "tensors", "histograms"), 0)
    )
    accumulator.Reload()
    return accumulator
