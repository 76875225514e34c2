"""Validate a network during training by its mAP on held-out landmarks and on evaluation sets."""

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
from superglobal.data.images import ImageItem, ImageList
from superglobal.data.train_dataset import CorruptImageList
from superglobal.errors import InputError
from superglobal.metrics.evaluate import evaluate
from superglobal.metrics.revisited import LABELS, REVISITED
from superglobal.models.network import RetrievalNetwork
from superglobal.training.callbacks import StepCallback, any_rank, cpu_process_group
from superglobal.training.module import TrainingModule
from superglobal.utils.norms import network_norms
from superglobal.utils.precision import full_precision

log = logging.getLogger(__name__)


class RetrievalValidation(StepCallback):
    """Validate the network by its mAP on held-out images and on evaluation sets.

    Each held-out image is a query that is searched for among all other held-out images. The mAP of these queries is
    logged as "val/map" (0..1), and the network with the highest val/map is exported. The mAP on the evaluation sets
    ("<name>/map/easy" and so on) is only logged. Descriptors are extracted at one scale, as in training, and in strict
    float32. The mAP is computed by the same functions as in an evaluation. The initial network is validated too, so
    that errors appear before the first epoch.

    Args:
        held_out: images of landmarks that are not used for training; corrupt images are dropped.
        corrupt_images: the run's list of corrupt images, to which corrupt held-out images are added.
        every_epochs: number of epochs between validations; the last step is always validated.
        every_steps: number of steps between further validations; None to validate only after epochs.
        sets: evaluation sets.
        patience: number of successive validations without a new best val/map after which training stops; None for no
            limit.
        export: function that exports a network; it takes the network, its val/map and the step. The first process calls
            this function for each new best val/map.
        num_workers: number of processes that decode images.
        asked_to_stop: function that returns True if this process has received a signal to end the run. A validation in
            progress is then canceled, and is repeated when the run is resumed.
    """

    def __init__(
        self,
        held_out: HeldOutDataset,
        corrupt_images: CorruptImageList,
        *,
        every_epochs: int,
        every_steps: int | None,
        sets: Sequence[EvaluationSet],
        patience: int | None,
        export: Callable[[RetrievalNetwork, float, int], None],
        num_workers: int,
        asked_to_stop: Callable[[], bool],
    ) -> None:
        self.held_out = held_out
        self.corrupt_images = corrupt_images
        self.every_epochs = every_epochs
        self.every_steps = every_steps
        self.sets = sets
        self.patience = patience
        self.export = export
        self.num_workers = num_workers
        self.asked_to_stop = asked_to_stop
        self.best = -1.0
        self.stale = 0
        self.pending = False  # true if a validation was canceled and must be repeated
        self.group: Any = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state for checkpoints.

        It is the best val/map, the number of validations since then, and whether a validation was canceled and must be
        repeated.
        """
        return {"best": self.best, "stale": self.stale, "owed": self.pending}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned when the checkpoint was saved."""
        self.best, self.stale, self.pending = state_dict["best"], state_dict["stale"], state_dict["owed"]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Only the first process has checked the images. It sends the indices of the valid images to all others.
        self.held_out.indices = trainer.strategy.broadcast(self.held_out.indices)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        self.group = cpu_process_group(trainer)
        if self.pending:
            self._validate_and_export(trainer, pl_module)
        # The interrupted run may have been killed after its last validation exhausted `patience`, but before it
        # stopped. In this case, the resumed run stops at once.
        trainer.should_stop = self._out_of_patience()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        if trainer.global_step == 0:
            self._validate(trainer, pl_module)

    def on_step(self, trainer: pl.Trainer, module: TrainingModule, epoch_ends: bool) -> None:
        step = trainer.global_step
        due = epoch_ends and (trainer.current_epoch + 1) % self.every_epochs == 0
        due |= step == module.total_steps or (self.every_steps is not None and step % self.every_steps == 0)
        if due:
            self._validate_and_export(trainer, module)

    def _validate_and_export(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        """Validate the network, and export it if its val/map is the best so far.

        If `patience` is exhausted, training stops. If the validation is canceled, it is marked as pending.
        """
        step = trainer.global_step
        score = self._validate(trainer, module)
        self.pending = score is None
        if score is None:
            return
        self.stale = 0 if score > self.best else self.stale + 1
        if score > self.best:
            self.best = score
            if trainer.is_global_zero:
                self.export(module.result, score, step)
        if self._out_of_patience():
            log.info("no better result in %d validations: stopped at step %d", self.stale, step)
            trainer.should_stop = True

    def _out_of_patience(self) -> bool:
        """Return whether training must stop, because the last `patience` validations gave no new best val/map."""
        return self.patience is not None and self.stale >= self.patience

    def _validate(self, trainer: pl.Trainer, module: TrainingModule) -> float | None:
        """Validate the network on the held-out images and on the evaluation sets, and log the mAP of each set.

        Returns:
            The mAP on the held-out images (0..1), the same value in all processes; None if the validation was canceled,
            in which case nothing is logged.

        Raises:
            InputError: an image of an evaluation set is corrupt, no landmark has two valid held-out images, or a
                descriptor is not a unit vector.
        """
        with module.pause(), module.evaluating() as network:
            if trainer.world_size > 1:
                # After a training step, each process has its own batch norm statistics. DDP synchronizes them only in
                # the next forward pass, so the statistics of the first process are copied to the other processes here.
                for buffer in network.buffers():
                    torch.distributed.broadcast(buffer, 0)
            X, faults = self._extract(trainer, network, self.held_out)
            if X is None:
                return None
            if faults:
                self.corrupt_images.add([(int(self.held_out.indices[row]), str(error)) for row, error in faults])
                self.held_out.drop([row for row, _ in faults])
                X = np.delete(X, [row for row, _ in faults], axis=0)
            values = {"val/map": self._held_out_map(X)} if trainer.is_global_zero else {}
            for dataset in self.sets:
                Q, query_faults = self._extract(trainer, network, _whole_images(dataset.queries))
                X, image_faults = self._extract(trainer, network, _whole_images(dataset.database))
                for _, error in (*query_faults, *image_faults):
                    raise error
                if Q is None or X is None:
                    return None
                if trainer.is_global_zero:
                    scores = evaluate(Q, X, dataset.gnd, REVISITED, clusters=dataset.clusters, samples=1).map
                    values |= {f"{dataset.name}/map/{protocol}": value for protocol, value in scores.items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        if trainer.is_global_zero:
            self._report(trainer, module, values)
        score: float = trainer.strategy.broadcast(values.get("val/map", 0.0))
        return score

    def _held_out_map(self, X: np.ndarray) -> float:
        """Return the mAP on the held-out images; each image is a query and is excluded from its own results.

        Args:
            X: (n, D) descriptors of the held-out images.

        Returns:
            The mAP, in 0..1.

        Raises:
            InputError: no landmark has two valid images.
        """
        truth = leave_one_out_truth(self.held_out.labels)
        score = evaluate(X, X, truth, LABELS, exclude=np.arange(len(X)), samples=1).map["all"]
        if score is None or not np.isfinite(score):
            raise InputError(
                "no held-out landmark has two valid images; raise validation.fraction or validation.max_images, or "
                "repair the corrupt images (for GLDv2, superglobal prepare-gldv2 lists them)"
            )
        return score

    def _loader(self, images: Subset, processes: int, device: torch.device) -> ImageLoader:
        """Return a data loader that yields one image at a time.

        Args:
            images: images that are assigned to this process.
            processes: number of processes of the run, on which the start method of the loader's workers depends.
            device: device to which the images are copied.
        """
        return ImageLoader(
            images,
            num_workers=self.num_workers,
            collate_fn=first_item,
            pin_memory=device.type == "cuda",
            worker_init_fn=init_worker,
            multiprocessing_context=worker_start_method(processes, self.num_workers),
        )

    def _report(self, trainer: pl.Trainer, module: TrainingModule, values: dict[str, float]) -> None:
        """Write the epoch, the step, the loss and the validation mAP to the log as one line of text.

        Args:
            trainer: trainer of the run.
            module: module that is trained.
            values: mAP (0..1) by name, such as "val/map".
        """
        others = "".join(f", {name} {value:.4f}" for name, value in values.items() if name != "val/map")
        if trainer.global_step == 0:
            log.info("before training: validation mAP %.4f%s", values["val/map"], others)
            return
        epoch = math.ceil(trainer.global_step * module.optim.epochs / module.total_steps)
        progress = f"epoch {epoch}, step {trainer.global_step}/{module.total_steps}"
        loss = "" if math.isnan(module.loss) else f"loss {module.loss:.3f}, "
        log.info("%s: %svalidation mAP %.4f%s", progress, loss, values["val/map"], others)

    def _extract(
        self, trainer: pl.Trainer, network: RetrievalNetwork, images: ImageDataset | HeldOutDataset
    ) -> tuple[np.ndarray | None, list[tuple[int, InputError]]]:
        """Extract the descriptors of all images; the work is divided among the processes.

        Returns:
            The descriptors (n, D) float32, or None if the validation is canceled; and a list with the row and the error
            of each corrupt image, whose descriptor is zero. All processes return the same values.
        """
        device = network.mean.device
        subset = Subset(images, range(trainer.global_rank, len(images), trainer.world_size))
        X = torch.zeros(len(images), network.dim, device=device)
        faults: list[tuple[int, InputError]] = []
        with torch.inference_mode(), full_precision(), _without_cudnn_benchmark():
            for (_, row), image in self._loader(subset, trainer.world_size, device):
                if self.asked_to_stop():
                    break
                if isinstance(image, InputError):
                    faults.append((row, image))
                else:
                    X[row] = network(image[None].to(device, non_blocking=True))[0]
        if any_rank(self.group, self.asked_to_stop())[0]:
            return None, []
        if trainer.world_size > 1:
            # Each image is extracted by one process. Its row is zero in all other processes, so the sum is exact.
            torch.distributed.all_reduce(X)
            faults_by_rank: list[list[tuple[int, InputError]]] = [[] for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(faults_by_rank, faults)
            faults = [fault for faults in faults_by_rank for fault in faults]
        values = X.cpu().numpy()
        network_norms(
            np.delete(values, [row for row, _ in faults], axis=0), lambda _: f"validation at step {trainer.global_step}"
        )
        return values, faults


@contextmanager
def _without_cudnn_benchmark() -> Iterator[None]:
    """Disable cuDNN's search for the fastest algorithm within a `with` statement.

    cuDNN would repeat this search for each new image size, and almost every validation image has a different size.
    """
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _whole_images(items: Sequence[ImageItem]) -> ImageDataset:
    """Return a dataset that loads images at full size, without shrinking any of them."""
    return ImageDataset([ImageList(items, None)], [(0, row) for row in range(len(items))])
