"""Define the commands that Hydra configures: evaluate (eval.py), train (train.py), tune, compare-rerankers and serve.

Each command returns its exit status. If `arguments` is None, as in `python eval.py`, Hydra reads the command line of
the process.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from superglobal.config import ENTRIES, conf_dir, prepare_arguments, register
from superglobal.config.common import FILE_NAME, RUN_NAME, validate_name
from superglobal.errors import InputError
from superglobal.utils.distributed import exit_on_closed_output
from superglobal.utils.io import write_error
from superglobal.utils.memory import keep_freed_memory

_process_arguments: list[str] | None = None


def evaluate(arguments: Sequence[str] | None = None) -> int:
    """Run the command `evaluate`: evaluate retrieval on a data set. Return the exit status."""
    return _run("eval", _evaluate, arguments)


def train(arguments: Sequence[str] | None = None) -> int:
    """Run the command `train`: train a network. Return the exit status."""
    return _run("train", _train, arguments)


def tune(arguments: Sequence[str] | None = None) -> int:
    """Run the command `tune`: choose pooling and reranking settings without the test set. Return the exit status."""
    return _run("tune", _tune, arguments)


def compare_rerankers(arguments: Sequence[str] | None = None) -> int:
    """Run the command `compare-rerankers`: compare rerankers on the same search results. Return the exit status."""
    return _run("compare", _compare_rerankers, arguments)


def serve(arguments: Sequence[str] | None = None) -> int:
    """Run the command `serve`: serve the search page until Ctrl-C is pressed. Return the exit status."""
    return _run("serve", _serve, arguments)


@exit_on_closed_output()
def _run(config_name: str, task: Callable[[DictConfig], Any], arguments: Sequence[str] | None) -> int:
    """Let Hydra compose the configuration, and run the task with this configuration.

    In a sweep, the task runs once per job, each time with the configuration of this job.

    Hydra reads the settings from `sys.argv`, and would take the name of the command for a setting. This function
    therefore replaces the arguments in `sys.argv` by `arguments`. Lightning copies `sys.argv` to start further
    processes, so `_output_dir` restores the original `sys.argv` before the task starts.

    Args:
        config_name: name of the main configuration file in `conf`.
        task: function to run; its argument is the composed configuration.
        arguments: settings and options of Hydra; None for the command line of the process.

    Returns:
        The exit status.
    """
    global _process_arguments
    _process_arguments = sys.argv
    if arguments is not None:
        sys.argv = [sys.argv[0], *arguments]
    keep_freed_memory()
    entry = next(entry for entry in ENTRIES if entry.name == config_name)
    try:
        register()
        sys.argv = [sys.argv[0], *prepare_arguments(entry, sys.argv[1:])]
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=config_name)(task)()
    except InputError as error:
        _print_error(error)
        return 2
    finally:
        sys.argv = _process_arguments
    return 0


class OutputFolder(Callback):
    """Hydra callback that creates the folder of the results, or of a sweep, before Hydra writes into it."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        try:
            for setting, kind in (("name", RUN_NAME), ("dataset.name", FILE_NAME)):
                with contextlib.suppress(OmegaConfBaseException):  # A missing setting is reported later.
                    if (value := OmegaConf.select(config, setting)) is not None:
                        validate_name(setting, str(value), kind)
        except InputError as error:
            _print_error(error)
            sys.exit(2)
        self._create(config.hydra.run.dir)

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        self._create(config.hydra.sweep.dir)

    def _create(self, folder: str) -> None:
        """Create a folder. If files cannot be created in it, print an error and exit with status 2."""
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            _print_error(write_error(Path(folder), error, "change paths.outputs"))
            sys.exit(2)


def _output_dir() -> Path:
    """Restore the `sys.argv` that `_run` replaced, and return the folder for the results of this job."""
    # In a process that a cluster launcher of Hydra started, `_run` was not called, and there is nothing to restore.
    if _process_arguments is not None:
        sys.argv = _process_arguments
    return Path(HydraConfig.get().runtime.output_dir)


def _print_error(error: InputError, every_process: bool = False) -> None:
    """Print an error to stderr.

    Args:
        error: error to print.
        every_process: whether every process prints the error; by default, only the first process of each machine does.
    """
    if every_process or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {error}", file=sys.stderr)


def _evaluate(cfg: DictConfig) -> float:
    """Run one evaluation, and return its mAP, which Hydra's sweepers read.

    If an evaluation in a sweep fails, print the error, record it in the results folder, and return NaN.
    """
    from superglobal.evaluation.pipeline import evaluate
    from superglobal.reporting.results import write_status
    from superglobal.training.trainer import sweeping

    folder = _output_dir()
    try:
        return evaluate(cfg, folder)
    except InputError as error:
        _print_error(error)
        if not sweeping():
            sys.exit(2)
        write_status(folder, OmegaConf.to_container(cfg, resolve=True), "failed", str(error))
        return math.nan


def _train(cfg: DictConfig) -> float:
    """Run one training job, and return its validation mAP, which Hydra's sweepers read.

    If a job in a sweep fails, print the error and return NaN.
    """
    from superglobal.training.train import train
    from superglobal.training.trainer import sweeping

    folder = _output_dir()
    try:
        return train(cfg, folder)
    except InputError as error:
        # An error such as a corrupt image may occur in only one of several processes, so each process prints its error.
        _print_error(error, every_process=True)
        if not sweeping():
            sys.exit(2)
        return math.nan


def _tune(cfg: DictConfig) -> float:
    """Run one tuning job, and return its gain in mAP over the paper's settings, which Hydra's sweepers read."""
    from superglobal.tuning.tune import tune

    folder = _output_dir()
    try:
        return tune(cfg, folder)
    except InputError as error:
        _print_error(error)
        sys.exit(2)


def _compare_rerankers(cfg: DictConfig) -> None:
    """Compare rerankers. If the input is invalid, print the error and exit with status 2."""
    from superglobal.evaluation.compare_rerankers import compare

    folder = _output_dir()
    sources = [Path(source.path) for source in HydraConfig.get().runtime.config_sources if source.schema == "file"]
    try:
        compare(cfg, folder, sources)
    except InputError as error:
        _print_error(error)
        sys.exit(2)


def _serve(cfg: DictConfig) -> None:
    """Serve the search page. If the input is invalid, print the error and exit with status 2."""
    from superglobal.search_page.serve import serve

    try:
        serve(cfg)
    except InputError as error:
        _print_error(error)
        sys.exit(2)
