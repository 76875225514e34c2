"""Descriptors equal to the reference implementation's, for every switch it has (tests/data)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import superglobal
from superglobal.data.images import read_image

DATA = Path(__file__).parent / "data"
TOLERANCE = 1e-5


def goldens(name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / name) as file:
        return {key: file[key] for key in file.files}


def settings(key: str) -> tuple[str, dict]:
    """`IMAGE|scales=3|gemp=1|...` -> image name and arguments of `load_model`."""
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


FLAGS = {"gem_plus": "gemp", "regional": "rgem", "scale": "sgem"}
FILES = {
    "superglobal_r50_seed7.npz": 50,
    "superglobal_r101_seed7.npz": 101,
    "cvnet_global_r50_seed7.npz": 50,
}


@pytest.mark.parametrize("file", FILES)
def test_descriptors_equal_the_reference(file, cvnet_checkpoint):
    expected = goldens(file)
    weights = cvnet_checkpoint(FILES[file])
    groups: dict[str, list[str]] = {}
    for key in expected:
        groups.setdefault(key.split("|", 1)[1], []).append(key)
    worst = 0.0
    for keys in groups.values():
        model = superglobal.load_model(weights, **settings(keys[0])[1])
        for key in keys:
            image = read_image(DATA / "images" / settings(key)[0])
            got = superglobal.extract(model, [image])[0]
            difference = float(np.abs(got - expected[key]).max())
            worst = max(worst, difference)
            assert difference < TOLERANCE, key
    print(f"{file}: {len(expected)} descriptors, largest difference {worst:.2e}")


def test_presets_are_the_reference_settings(cvnet_checkpoint):
    expected = goldens("superglobal_r50_seed7.npz")
    image = DATA / "images" / "scene_b.png"
    rows = {
        "superglobal": "scene_b.png|scales=3|gemp=1|rgem=1|sgem=1|relup=1|antialias=0",
        "gem": "scene_b.png|scales=3|gemp=0|rgem=0|sgem=0|relup=0|antialias=0",
    }
    for preset, key in rows.items():
        model = superglobal.load_model(cvnet_checkpoint(50), backbone="resnet50", pooling=preset)
        assert np.abs(superglobal.extract(model, image)[0] - expected[key]).max() < TOLERANCE
