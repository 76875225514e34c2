"""Puts the parts together: the only package that knows them all."""

from superglobal.engine.common import TrainingSweep, sweeping
from superglobal.engine.comparing import compare
from superglobal.engine.evaluating import evaluate
from superglobal.engine.fitting import train
from superglobal.engine.serving import serve
from superglobal.engine.sweeps import EvaluationSweep
from superglobal.engine.tuning import tune

__all__ = ["EvaluationSweep", "TrainingSweep", "compare", "evaluate", "serve", "sweeping", "train", "tune"]
