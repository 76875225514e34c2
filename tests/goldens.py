"""Descriptors of the reference implementation (tests/data), and the settings that each was computed with."""

from __future__ import annotations

from pathlib import Path

import numpy as np

DATA = Path(__file__).parent / "data"
FILES = {
    "superglobal_r50_seed7.npz": 50,
    "superglobal_r101_seed7.npz": 101,
    "cvnet_global_r50_seed7.npz": 50,
}
"""Files and the depth of their ResNet."""
FLAGS = {"gem_plus": "gemp", "regional": "rgem", "scale": "sgem"}


def goldens(name: str) -> dict[str, np.ndarray]:
    """Return the descriptors, (2048,) float32, by key."""
    with np.load(DATA / name) as file:
        return {key: file[key] for key in file.files}


def settings(key: str) -> tuple[str, dict]:
    """Split `IMAGE|scales=3|gemp=1|...` into the image's name and arguments of `load_model`."""
    image, *fields = key.split("|")
    values = dict(f.split("=") for f in fields if "=" in f)
    if "cvnet_global" in fields:
        return image, {"scales": int(values["scales"]), "pooling": "cvnet_global"}
    relup = {"1": "on", "0": "off"}.get(values["relup"], values["relup"])
    switches = {name: values[flag] == "1" for name, flag in FLAGS.items()}
    return image, {
        "scales": int(values["scales"]),
        "antialias": values["antialias"] == "1",
        "pooling": {**switches, "relup": relup},
    }


def by_settings(name: str) -> list[list[str]]:
    """Return the keys of a file in groups that share their settings."""
    groups: dict[str, list[str]] = {}
    for key in goldens(name):
        groups.setdefault(key.split("|", 1)[1], []).append(key)
    return list(groups.values())
