"""Descriptors are equal to those of the reference implementation (tests/data) for each of its switches."""

from __future__ import annotations

import numpy as np
import pytest
from goldens import DATA, FILES, by_settings, goldens, settings

import superglobal
from superglobal.data.images import read_image

TOLERANCE = 1e-5


@pytest.mark.parametrize("file", FILES)
def test_descriptors_equal_the_reference(file, cvnet_checkpoint):
    expected = goldens(file)
    weights = cvnet_checkpoint(FILES[file])
    worst = 0.0
    for keys in by_settings(file):
        model = superglobal.load_model(weights, **settings(keys[0])[1])
        for key in keys:
            image = read_image(DATA / "images" / settings(key)[0])
            got = superglobal.extract(model, [image])[0]
            difference = float(np.abs(got - expected[key]).max())
            worst = max(worst, difference)
            assert difference < TOLERANCE, key
    print(f"{file}: {len(expected)} descriptors, largest difference {worst:.2e}")


def test_presets_equal_the_settings_of_the_reference(cvnet_checkpoint):
    expected = goldens("superglobal_r50_seed7.npz")
    image = DATA / "images" / "scene_b.png"
    rows = {
        "superglobal": "scene_b.png|scales=3|gemp=1|rgem=1|sgem=1|relup=1|antialias=0",
        "gem": "scene_b.png|scales=3|gemp=0|rgem=0|sgem=0|relup=0|antialias=0",
    }
    for preset, key in rows.items():
        model = superglobal.load_model(cvnet_checkpoint(50), backbone="resnet50", pooling=preset)
        assert np.abs(superglobal.extract(model, image)[0] - expected[key]).max() < TOLERANCE
