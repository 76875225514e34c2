"""What watches over a training."""

from superglobal.callbacks.curves import Curves
from superglobal.callbacks.guards import BadPhotoGuard, NonFiniteGuard
from superglobal.callbacks.saving import AtomicCheckpoints, Checkpoints, newest_good
from superglobal.callbacks.steps import StepSeed
from superglobal.callbacks.validation import RetrievalValidation

__all__ = [
    "AtomicCheckpoints",
    "BadPhotoGuard",
    "Checkpoints",
    "Curves",
    "NonFiniteGuard",
    "RetrievalValidation",
    "StepSeed",
    "newest_good",
]
