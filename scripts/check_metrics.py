"""Check that the official example descriptors yield the published scores on ROxford5k and RParis6k.

    python scripts/check_metrics.py FOLDER

FOLDER contains the files gnd_<name>.pkl and <name>_resnet_rsfm120k_gem.mat of at least one data set, where <name> is
roxford5k or rparis6k. The exit status is 0 if all scores agree to within 0.01 percentage points, 1 if a score differs
by more, and 2 if files are missing.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from superglobal.data.revisited import load_ground_truth
from superglobal.errors import InputError
from superglobal.metrics.evaluate import revisited_map
from superglobal.metrics.revisited import RetrievalResult

KS = (1, 5, 10)
# Scores published with the descriptors (filipradenovic/revisitop, README): mAP, mP@1, mP@5 and mP@10 in percent.
PUBLISHED: dict[str, dict[str, tuple[float, ...]]] = {
    "roxford5k": {
        "easy": (84.81, 97.06, 92.06, 86.49),
        "medium": (64.67, 97.14, 90.67, 84.67),
        "hard": (38.47, 81.43, 63.00, 53.00),
    },
    "rparis6k": {
        "easy": (92.12, 100.00, 97.14, 96.14),
        "medium": (77.20, 100.00, 98.86, 98.14),
        "hard": (56.32, 94.29, 90.29, 89.14),
    },
}
TOLERANCE = 0.01  # maximum difference between a measured and a published score, in percentage points


def load_features(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Load descriptors from a .mat file.

    Returns:
        The query descriptors, (Q, D) float32, and the database descriptors, (N, D) float32.

    Raises:
        InputError: scipy is not installed, or the file lacks one of the arrays Q and X.
    """
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise InputError("reading .mat files needs the package scipy; install it: pip install scipy") from error
    arrays: dict[str, Any] = loadmat(path, variable_names=["Q", "X"])
    if "Q" not in arrays or "X" not in arrays:
        raise InputError(f"{path}: expected the arrays Q (D, queries) and X (D, images); download the file again")
    return tuple(np.ascontiguousarray(arrays[key].T, dtype=np.float32) for key in ("Q", "X"))  # type: ignore[return-value]


def compare(name: str, result: RetrievalResult) -> bool:
    """Print the measured and the published scores of a data set, and return True if all of them agree."""
    print(f"{name:10}{'':8}" + "".join(f"{head:>20}" for head in ("mAP", *(f"mP@{k}" for k in KS))))
    agree = True
    for protocol, published in PUBLISHED[name].items():
        measured = [100 * value for value in (result.map[protocol], *(result.mp[protocol][k] for k in KS))]
        same = [abs(m - p) <= TOLERANCE + 1e-9 for m, p in zip(measured, published, strict=True)]
        cells = (f"{m:8.2f} ({p:6.2f}){' ' if s else '!'}" for m, p, s in zip(measured, published, same, strict=True))
        print(f"{'':10}{protocol:8}" + "".join(f"{cell:>20}" for cell in cells))
        agree &= all(same)
    return agree


def missing_message(folder: Path) -> str:
    """Return the error message for a folder that does not contain both files of any data set."""
    return (
        f"no pair of gnd_<name>.pkl and <name>_resnet_rsfm120k_gem.mat in {folder.resolve()}; "
        "download them to data/revisited-features: superglobal download revisited-features"
    )


def main(arguments: list[str] | None = None) -> int:
    """Check each data set whose two files are in the folder.

    Returns:
        The exit status: 0 if all scores agree, 1 if a score differs, 2 if files are missing or invalid.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder that contains the .pkl and .mat files")
    folder = parser.parse_args(arguments).folder
    pairs = {name: (folder / f"gnd_{name}.pkl", folder / f"{name}_resnet_rsfm120k_gem.mat") for name in PUBLISHED}
    present = {name: pair for name, pair in pairs.items() if all(path.is_file() for path in pair)}
    if not present:
        print(missing_message(folder), file=sys.stderr)
        return 2
    for name in pairs.keys() - present.keys():
        print(f"{name}: not checked, because its files are not in {folder}")
    try:
        agree = [
            compare(name, revisited_map(*load_features(features), load_ground_truth(truth)))
            for name, (truth, features) in present.items()
        ]
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print("measured (published); ! marks a difference of more than 0.01")
    return 0 if all(agree) else 1


if __name__ == "__main__":
    sys.exit(main())
