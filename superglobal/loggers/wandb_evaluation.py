"""An evaluation in Weights & Biases: numbers, tables with pictures, and where model and descriptors lie."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import wandb
from PIL import Image

from superglobal.config import EvalConfig
from superglobal.loggers.evaluated import Evaluated, spread
from superglobal.loggers.wandb_runs import TrackedRun
from superglobal.reporting.report import git_state, plain_types

_ROWS = 10_000  # as many as W&B shows of a table
_AXES = 64


class WandbEvaluation:
    """The run is open while the evaluation goes on, so that one that fails is seen to have failed.

    Under Lightning's predict loggers do nothing, so the run is used directly.
    """

    def __init__(self, config: EvalConfig, folder: Path, sweep: str | None) -> None:
        self.config, self.folder = config, folder
        dataset = config.dataset.name + (f"+{config.distractors.name}" if config.distractors.name else "")
        name = folder.name if sweep else f"{dataset} {config.ablation or ''}".strip()
        tags = [config.dataset.name, config.distractors.name or "", config.ablation or ""]
        settings = asdict(config)
        self.tracked = TrackedRun(
            config.logger, folder, name=name, job_type="eval", group=sweep, tags=tags, config=settings
        )
        self.tracked.run.summary["status"] = "no result"

    def log(self, found: Evaluated) -> None:
        """All at once: a run has one point."""
        run, summary = self.tracked.run, found.summary
        kept = ("dataset", "role", "tuned_on", "protocol", "counts", "about", "versions")
        facts = {**{key: summary[key] for key in kept}, "git": git_state()}
        run.config.update(plain_types(facts), allow_val_change=True)
        logged: dict[str, Any] = found.numbers()
        if found.results:
            logged["per_query"] = _table(*found.per_query(_ROWS))
        if shown := spread(len(found.names.queries), self.config.logger.pictures):
            logged["rankings"] = _table(*self._rankings(found, shown))
            logged["descriptors"] = _table(*self._descriptors(found, shown))
        if (sheet := self.folder / "sheet.png").exists():
            with Image.open(sheet) as picture:
                logged["sheet"] = _picture(picture)
        run.log(logged)
        run.summary["status"] = summary["status"]
        self._log_references(found)

    def close(self, error: BaseException | None) -> None:
        self.tracked.finish(error)

    def _rankings(self, found: Evaluated, shown: list[int]) -> tuple[list[str], list[list[Any]]]:
        """A row per query: its picture, AP before and after, and its first results as pictures, or as names."""
        ranks = self.config.pictures.ranks
        columns, values = found.per_query(len(found.names.queries))
        rows = []
        for query in shown:
            row = list(values[query]) if found.results else [query, found.names.queries[query], found.landmark(query)]
            row += [_picture(found.picture(query))] if found.has_photos else []
            for stage, (_, ids) in found.stages.items():
                names = ", ".join(found.names.database[i] for i in ids[query, :ranks])
                row.append(_picture(found.ranked(query, stage, ranks), names) if found.has_photos else names)
            rows.append(row)
        photo = ["picture"] if found.has_photos else []
        first = columns if found.results else columns[:3]
        return [*first, *photo, *(f"first results of {stage}" for stage in found.stages)], rows

    def _descriptors(self, found: Evaluated, shown: list[int]) -> tuple[list[str], list[list[Any]]]:
        """Queries and their first results by the principal axes of these descriptors, for W&B's projections."""
        ranks = self.config.pictures.ranks
        ids = list(found.stages.values())[-1][1][shown, :ranks]
        vectors = np.concatenate([found.queries[shown], found.database.take(ids.ravel())]).astype(np.float64)
        axes = _principal(vectors)
        rows = list(self._described(found, shown, ids))
        columns = ["query", "image", "kind", *(["picture"] if found.has_photos else [])]
        columns += [f"axis{i}" for i in range(axes.shape[1])]
        return columns, [[*row, *axis] for row, axis in zip(rows, axes.tolist(), strict=True)]

    def _described(self, found: Evaluated, shown: list[int], ids: np.ndarray) -> Iterator[list[Any]]:
        pictures: dict[int, wandb.Image] = {}  # one image may be found by several queries
        for query in shown:
            name = found.names.queries[query]
            yield [name, name, "query", *([_picture(found.picture(query))] if found.has_photos else [])]
        for query, row in zip(shown, ids.tolist(), strict=True):
            for image in row:
                if found.has_photos and image not in pictures:
                    pictures[image] = _picture(found.thumbnail(image))
                photo = [pictures[image]] if found.has_photos else []
                yield [found.names.queries[query], found.names.database[image], found.relevance(query, image), *photo]

    def _log_references(self, found: Evaluated) -> None:
        about = found.summary["about"]
        network = about.get("network", {})
        if (weights := Path(about["weights"])).is_file():
            facts = {key: network.get(key) for key in ("weights", "backbone", "dim")}
            self.tracked.log_reference(f"model-{weights.parent.name}-{weights.stem}", "model", weights, facts, True)
        for title, store in about.get("stores", {}).items():
            # The fingerprint in its name says what is in a store, which may be gigabytes.
            pattern = f"*-{title}-{store['fingerprint'][:16]}"
            for folder in Path(self.config.paths.stores).glob(pattern):
                facts = {"fingerprint": store["fingerprint"], "dtype": store["dtype"], "network": network}
                self.tracked.log_reference(folder.name, "descriptors", folder, facts, checksum=False)


def _table(columns: list[str], rows: list[list[Any]]) -> wandb.Table:
    # Some columns hold both numbers and nothing.
    return wandb.Table(columns=list(columns), data=rows, allow_mixed_types=True)


def _picture(picture: Image.Image, caption: str | None = None) -> wandb.Image:
    return wandb.Image(picture, caption=caption, file_type="jpg")


def _principal(vectors: np.ndarray) -> np.ndarray:
    """(n, D) -> (n, at most 64): about their mean, by the axes of most variance first."""
    centred = vectors - vectors.mean(axis=0)
    left, scale, _ = np.linalg.svd(centred, full_matrices=False)
    return (left * scale)[:, :_AXES]
