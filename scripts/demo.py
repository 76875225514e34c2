"""Train and evaluate a network on rendered landmarks: python scripts/demo.py, or `make demo`.

The script renders the toy data set, evaluates an EfficientNet-Lite0 with ImageNet weights, fine-tunes it, and evaluates
it again with and without each module of SuperGlobal. Results of an earlier run with the same settings are reused.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> int:
    """Run the stages of the demo one after the other, and print how long each stage takes.

    Returns:
        The exit status: 0, or that of the first stage that fails.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="medium", help="size of the toy set: tiny, small, medium, views or large")
    parser.add_argument("--seed", default="0", help="seed of the toy data set; each seed gives different landmarks")
    parser.add_argument("--name", default="demo", help="name of the training run")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the data sets")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="folder of the results")
    parser.add_argument(
        "overrides", nargs="*", help="settings of train.py, e.g. optim.epochs=5; give such a run its own --name"
    )
    args = parser.parse_args()
    folder = args.outputs / "eval" / args.name
    stages = _stages(args, folder)
    # Results differ slightly with the number of threads, so use the same number on every machine.
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    start = time.monotonic()
    for number, (title, command) in enumerate(stages.items(), 1):
        print(f"\n[{number}/{len(stages)}] {title}: python {shlex.join(command)}", flush=True)
        began = time.monotonic()
        status = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment).returncode
        if status:
            return status
        print(f"[{number}/{len(stages)}] {title}: {time.monotonic() - began:.0f} s", flush=True)
    sheets = sorted((ROOT / folder).glob("trained/*ablation=rerank*/sheet.png"), key=lambda path: path.stat().st_mtime)
    print(f"\ntotal time: {time.monotonic() - start:.0f} s\ntable:  {folder / 'table-toy.md'}\nfigure: {sheets[-1]}")
    return 0


def _stages(args: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    """Return the stages of the demo in the order in which they run.

    Args:
        args: arguments of the command line.
        folder: folder for the results of the evaluations.

    Returns:
        Title of the stage -> arguments for the Python interpreter.
    """
    paths = [f"paths.data={args.data}", f"paths.outputs={args.outputs}"]
    toy = ["--size", args.size, "--seed", args.seed, "--out", str(args.data / "toy")]
    evaluate = ["dataset=toy", "logger=csv", "trainer.num_workers=0", *paths]
    before = ["ablation=gem", "backbone=efficientnet_lite0", f"hydra.run.dir={folder}/before"]
    trained = ["ablation=glob(*)", f"name={args.name}", f"hydra.sweep.dir={folder}/trained"]
    return {
        "render landmarks": ["-m", "superglobal", "toy-data", *toy],
        "train": ["train.py", "experiment=demo", f"name={args.name}", *paths, *args.overrides],
        "evaluate before training": ["eval.py", *evaluate, *before],
        "evaluate module by module": ["eval.py", "-m", *evaluate, *trained],
        "one table": ["-m", "superglobal", "report", str(folder)],
    }


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # The interrupted stage has already printed a message.
        sys.exit(130)
