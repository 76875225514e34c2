"""Log training and evaluation runs to Weights & Biases (W&B).

W&B never prompts the user. Without an API key, the run is logged offline. After an error, the run is finished, too.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import uuid
from collections.abc import Mapping, Sequence
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
from superglobal.data.images import read_image
from superglobal.loggers.csv_tensorboard import StopAfterFailure
from superglobal.loggers.record import EvaluationRecord
from superglobal.reporting.ranking_figures import spread_evenly
from superglobal.reporting.results import plain_types
from superglobal.utils.io import write_atomically
from superglobal.utils.provenance import git_state

log = logging.getLogger(__name__)
_TIMEOUT = 30  # seconds to wait for the server, unless WANDB_INIT_TIMEOUT is set
_INTERRUPTED = 255  # exit code for which W&B shows the status "killed"
_MAX_ROWS = 10_000  # maximum number of rows that W&B shows in a table
_MAX_AXES = 64  # maximum number of principal axes in the table of descriptors


class TrackedRun:
    """W&B run whose files are in the subfolder `wandb/` of the folder of a training or evaluation run.

    The folder also stores the id of the W&B run, so that a resumed training run continues the same W&B run.

    Args:
        settings: settings of the loggers.
        folder: folder of the run.
        name: name of the run in W&B.
        job_type: "train" or "eval".
        group: name of the sweep that the run belongs to; None for a single run.
        tags: further tags, in addition to `settings.tags`.
        config: settings of the run, shown by W&B.
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
        # By default, W&B stores the images of tables in the user's home folder, where `wandb sync` of an offline run
        # later reads them. The variable WANDB_DATA_DIR makes W&B store them in the folder of the run instead.
        self._staging = None if "WANDB_DATA_DIR" in os.environ else str((folder / "wandb").resolve())
        if self._staging:
            os.environ["WANDB_DATA_DIR"] = self._staging
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
            self.run, self.folder = _start(options), folder
        except BaseException:
            self._unset_staging()
            raise

    def finish(self, error: BaseException | None) -> None:
        """Finish the run as successful if `error` is None, as interrupted after Ctrl-C or SIGTERM, else as failed."""
        try:
            code = 0
            if isinstance(error, Exception):
                code = 1
                self.run.summary.update({"status": "failed", "error": str(error) or type(error).__name__})
            elif error is not None:  # after Ctrl-C or SIGTERM, whose exceptions are not subclasses of Exception
                code = _INTERRUPTED
                self.run.summary["status"] = "interrupted"
            self.run.finish(exit_code=code)
            if error is None and self.run.offline:
                log.info("W&B is offline; `wandb sync %s/wandb/offline-run-*` uploads the run", self.folder)
        finally:
            self._unset_staging()

    def log_reference(self, name: str, kind: str, path: Path, metadata: Mapping[str, Any], checksum: bool) -> None:
        """Log an artifact that refers to a file or folder without copying or uploading it.

        Args:
            name: name of the artifact.
            kind: type of the artifact, such as "model".
            path: file or folder.
            metadata: metadata of the artifact.
            checksum: whether to read the contents for a checksum, so that changed contents create a new version.
        """
        artifact = wandb.Artifact(re.sub(r"[^\w.-]", "-", name)[:128], kind, metadata=plain_types(metadata))
        artifact.add_reference(f"file://{path.resolve()}", name=path.name, checksum=checksum)
        self.run.log_artifact(artifact)

    def _unset_staging(self) -> None:
        """Remove the environment variable WANDB_DATA_DIR if this run has set it."""
        if self._staging and os.environ.get("WANDB_DATA_DIR") == self._staging:
            del os.environ["WANDB_DATA_DIR"]


