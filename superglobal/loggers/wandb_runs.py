"""Runs of Weights & Biases: started without ever asking, offline without a key, always finished."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb
from pytorch_lightning.loggers import WandbLogger

from superglobal.config import LoggerConfig, TrainConfig
from superglobal.files import write_atomically
from superglobal.reporting.report import plain_types

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
