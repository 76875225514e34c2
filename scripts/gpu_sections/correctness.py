"""Check that the GPU gives the same results as the CPU for descriptors, rankings and training.

Also check that training resumes after a kill, and that extraction works with little GPU memory.
"""

from __future__ import annotations

import itertools
import json
import logging
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from benches.rerank import clustered

from gpu_sections.common import (
    ROOT,
    Background,
    Program,
    Report,
    command,
    differences,
    finish,
    sizes,
    write_jpegs,
)
from gpu_sections.pipeline import extract_all
from superglobal import load_model
from superglobal.data.images import image_tensor, read_image
from superglobal.models.inference import optimize_for_inference
from superglobal.reporting.paired_comparison import read_comparison
from superglobal.reranking.registry import apply_reranker, get_reranker
from superglobal.retrieval.ranks import search_and_rank
from superglobal.retrieval.scan import inner_products
from superglobal.retrieval.scores import TOLERANCE
from superglobal.retrieval.store import DescriptorStore
from superglobal.utils.precision import full_precision

DATA = ROOT / "tests" / "data"
TOY_PRECISIONS = ("float32", "float16", "bfloat16")


def main(report: Report) -> None:
    """Run all checks of this section. The training runs take longest, so they start first and run in the background."""
    photos = write_jpegs(report.work / "memory", sizes(report.pick(48, 48, 4)))
    running = Background()
    with running:
        toy = _toy_data(report, running)
        report.run("goldens of the reference implementation", lambda: _goldens(report), need=15)
        for rendering in toy:
            finish(rendering, report.left())
        training = report.run("training on the toy data set", lambda: _start_training(report, running), need=40)
        resumed = report.run("resuming a killed training", lambda: _start_resume(report, running), need=20)
        report.run("rankings of search, ranks and rerankers", lambda: _orders(report), need=10)
        report.run("out-of-memory halving", lambda: _out_of_memory(report, photos), need=10)
        report.run("training loss of 20 steps", lambda: _losses(report), need=10)
        if resumed is not None:
            report.run("resuming a killed training", lambda: _resume(report, *resumed), need=10)
        if training is not None:
            report.run("precision on the toy data set", lambda: _precisions(report, *training), need=10)


def _toy_data(report: Report, running: Background) -> list[Program]:
    """Start two programs that each render a toy data set, and return their processes.

    `_precisions` uses the first data set, in the folder `data`. `_resume` uses the second one, which is tiny, in the
    folder `data_tiny`.
    """
    sizes = {"data": report.pick("small", "small", "tiny"), "data_tiny": "tiny"}
    return [
        running.start(["-m", "superglobal", "toy-data", "--size", size, "--out", report.work / name / "toy"])
        for name, size in sizes.items()
    ]


def _goldens(report: Report) -> None:
    """Compare descriptors with those of the reference implementation, which are stored in tests/data.

    The descriptors are computed by the original network in float32, and by networks that `optimize_for_inference`
    optimized. The optimized networks are tested in float32, and on a GPU also in float16 and bfloat16.
    """
    sys.path[:0] = [str(ROOT / "tests"), str(DATA)]
    from goldens import FILES, by_settings, goldens, settings
    from synth_ckpt import synth_state

    for file, depth in itertools.islice(FILES.items(), report.pick(3, 3, 1)):
        weights = report.work / f"r{depth}.pyth"
        if not weights.exists():
            manifest = json.loads((DATA / f"manifest_cvnet_r{depth}.json").read_text())
            torch.save({"epoch": 0, "model_state": synth_state(manifest, 7)}, weights)
        expected = goldens(file)
        chosen = by_settings(file)[:: report.pick(1, 6, 30)]
        worst = {"float32": 0.0, "float32, folded": 0.0}
        cosines = {"float16": [1.0], "bfloat16": [1.0]} if report.cuda else {}
        for keys in chosen:
            network = load_model(weights, **settings(keys[0])[1])
            images = [image_tensor(read_image(DATA / "images" / settings(key)[0])) for key in keys]
            truth = torch.from_numpy(np.stack([expected[key] for key in keys]))
            # Optimizing takes time, so optimized networks are tested only with the first settings in `chosen`.
            folds = keys is chosen[0]
            # The original network is tested last. The test moves it to the device, but a network can only be optimized
            # on the CPU.
            for name in ("float32, folded", *cosines, "float32") if folds else ("float32",):
                network.precision = name.split(",")[0]
                model = (optimize_for_inference([network])[0] if name != "float32" else network).to(report.device)
                with torch.inference_mode(), full_precision():
                    got = torch.cat([model(image[None].to(report.device)) for image in images]).cpu()
                if name in worst:
                    worst[name] = max(worst[name], float((got - truth).abs().max()))
                else:
                    cosines[name] += (got * truth).sum(1).tolist()
        count = sum(map(len, chosen))
        for name, value in worst.items():
            what = f"{file}: {name}, {count if name == 'float32' else len(chosen[0])} descriptors, largest difference"
            report.add(what, value, passed=value < 1e-5, expected="< 1e-5")
        for name, values in cosines.items():
            report.add(f"{file}: {name}, smallest cosine to the reference", min(values), "cosine")


