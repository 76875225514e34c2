"""Define the commands configured by Hydra: evaluate (eval.py), train (train.py), tune, compare-rerankers and serve."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from superglobal.config import conf_dir, register, reject_old_settings
from superglobal.errors import InputError

_process_arguments: list[str] | None = None


def evaluate(arguments: Sequence[str] | None = None) -> int:
    """Run an evaluation; without `arguments`, as in `python eval.py`, Hydra reads those of the process."""
    return _run("eval", _evaluate, arguments)


def train(arguments: Sequence[str] | None = None) -> int:
    """Run a training; without `arguments`, as in `python train.py`, Hydra reads those of the process."""
    return _run("train", _train, arguments)


def tune(arguments: Sequence[str] | None = None) -> int:
    """Tune the settings of pooling and reranking."""
    return _run("tune", _tune, arguments)


def compare_rerankers(arguments: Sequence[str] | None = None) -> int:
    """Compare rerankers on the same search results."""
    return _run("compare", _compare_rerankers, arguments)


def serve(arguments: Sequence[str] | None = None) -> int:
    """Serve the search page until Ctrl-C is pressed."""
    return _run("serve", _serve, arguments)


def _run(config_name: str, task: Callable[[DictConfig], Any], arguments: Sequence[str] | None) -> int:
    """Compose the configuration and run the task once, or once per job of a sweep.

    Hydra reads `sys.argv` and would take the name of the command for a setting, so this function removes the name.
    Lightning starts further processes with the `sys.argv` of the running task, so `_output_dir` restores it.
    """
    global _process_arguments
    try:
        reject_old_settings(sys.argv[1:] if arguments is None else arguments)
    except InputError as error:
        _print_error(error)
        return 2
    _process_arguments = sys.argv
    if arguments is not None:
        sys.argv = [sys.argv[0], *arguments]
    try:
        register()
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=config_name)(task)()
    finally:
        sys.argv = _process_arguments
    return 0


def _output_dir() -> Path:
    """Restore `sys.argv` and return the results folder of this job."""
    if _process_arguments is not None:  # It is None in a process that a cluster launcher started.
        sys.argv = _process_arguments
    return Path(HydraConfig.get().runtime.output_dir)


def _print_error(error: InputError, every_process: bool = False) -> None:
    if every_process or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {error}", file=sys.stderr)


def _evaluate(cfg: DictConfig) -> float:
    """Run one evaluation; a sweeper reads the returned mAP."""
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
    """Run one training; a sweeper reads the returned validation mAP."""
    from superglobal.training.train import train
    from superglobal.training.trainer import sweeping

    folder = _output_dir()
    try:
        return train(cfg, folder)
    except InputError as error:
        # An error such as a corrupt image may occur in only one of several processes, so each process prints its own.
        _print_error(error, every_process=True)
        if not sweeping():
            sys.exit(2)
        return math.nan


def _tune(cfg: DictConfig) -> float:
    """Run one tuning; a sweeper reads the returned gain."""
    from superglobal.tuning.tune import tune

    folder = _output_dir()
    try:
        return tune(cfg, folder)
    except InputError as error:
        _print_error(error)
        sys.exit(2)


def _compare_rerankers(cfg: DictConfig) -> None:
    from superglobal.evaluation.compare_rerankers import compare

    folder = _output_dir()
    sources = [Path(source.path) for source in HydraConfig.get().runtime.config_sources if source.schema == "file"]
    try:
        compare(cfg, folder, sources)
    except InputError as error:
        _print_error(error)
        sys.exit(2)


def _serve(cfg: DictConfig) -> None:
    from superglobal.search_page.serve import serve

    try:
        serve(cfg)
    except InputError as error:
        _print_error(error)
        sys.exit(2)
