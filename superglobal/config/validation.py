"""What the types of a configuration cannot say: choices, ranges, contradictions."""

from __future__ import annotations

from typing import TypeVar

from omegaconf import DictConfig, OmegaConf

from superglobal.config.evaluation import CompareConfig, EvalConfig, check_evaluation, complete_rerank
from superglobal.config.page import DemoConfig, check_page
from superglobal.config.training import TrainConfig, check_training
from superglobal.config.tuning import TuneConfig, check_tuning
from superglobal.errors import InputError
from superglobal.models.pooling import relup_mode

__all__ = ["complete_rerank", "validated"]
C = TypeVar("C", EvalConfig, CompareConfig, DemoConfig, TrainConfig, TuneConfig)


def validated(cfg: DictConfig, schema: type[C]) -> C:
    """Composed configuration as typed objects.

    Raises:
        InputError: a setting is missing, out of its choices, or contradicts another.
    """
    missing = sorted(str(key) for key in OmegaConf.missing_keys(cfg))
    if missing:
        raise InputError(
            f"missing settings: {', '.join(missing)}; give them on the command line, e.g. {missing[0]}=..."
        )
    config = OmegaConf.to_object(cfg)
    assert isinstance(config, schema)
    if isinstance(config, EvalConfig):
        check_evaluation(config)
        if isinstance(config, DemoConfig):
            check_page(config)
    elif isinstance(config, TrainConfig):
        check_training(config)
    else:
        check_tuning(config)
        return config
    if config.pooling.relup is not None:
        relup_mode(config.pooling.relup)
    return config