def _orders(report: Report) -> None:
    """Check that search, exact ranks and all rerankers give the same results on the GPU as on the CPU.

    The database contains duplicates, whose scores are equal.
    """
    rows, dim, depth = report.pick((20_000, 2048, 400), (20_000, 1024, 400), (2_000, 64, 100))
    Q, X = clustered(70, rows, dim)
    X[rows // 2 : rows // 2 + 500] = X[:500]  # Images with equal scores must be ranked by id.
    half = X.astype(np.float16)
    half_tensor = torch.from_numpy(half).to(report.device)
    _products(report)
    rng = np.random.default_rng(1)
    targets = [rng.choice(rows, 200, replace=False) for _ in Q]
    expected = {}
    for name, database in {"float32": X, "float16": half}.items():
        expected[name] = search_and_rank(Q, database, depth, targets)
        found = search_and_rank(Q, database, depth, targets, device=report.device)
        _compare_orders(report, f"search and exact ranks, {name} array", expected[name], found)
    found = search_and_rank(Q, half_tensor, depth, targets, device=report.device)
    _compare_orders(report, "search and exact ranks, float16 on the device", expected["float16"], found)
    (_, ids), _ = expected["float32"]
    Q, ids = Q[:24], ids[:24]
    for kind in ("superglobal", "mutual", "kreciprocal", "diffusion", "aqe", "adba"):
        report.run(f"reranker {kind}", lambda kind=kind: _compare_reranker(report, kind, Q, X, ids))  # type: ignore[misc]


def _products(report: Report) -> None:
    """Check that the rounding errors of inner products in float32 are below `TOLERANCE`, as exact search requires.

    The check uses unit vectors without negative entries.
    """
    rng = np.random.default_rng(2)
    worst = 0.0
    for dim in (64, 256, 512, 2048):
        X = np.maximum(rng.standard_normal((report.pick(16384, 16384, 500), dim), dtype=np.float32), 0) + np.float32(
            0.01
        )
        X /= np.linalg.norm(X, axis=1, keepdims=True)
        vectors = torch.from_numpy(X).to(report.device)
        with full_precision():
            rough = inner_products(vectors[:70], vectors)
        worst = max(worst, float((rough.double() - vectors[:70].double() @ vectors.double().T).abs().max()))
    # On a CPU the error depends on the library that multiplies the matrices, so it is only reported.
    check: dict[str, Any] = {"passed": worst < TOLERANCE, "expected": f"< {TOLERANCE:g}"} if report.cuda else {}
    report.add("float32 scores of unit vectors: largest error", worst, "(scores from -1 to 1)", **check)


def _compare_orders(report: Report, name: str, expected: Any, found: Any) -> None:
    """Check that `search_and_rank` returned the same ids and ranks on the CPU as on the device.

    Args:
        report: report of the section.
        name: description of the search.
        expected: result of `search_and_rank` on the CPU.
        found: result of `search_and_rank` on the device.
    """
    different = differences(expected, found)
    report.add(
        f"{name}: ids and ranks that differ from those of the CPU", different, passed=different == 0, expected="0"
    )


def _compare_reranker(report: Report, kind: str, Q: np.ndarray, X: np.ndarray, ids: np.ndarray) -> None:
    """Check that a reranker returns the same scores on the device as on the CPU, up to rounding.

    Args:
        report: report of the section.
        kind: kind of reranker.
        Q: (Q, D) float32 queries.
        X: (N, D) float32 database descriptors.
        ids: (Q, k) int64 shortlists from the search.
    """
    small = X[:2000] if kind == "adba" else X
    lists = np.tile(np.arange(ids.shape[1]), (len(Q), 1)) if kind == "adba" else ids
    M = min(get_reranker(kind).complete({}).get("M") or lists.shape[1], lists.shape[1])
    values = get_reranker(kind).complete({"M": M} if "M" in get_reranker(kind).parameters else {})
    on_cpu, on_device = (
        apply_reranker(kind, values, Q, small, lists, device=device) for device in ("cpu", str(report.device))
    )
    swapped = on_cpu.ids != on_device.ids
    # Compare scores instead of ids, because images whose scores differ only by rounding may be in any order.
    finite = np.isfinite(on_cpu.scores)
    gap = float(np.abs(np.where(finite, on_cpu.scores, 0) - np.where(finite, on_device.scores, 0)).max())
    note = f"{int(swapped.sum())} of {swapped.size} ids differ"
    report.add(
        f"reranker {kind}: largest difference of the scores from those of the CPU",
        gap,
        passed=gap < 2e-6,
        expected="< 2e-6",
        note=note,
    )


def _out_of_memory(report: Report, photos: list[Path]) -> None:
    """Check that extraction halves batches that do not fit in GPU memory, and still computes the same descriptors."""
    report.require_gpu("a memory limit")
    network = load_model("random", backbone="resnet50", dim=128, scales=3)
    whole, _ = extract_all(report, network, photos, "memory_whole", batch_size=2)
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("superglobal.evaluation")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(6e9 / total)
    try:
        capped, _ = extract_all(report, network, photos, "memory_capped", batch_size=64, batch_pixels=10**9)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        log.removeHandler(handler)
    halved = [message for message in messages if "out of GPU memory" in message]
    difference = float(np.abs(whole - capped).max())
    report.add(
        "out-of-memory halving: halved batches with a limit of 6 GB", len(halved), passed=bool(halved), expected=">= 1"
    )
    text = "out-of-memory halving: largest difference of the descriptors"
    report.add(text, difference, passed=difference < 1e-5, expected="< 1e-5", note="; ".join(halved)[:200])


class _Losses(pl.Callback):
    """Callback that records the loss of each training step."""

    def __init__(self) -> None:
        self.values: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.values.append(outputs["value"].detach())


def _losses(report: Report) -> None:
    """Check that 20 training steps in strict float32 have the same losses on the GPU as on the CPU, up to rounding."""
    from trainings import RandomImages, fit, make_network_and_head

    from superglobal.config.training import FitConfig, OptimConfig

    backbone, side, batch = report.pick(("resnet50", 128, 16), ("resnet50", 128, 16), ("test_resnet", 96, 8))
    losses = []
    for accelerator in ("cpu", "gpu" if report.cuda else "cpu"):
        network, head = make_network_and_head(backbone, 128, 100)
        optim = OptimConfig(name="sgd", lr=1e-3, batch_size=batch, epochs=1)
        config = FitConfig(accelerator=accelerator, devices=1, num_workers=0, progress=False, precision="32-true")
        watch = _Losses()
        with full_precision():
            fit(network, head, optim, config, RandomImages(20 * batch, side, 100), [watch])
        losses.append(torch.stack(watch.values).double().cpu())
    on_cpu, on_device = losses
    difference = float(((on_cpu - on_device).abs() / on_cpu.abs()).max())
    name = f"training loss of {len(on_cpu)} steps, {backbone}, float32: largest relative difference from the CPU"
    report.add(
        name, difference, passed=difference < 1e-3, expected="< 1e-3", note=f"loss {on_cpu[0]:.3f} to {on_cpu[-1]:.3f}"
    )


def _training_words(report: Report, name: str, *overrides: str, data: str = "data") -> list[str]:
    """Return the command-line arguments that start a short training run on a toy data set.

    Args:
        report: report of the section.
        name: name of the run.
        *overrides: settings of train.py that differ from those of the quickstart, such as "optim.epochs=2".
        data: folder of the toy data set, relative to the temporary folder of the report.
    """
    paths = [f"paths.data={report.work / data}", f"paths.outputs={report.work / 'outputs'}", f"name={name}"]
    accelerator = "gpu" if report.cuda else "cpu"
    words = ["experiment=quickstart", "logger=csv", f"trainer.accelerator={accelerator}", "trainer.devices=1"]
    return [*words, "trainer.progress=false", *paths, *overrides]


def _start_training(report: Report, running: Background) -> tuple[Program, float]:
    """Start a training run of the quickstart in the background.

    Returns:
        The process, and its start time as `time.monotonic()`.
    """
    tiny = ["optim.epochs=2", "data.image_size=64", "validation.fraction=0.25", "trainer.num_workers=0"]
    more = report.pick(["trainer.num_workers=4"], ["trainer.num_workers=4", "optim.epochs=12"], tiny)
    return running.start(["train.py", *_training_words(report, "toy", *more)]), time.monotonic()


def _start_resume(report: Report, running: Background) -> tuple[list[str], Program, Program]:
    """Start two training runs with the same settings: one runs to its end, and the other kills itself before step 7.

    Returns:
        The arguments of train.py that resume the killed run, the process of the uninterrupted run, and the process of
        the killed run.
    """
    settings = ["optim.epochs=3", "optim.batch_size=12", "data.image_size=96", "data.table=train.csv", "dim=32"]
    settings += ["pooling.regional=true", "head=subcenter", "head.negatives=0.5", "optim.ema=0.9"]
    settings += ["validation.fraction=0.25", "trainer.log_every=1", "trainer.save_every_steps=2"]
    settings += ["trainer.deterministic=true", "trainer.num_workers=0"]
    whole, killed = (_training_words(report, name, *settings, data="data_tiny") for name in ("whole", "killed"))
    uninterrupted = running.start(["train.py", *whole])
    return killed, uninterrupted, running.start(["tests/killed.py", *killed], {"KILL_AT": "7"})


def _resume(report: Report, words: list[str], uninterrupted: Program, killed: Program) -> None:
    """Resume a killed training run, and check that its final weights equal those of an uninterrupted run exactly.

    Args:
        report: report of the section.
        words: arguments of train.py that resume the killed run.
        uninterrupted: process of the uninterrupted run.
        killed: process of the killed run.
    """
    finish(killed, report.left(), -signal.SIGKILL)
    finish(command(["train.py", *words]), report.left())
    finish(uninterrupted, report.left())
    folder = report.work / "outputs" / "train"
    ends = [
        torch.load(folder / name / "checkpoints" / "last.ckpt", weights_only=True, map_location="cpu")
        for name in ("whole", "killed")
    ]
    steps = [end["global_step"] for end in ends]
    states = [end["state_dict"] for end in ends]
    different = [key for key, value in states[0].items() if not torch.equal(value, states[1][key])]
    report.add(
        f"run killed at step 7 of {steps[0]} and resumed: tensors that differ from those of an uninterrupted run",
        len(different),
        passed=steps[0] == steps[1] and not different,
        expected="0 (bit-identical, with trainer.deterministic=true)",
    )


def _precisions(report: Report, process: Program, began: float) -> None:
    """Measure how much the mAP on the toy data set changes with the precision of extraction.

    Args:
        report: report of the section.
        process: process that trains the network.
        began: start time of the process, as `time.monotonic()`.
    """
    finish(process, report.left() - 15)
    report.add("training on the toy data set while other checks run", time.monotonic() - began, "s")
    runs = {"cpu float32": ("cpu", "float32")}
    kinds = report.pick(TOY_PRECISIONS, TOY_PRECISIONS, ("bfloat16",))
    runs |= {f"{report.device.type} {kind}": (report.device.type, kind) for kind in kinds}
    started = {}
    for name, (device, kind) in runs.items():
        folder = report.work / "eval" / name.replace(" ", "_")
        words = ["dataset=toy", "name=toy", "logger=csv", f"extraction.precision={kind}", "trainer.progress=false"]
        words += [f"trainer.accelerator={'gpu' if device == 'cuda' else 'cpu'}", f"hydra.run.dir={folder}"]
        words += [f"paths.data={report.work / 'data'}", f"paths.outputs={report.work / 'outputs'}"]
        words += [f"paths.stores={folder / 'stores'}", "figures.queries=0"]
        started[name] = folder, command(["eval.py", *words])
    for _, running in started.values():
        finish(running, report.left())
    base = started["cpu float32"][0]
    truth = _descriptors(base)
    for name, (folder, _) in itertools.islice(started.items(), 1, None):
        result, baseline = (json.loads((path / "results.json").read_text()) for path in (folder, base))
        paired = read_comparison(folder, result, base, baseline)
        cosine = float((_descriptors(folder) * truth).sum(1).min())
        # In float32, scores differ between devices only by rounding, which can swap images with almost equal scores.
        is_check = "float32" in name
        for protocol in paired.scores:
            mean, (low, high) = paired.mean(protocol)
            report.add(
                f"toy data set, {protocol}: mAP with {name} minus mAP with cpu float32",
                100 * mean,
                "points",
                passed=abs(100 * mean) < 0.02 if is_check else None,
                expected="within 0.02" if is_check else "",
                note=f"95% interval {100 * low:.3f} to {100 * high:.3f}; smallest cosine {cosine:.7f}",
            )


def _descriptors(folder: Path) -> np.ndarray:
    """Return the database descriptors, (N, D) float32, from the descriptor store in the folder of an evaluation."""
    (path,) = (folder / "stores").glob("*-database-*")
    store = DescriptorStore.open(path)
    return store.block(0, len(store))
