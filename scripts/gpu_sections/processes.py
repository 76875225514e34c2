"""Check that distributed training (DistributedDataParallel) works with the backends NCCL and Gloo."""

from __future__ import annotations

import os
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu_sections.common import OutOfTime, Report, Skip, command, finish


def main(report: Report) -> None:
    """Check NCCL with one process, and Gloo and NCCL with two processes on one device, all at the same time."""
    cases = [("nccl", 1), ("gloo", 2), ("nccl", 2)] if report.cuda else [("gloo", 2)]
    with ThreadPoolExecutor() as pool:
        for backend, world in cases:
            name = f"DDP, {backend}, {world} process{'es' if world > 1 else ''} on one device"
            pool.submit(report.run, name, partial(_run, report, backend, world, name), need=15)


def _run(report: Report, backend: str, world: int, name: str) -> None:
    """Train in several processes, and check that all processes end with the same losses and weights.

    Args:
        report: report of the section.
        backend: backend of the communication, "nccl" or "gloo".
        world: number of processes.
        name: name of the row in the report.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(world):
        # Let each process act as a separate machine with one device, because Lightning does not run two processes of
        # one machine on the same device.
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
        env |= {"NODE_RANK": str(rank), "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
        started.append(command([Path(__file__), backend, world, report.device.type], env))
    try:
        texts = [finish(process, min(60, report.left())) for process in started]
    except (OutOfTime, RuntimeError) as error:
        text = str(error)
        if "Duplicate GPU" in text or "duplicate" in text.lower():
            raise Skip("NCCL does not support two processes on one GPU") from error
        raise
    finally:
        for process in started:
            process.kill()
    losses = [next(line for line in text.splitlines() if line.startswith("losses")) for text in texts]
    different = len(set(losses)) - 1
    what = f"{name}: processes whose weights differ from the first process after 8 steps"
    report.add(what, different, passed=not different, expected="0", note=losses[0][:120])


def _train(backend: str, world: int, device: str) -> None:
    """Train for 8 steps as one of several processes, and print the losses and the squared norm of the weights.

    Args:
        backend: backend of the communication, "nccl" or "gloo".
        world: number of processes.
        device: "cuda" or "cpu".
    """
    from pytorch_lightning.strategies import DDPStrategy
    from trainings import RandomImages, fit, make_network_and_head

    from superglobal.config.training import FitConfig, OptimConfig
    from superglobal.training.callbacks import CurveLogger, NonFiniteGuard, StepSeed

    network, head = make_network_and_head("test_resnet", 64, 100, "curricularface")
    optim = OptimConfig(name="sgd", lr=1e-3, batch_size=8, epochs=1, ema=0.9, clip=1.0)
    strategy: Any = DDPStrategy(process_group_backend=backend)
    accelerator = "gpu" if device == "cuda" else "cpu"
    config = FitConfig(
        accelerator=accelerator, devices=1, num_nodes=world, num_workers=0, progress=False, strategy=strategy
    )
    callbacks = [StepSeed(0), CurveLogger(4, 8), NonFiniteGuard(4, Path(os.devnull), str)]
    module, _ = fit(network, head, optim, config, RandomImages(64, 96, 100), callbacks)
    norm = sum(float(p.detach().double().square().sum()) for p in module.parameters())
    print(f"losses {module.loss!r}, squared norm of the weights {norm!r}", flush=True)


if __name__ == "__main__":
    _train(sys.argv[1], int(sys.argv[2]), sys.argv[3])