def _start(options: dict[str, Any]) -> wandb.Run:
    """Start a W&B run; start it offline if the server does not respond or rejects the API key.

    Args:
        options: arguments of `wandb.init`.
    """
    mode: Any = _mode()
    timeout = float(os.environ.get("WANDB_INIT_TIMEOUT", _TIMEOUT))
    settings = wandb.Settings(silent=True, init_timeout=timeout)
    try:
        run = wandb.init(**options, mode=mode, settings=settings)
    except wandb.Error as error:  # The server did not respond, or rejected the key.
        if mode == "offline":
            raise
        log.warning("W&B could not start online (%s); this process continues offline", str(error).splitlines()[0])
        wandb.teardown()  # Without this call, the failed start would block the id of the W&B run.
        # The environment variable also applies to the next jobs of a sweep, so they do not wait for the server again.
        os.environ["WANDB_MODE"] = mode = "offline"
        run = wandb.init(**options, mode=mode, settings=settings)
    if mode != "offline" and run.url:
        log.info("W&B shows the run at %s", run.url)
    return run


def _mode() -> str:
    """Return the W&B mode, such as "online" or "offline", that WANDB_MODE or `wandb offline` has set.

    Without an API key, the mode is "offline", because W&B would otherwise ask the user for a key.
    """
    mode = os.environ.get("WANDB_MODE") or wandb.setup().settings.mode
    if mode in ("online", "shared", "run") and not _has_key():
        if "WANDB_MODE" in os.environ:
            log.warning(
                "WANDB_MODE=%s: there is no API key, so the run is offline; set one by `wandb login` or WANDB_API_KEY",
                mode,
            )
        return "offline"
    return "offline" if mode == "dryrun" else mode


def _has_key() -> bool:
    """Return whether an API key is in the environment, the settings or the login file; the key is not verified."""
    with contextlib.redirect_stderr(io.StringIO()):  # hides a line that W&B would print in every job of a sweep
        return wandb.login(prompt=False, verify=False)


def _run_id(folder: Path) -> str:
    """Return the id of the W&B run that is stored in `folder`. The first call creates and stores the id."""
    path = folder / "wandb_id"
    if not path.is_file():
        write_atomically(path, uuid.uuid4().hex[:8].encode())
    return path.read_text().strip()


class WandbCurves(StopAfterFailure, WandbLogger):
    """W&B logger for the curves of a training run."""

    title = "W&B"


