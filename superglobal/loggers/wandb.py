"""Runs of Weights & Biases: started without ever asking, offline without a key, always finished."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import wandb
from PIL import Image
from pytorch_lightning.loggers import WandbLogger

from superglobal.config.common import LoggerConfig
from superglobal.config.evaluation import EvalConfig
from superglobal.config.training import TrainConfig
from superglobal.loggers.record import Evaluated, spread
from superglobal.reporting.results import plain_types
from superglobal.utils.io import write_atomically
from superglobal.utils.provenance import git_state

log = logging.getLogger(__name__)
_PATIENCE = 30  # seconds for a server to answer; WANDB_INIT_TIMEOUT says otherwise
_INTERRUPTED = 255  # what W&B shows as killed


class TrackedRun:
    """A run in a folder, with the id that a run there had before.

    Args:
        settings: project, entity, tags.
        folder: of the run; W&B's files lie in its `wandb/`.
        name: in W&B's lists.
        job_type: "train" or "eval".
        group: the sweep that it is a job of; None for none.
        tags: beside those of the settings.
        config: plain types.
    """

    def __init__(
        self,
        settings: LoggerConfig,
        folder: Path,
        *,
        name: str,
        job_type: str,
        group: str | None,
        tags: Sequence[str],
        config: Mapping[str, Any],
    ) -> None:
        # W&B would stage the pictures of tables in the home folder, from where an offline run uploads them later.
        self.staging = None if "WANDB_DATA_DIR" in os.environ else str((folder / "wandb").resolve())
        if self.staging:
            os.environ["WANDB_DATA_DIR"] = self.staging
        options = {
            "project": settings.project,
            "entity": settings.entity,
            "name": name[:128],
            "group": None if group is None else group[:128],
            "job_type": job_type,
            "tags": [tag[:64] for tag in dict.fromkeys([*settings.tags, *tags]) if tag],
            "dir": folder,
            "id": _run_id(folder),
            "resume": "allow",
            "config": plain_types(config),
        }
        try:
            self.run = _start(options, folder)
        except BaseException:
            self._unstage()
            raise

    def finish(self, error: BaseException | None) -> None:
        """End the run as what became of it."""
        try:
            code = 0
            if isinstance(error, Exception):
                code = 1
                self.run.summary.update({"status": "failed", "error": str(error) or type(error).__name__})
            elif error is not None:  # Ctrl-C, SIGTERM
                code = _INTERRUPTED
                self.run.summary["status"] = "interrupted"
            self.run.finish(exit_code=code)
        finally:
            self._unstage()

    def log_reference(self, name: str, kind: str, path: Path, metadata: Mapping[str, Any], checksum: bool) -> None:
        """An artifact that says where something lies; nothing of it is copied or uploaded.

        Args:
            name, kind: of the artifact.
            path: of a file or folder.
            metadata: plain types.
            checksum: whether the contents are read, so that other contents are another version of the artifact.
        """
        artifact = wandb.Artifact(re.sub(r"[^\w.-]", "-", name)[:128], kind, metadata=plain_types(metadata))
        artifact.add_reference(f"file://{path.resolve()}", name=path.name, checksum=checksum)
        self.run.log_artifact(artifact)

    def _unstage(self) -> None:
        if self.staging and os.environ.get("WANDB_DATA_DIR") == self.staging:
            del os.environ["WANDB_DATA_DIR"]


def _start(options: dict[str, Any], folder: Path) -> wandb.Run:
    mode: Any = _mode()
    timeout = float(os.environ.get("WANDB_INIT_TIMEOUT", _PATIENCE))
    settings = wandb.Settings(silent=True, init_timeout=timeout)
    try:
        run = wandb.init(**options, mode=mode, settings=settings)
    except wandb.Error as error:  # no answer, or a key that is refused
        if mode == "offline":
            raise
        log.warning("W&B online failed (%s); offline from here on", str(error).splitlines()[0])
        wandb.teardown()  # it still holds the run's id
        # The other jobs of a sweep need not wait as long again.
        os.environ["WANDB_MODE"] = mode = "offline"
        run = wandb.init(**options, mode=mode, settings=settings)
    if mode == "offline":
        log.info("W&B offline: `wandb sync %s/wandb/offline-run-*` uploads it", folder)
    elif run.url:
        log.info("W&B: %s", run.url)
    return run


def _mode() -> str:
    """What WANDB_MODE or `wandb offline` says; online only with a key, since without one W&B would ask for it."""
    mode = os.environ.get("WANDB_MODE") or wandb.setup().settings.mode
    if mode in ("online", "shared", "run") and not _has_key():
        if "WANDB_MODE" in os.environ:
            log.warning("WANDB_MODE=%s, but there is no key (`wandb login`, WANDB_API_KEY): offline", mode)
        return "offline"
    return "offline" if mode == "dryrun" else mode


def _has_key() -> bool:
    """A key may come from the environment, a settings file or `wandb login`; looking for it needs no network."""
    with contextlib.redirect_stderr(io.StringIO()):  # it would say so at every job of a sweep
        return wandb.login(prompt=False, verify=False)


def _run_id(folder: Path) -> str:
    """W&B's id of the run in this folder, the same after it was interrupted."""
    path = folder / "wandb_id"
    if not path.is_file():
        write_atomically(path, uuid.uuid4().hex[:8].encode())
    return path.read_text().strip()


class WandbTraining:
    """A training's curves, and at its end its best network as an artifact.

    Args:
        config: of the run.
        settings: the same and further facts, as plain types.
        folder: of the run.
        export: where its best network will lie.
        sweep: that it is a job of; None for none.
    """

    def __init__(
        self, config: TrainConfig, settings: Mapping[str, Any], folder: Path, export: Path, sweep: str | None
    ) -> None:
        tags = [Path(config.data.root).name, config.backbone.name]
        self.tracked = TrackedRun(
            config.logger, folder, name=config.name, job_type="train", group=sweep, tags=tags, config=settings
        )
        self.config, self.export = config, export
        self.tracked.run.define_metric("val/map", summary="max")
        self.curves = WandbCurves(experiment=self.tracked.run)

    def log(self, found: Any) -> None:
        """Lightning logs to `curves`."""

    def close(self, error: BaseException | None) -> None:
        try:
            if error is None and self.export.is_file():
                about = {"run": self.config.name, "backbone": self.config.backbone.name}
                self.tracked.log_reference(f"model-{self.config.name}", "model", self.export, about, checksum=True)
        finally:
            self.tracked.finish(error)


class WandbCurves(WandbLogger):
    """W&B that is given up, with a warning, at its first failure."""

    given_up = False

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        try:
            if not self.given_up:
                super().log_metrics(*args, **kwargs)
        except Exception as error:
            self.given_up = True
            log.warning("W&B failed (%s); the curves go on in curves.csv", error)


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
        if shown := spread(len(found.names.queries), self.config.logger.images):
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
        ranks = self.config.figures.ranks
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
        ranks = self.config.figures.ranks
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
