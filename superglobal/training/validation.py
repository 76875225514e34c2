"""How well the network retrieves, while it is trained."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import Subset

from superglobal.data.datamodules import (
    HeldOutDataset,
    ImageDataset,
    ImageLoader,
    first_item,
    init_worker,
    worker_start_method,
)
from superglobal.data.evaluation_set import EvaluationSet, leave_one_out_truth
from superglobal.data.images import ImageItem
from superglobal.data.train_dataset import CorruptImageList
from superglobal.errors import InputError
from superglobal.metrics.evaluate import evaluate
from superglobal.metrics.revisited import LABELS, REVISITED
from superglobal.models.network import RetrievalNetwork
from superglobal.training.callbacks import StepCallback, any_rank, side_group
from superglobal.training.module import TrainingModule
from superglobal.utils.precision import full_precision

log = logging.getLogger(__name__)


class RetrievalValidation(StepCallback):
    """mAP of held-out landmarks, each photo searched for among all others ("val/map", 0..1), and of evaluation sets.

    Photos are described at one scale, as in training, in float32 whatever the training's precision, and scored by the
    functions that score an evaluation. The network with the best "val/map" is exported; the evaluation sets
    ("<name>/map/easy" and so on) are watched, nothing is chosen by them. The start is validated too, so that what
    cannot work shows before the first epoch and the curve has a beginning.

    Args:
        photos: of whole landmarks that are not trained on; those that cannot be read are left out and go into `bad`.
        bad: list of bad photos, by the index in the held-out list.
        every_epochs, every_steps: how often; the end of training always has one.
        sets: evaluation sets.
        patience: validations without a new best after which training stops.
        export: writes the network as (network, val/map, step); called in the first process for every new best.
        num_workers: processes that decode ahead.
        asked_to_stop: whether this process is to end; a validation is then broken off, and made up for when the
            training goes on.
    """

    def __init__(
        self,
        photos: HeldOutDataset,
        bad: CorruptImageList,
        *,
        every_epochs: int,
        every_steps: int | None,
        sets: Sequence[EvaluationSet],
        patience: int | None,
        export: Callable[[RetrievalNetwork, float, int], None],
        num_workers: int,
        asked_to_stop: Callable[[], bool],
    ) -> None:
        self.photos = photos
        self.bad = bad
        self.every_epochs = every_epochs
        self.every_steps = every_steps
        self.sets = sets
        self.patience = patience
        self.export = export
        self.num_workers = num_workers
        self.asked_to_stop = asked_to_stop
        self.best = -1.0
        self.stale = 0
        self.owed = False
        self.group: Any = None

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "stale": self.stale, "owed": self.owed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.stale, self.owed = state_dict["best"], state_dict["stale"], state_dict["owed"]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # The first process alone has looked at the photos and left out the bad ones.
        self.photos.indices = trainer.strategy.broadcast(self.photos.indices)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        self.group = side_group(trainer)
        if self.owed:
            self._choose(trainer, pl_module)
        # It may have been killed when it had stopped and was about to say so.
        trainer.should_stop = self._given_up()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        if trainer.global_step == 0:
            self._validate(trainer, pl_module)

    def on_step(self, trainer: pl.Trainer, module: TrainingModule, epoch_ends: bool) -> None:
        step = trainer.global_step
        due = epoch_ends and (trainer.current_epoch + 1) % self.every_epochs == 0
        due |= step == module.total_steps or (self.every_steps is not None and step % self.every_steps == 0)
        if due:
            self._choose(trainer, module)

    def _choose(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        """Validate, and export what is better than all before."""
        step = trainer.global_step
        score = self._validate(trainer, module)
        self.owed = score is None
        if score is None:
            return
        self.stale = 0 if score > self.best else self.stale + 1
        if score > self.best:
            self.best = score
            if trainer.is_global_zero:
                self.export(module.result, score, step)
        if self._given_up():
            log.info("no better validation in %d: stopped at step %d", self.stale, step)
            trainer.should_stop = True

    def _given_up(self) -> bool:
        return self.patience is not None and self.stale >= self.patience

    def _validate(self, trainer: pl.Trainer, module: TrainingModule) -> float | None:
        """mAP of the held-out photos, in every process; None if the run is asked to stop meanwhile."""
        with module.pause(), module.evaluating() as network:
            if trainer.world_size > 1:
                # Batch norm's running statistics are each process's own until DDP's next forward pass.
                for buffer in network.buffers():
                    torch.distributed.broadcast(buffer, 0)
            X, faults = self._described(trainer, network, self.photos)
            if X is None:
                return None
            if faults:
                self.bad.add([(int(self.photos.indices[row]), str(error)) for row, error in faults])
                self.photos.drop([row for row, _ in faults])
                X = np.delete(X, [row for row, _ in faults], axis=0)
            values = {}
            if trainer.is_global_zero:
                exclude = np.arange(len(X))
                result = evaluate(X, X, leave_one_out_truth(self.photos.labels), LABELS, exclude=exclude, samples=1)
                score = result.map["all"]
                if score is None or not np.isfinite(score):
                    raise InputError(
                        "no held-out landmark has two photos that can be read; raise validation.fraction or "
                        "validation.max_images, or mend the photos (superglobal prepare-gldv2 lists them)"
                    )
                values["val/map"] = score
            for one in self.sets:
                Q, no_query = self._described(trainer, network, listed(one.queries))
                X, no_image = self._described(trainer, network, listed(one.database))
                for _, error in (*no_query, *no_image):
                    raise error
                if Q is None or X is None:
                    return None
                if trainer.is_global_zero:
                    scores = evaluate(Q, X, one.gnd, REVISITED, clusters=one.clusters, samples=1).map
                    values |= {f"{one.name}/map/{protocol}": value for protocol, value in scores.items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        if trainer.is_global_zero:
            self._tell(trainer, module, values)
        best: float = trainer.strategy.broadcast(values.get("val/map", 0.0))
        return best

    def _loader(self, share: Subset, processes: int, device: torch.device) -> ImageLoader:
        return ImageLoader(
            share,
            num_workers=self.num_workers,
            collate_fn=first_item,
            pin_memory=device.type == "cuda",
            worker_init_fn=init_worker,
            multiprocessing_context=worker_start_method(processes, self.num_workers),
        )

    def _tell(self, trainer: pl.Trainer, module: TrainingModule, values: dict[str, float]) -> None:
        others = "".join(f", {name} {value:.4f}" for name, value in values.items() if name != "val/map")
        if trainer.global_step == 0:
            log.info("before training: validation mAP %.4f%s", values["val/map"], others)
            return
        epoch = math.ceil(trainer.global_step * module.optim.epochs / module.total_steps)
        place = f"epoch {epoch}, step {trainer.global_step} of {module.total_steps}"
        loss = "" if math.isnan(module.loss) else f"loss {module.loss:.3f}, "
        log.info("%s: %svalidation mAP %.4f%s", place, loss, values["val/map"], others)

    def _described(
        self, trainer: pl.Trainer, network: RetrievalNetwork, images: ImageDataset | HeldOutDataset
    ) -> tuple[np.ndarray | None, list[tuple[int, InputError]]]:
        """In every process, each of which describes its share: (n, D) float32 descriptors, zero for those that cannot
        be read, and why they cannot; None if the run is asked to stop meanwhile.
        """
        device = network.mean.device
        share = Subset(images, range(trainer.global_rank, len(images), trainer.world_size))
        X = torch.zeros(len(images), network.dim, device=device)
        faults: list[tuple[int, InputError]] = []
        with torch.inference_mode(), full_precision(), _any_size():
            for (_, row), image in self._loader(share, trainer.world_size, device):
                if self.asked_to_stop():
                    break
                if isinstance(image, InputError):
                    faults.append((row, image))
                else:
                    X[row] = network(image[None].to(device, non_blocking=True))[0]
        if any_rank(self.group, self.asked_to_stop())[0]:
            return None, []
        if trainer.world_size > 1:
            # Every row is some process's, and zero in all others: the sum is exact.
            torch.distributed.all_reduce(X)
            gathered: list[list[tuple[int, InputError]]] = [[] for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(gathered, faults)
            faults = [fault for part in gathered for fault in part]
        return X.cpu().numpy(), faults


@contextmanager
def _any_size() -> Iterator[None]:
    """Without cuDNN's search for the fastest algorithm, which begins anew for every size of image."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def listed(items: Sequence[ImageItem]) -> ImageDataset:
    """All images of a list, at their own size."""
    return ImageDataset([(items, None)], [(0, row) for row in range(len(items))])