class WandbTraining:
    """Tracker for a training run that logs the curves and, at the end, the exported network as an artifact.

    Args:
        config: settings of the training run.
        settings: the settings in `config` and further information about the run, shown by W&B.
        folder: folder of the run.
        export: path of the exported network.
        sweep: name of the sweep that the run belongs to; None for a single run.
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

    def close(self, error: BaseException | None) -> None:
        try:
            if error is None and self.export.is_file():
                metadata = {"run": self.config.name, "backbone": self.config.backbone.name}
                self.tracked.log_reference(f"model-{self.config.name}", "model", self.export, metadata, checksum=True)
        finally:
            self.tracked.finish(error)


class WandbEvaluation:
    """Tracker for an evaluation run. The W&B run starts before the evaluation, so that it also shows failures.

    Args:
        config: settings of the evaluation run.
        folder: folder of the run.
        sweep: name of the sweep that the run belongs to; None for a single run.
    """

    def __init__(self, config: EvalConfig, folder: Path, sweep: str | None) -> None:
        self.config, self.folder = config, folder
        dataset = config.dataset.name + (f"+{config.distractors.name}" if config.distractors.name else "")
        name = folder.name if sweep else f"{dataset} {config.ablation or ''}".strip()
        tags = [config.dataset.name, config.distractors.name or "", config.ablation or ""]
        self.tracked = TrackedRun(
            config.logger, folder, name=name, job_type="eval", group=sweep, tags=tags, config=asdict(config)
        )
        self.tracked.run.summary["status"] = "no result"

    def log(self, record: EvaluationRecord) -> None:
        """Log the scalar results, tables and images of an evaluation in one step.

        The weights and the descriptor stores are logged as references to the files.
        """
        run, summary = self.tracked.run, record.summary
        keys = ("dataset", "role", "tuned_on", "protocol", "counts", "about", "versions")
        facts = {**{key: summary[key] for key in keys}, "git": git_state()}
        run.config.update(plain_types(facts), allow_val_change=True)
        point: dict[str, Any] = record.numbers()
        if record.results:
            point["per_query"] = _table(*record.per_query(_MAX_ROWS))
        if queries := spread_evenly(len(record.names.queries), self.config.logger.images):
            point["rankings"] = _table(*self._rankings(record, queries))
            point["descriptors"] = _table(*self._descriptors(record, queries))
        if (sheet := self.folder / "sheet.png").exists():
            point["sheet"] = _image(Image.fromarray(read_image(sheet)))
        run.log(point)
        run.summary["status"] = summary["status"]
        self._log_references(record)

    def close(self, error: BaseException | None) -> None:
        self.tracked.finish(error)

    def _rankings(self, record: EvaluationRecord, queries: list[int]) -> tuple[list[str], list[list[Any]]]:
        """Return a table of queries, as column names and rows.

        A row contains the scores of a query, its image if images can be shown, and its first results in each stage.

        Args:
            record: results of the evaluation.
            queries: numbers of the queries.
        """
        ranks = self.config.figures.ranks
        columns, values = record.per_query(len(record.names.queries))
        rows = []
        for query in queries:
            row = [*values[query], *([_image(record.query_image(query))] if record.has_images else [])]
            for stage, (_, ids) in record.stages.items():
                names = ", ".join(record.names.database[i] for i in ids[query, :ranks])
                row.append(_image(record.result_images(query, stage, ranks), names) if record.has_images else names)
            rows.append(row)
        image = ["image"] if record.has_images else []
        return [*columns, *image, *(f"first results of {stage}" for stage in record.stages)], rows

    def _descriptors(self, record: EvaluationRecord, queries: list[int]) -> tuple[list[str], list[list[Any]]]:
        """Return a table of the descriptors of queries and of their first results, as column names and rows.

        W&B can show such a table as a two-dimensional projection. The columns `axis0`, `axis1` and so on contain the
        coordinates of the centered descriptors along their principal axes.

        Args:
            record: results of the evaluation.
            queries: numbers of the queries.
        """
        ids = list(record.stages.values())[-1][1][queries, : self.config.figures.ranks]
        X = np.concatenate([record.queries[queries], record.database.take(ids.ravel())]).astype(np.float64)
        left, scale, _ = np.linalg.svd(X - X.mean(axis=0), full_matrices=False)
        axes = (left * scale)[:, :_MAX_AXES]
        images = {i: _image(record.database_image(i)) for i in np.unique(ids).tolist()} if record.has_images else {}
        rows: list[list[Any]] = []
        for query in queries:
            name = record.names.queries[query]
            rows.append([name, name, "query", *([_image(record.query_image(query))] if record.has_images else [])])
        for query, results in zip(queries, ids.tolist(), strict=True):
            name = record.names.queries[query]
            for i in results:
                image = [images[i]] if record.has_images else []
                rows.append([name, record.names.database[i], record.relevance(query, i), *image])
        columns = ["query", "name", "kind", *(["image"] if record.has_images else [])]
        columns += [f"axis{i}" for i in range(axes.shape[1])]
        return columns, [[*row, *axis] for row, axis in zip(rows, axes.tolist(), strict=True)]

    def _log_references(self, record: EvaluationRecord) -> None:
        """Log the weights and the descriptor stores as artifacts that refer to the files, without uploading them."""
        about = record.summary["about"]
        network = about.get("network", {})
        if (weights := Path(about["weights"])).is_file():
            metadata = {key: network.get(key) for key in ("weights", "backbone", "dim")}
            name = f"model-{weights.parent.name}-{weights.stem}"
            self.tracked.log_reference(name, "model", weights, metadata, checksum=True)
        for title, store in about.get("stores", {}).items():
            # A checksum would take long, because it reads gigabytes. It is not needed, because the name of the store
            # contains its fingerprint.
            for folder in Path(self.config.paths.stores).glob(f"*-{title}-{store['fingerprint'][:16]}"):
                metadata = {"fingerprint": store["fingerprint"], "dtype": store["dtype"], "network": network}
                self.tracked.log_reference(folder.name, "descriptors", folder, metadata, checksum=False)


def _table(columns: list[str], rows: list[list[Any]]) -> wandb.Table:
    # `allow_mixed_types` is needed because some columns contain both numbers and None.
    return wandb.Table(columns=list(columns), data=rows, allow_mixed_types=True)


def _image(image: Image.Image, caption: str | None = None) -> wandb.Image:
    return wandb.Image(image, caption=caption, file_type="jpg")
