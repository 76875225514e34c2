"""Run superglobal from end to end on rendered landmarks: python scripts/quickstart.py (what `make demo` runs).

Renders the toy set, trains a small network on it, and evaluates it with and without every module, beside the untrained
network. Results of an earlier run are reused.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> int:
    """Run the stages one after the other and print their seconds; stop at the first that fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="small", help="of the toy set: tiny, small or large")
    parser.add_argument("--seed", default="0", help="of the toy set: other seeds give other landmarks")
    parser.add_argument("--name", default="quickstart", help="of the training")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--outputs", type=Path, default=Path("outputs"))
    parser.add_argument("overrides", nargs="*", help="settings of train.py, e.g. optim.epochs=5 (with a --name)")
    args = parser.parse_args()
    folder = args.outputs / "eval" / "demo" / args.name
    stages = _stages(args, folder)
    start = time.monotonic()
    for number, (title, command) in enumerate(stages.items(), 1):
        print(f"\n[{number}/{len(stages)}] {title}: python {shlex.join(command)}", flush=True)
        began = time.monotonic()
        status = subprocess.run([sys.executable, *command], cwd=ROOT).returncode
        if status:
            return status
        print(f"[{number}/{len(stages)}] {title}: {time.monotonic() - began:.0f} s", flush=True)
    sheets = sorted((ROOT / folder).glob("trained/*ablation=rerank*/sheet.png"), key=lambda path: path.stat().st_mtime)
    print(f"\nall in {time.monotonic() - start:.0f} s\ntable:   {folder / 'table.md'}\npicture: {sheets[-1]}")
    return 0


def _stages(args: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    places = [f"paths.data={args.data}", f"paths.outputs={args.outputs}"]
    toy = ["--size", args.size, "--seed", args.seed, "--out", str(args.data / "toy")]
    evaluate = ["dataset=toy", "logger=csv", "trainer.num_workers=0", *places]
    untrained = ["ablation=gem", "backbone=test_resnet", "weights=random", f"hydra.run.dir={folder}/untrained"]
    trained = ["ablation=glob(*)", f"name={args.name}", f"hydra.sweep.dir={folder}/trained"]
    return {
        "render landmarks": ["-m", "superglobal", "toy-data", *toy],
        "train": ["train.py", "experiment=quickstart", f"name={args.name}", *places, *args.overrides],
        "evaluate the untrained network": ["eval.py", *evaluate, *untrained],
        "evaluate module by module": ["eval.py", "-m", *evaluate, *trained],
        "one table": ["-m", "superglobal", "report", str(folder)],
    }


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # The stage has printed its own message.
        sys.exit(130)
