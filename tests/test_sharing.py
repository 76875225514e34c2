"""Shared models: folders and hub repositories restore the saved network; model cards contain its results."""

from __future__ import annotations

import ast
import functools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import hub
from huggingface_hub import ModelCard
from runs import environment
from safetensors.torch import load_file, save_file

import superglobal
from superglobal import cli
from superglobal.errors import InputError
from superglobal.models.hub import CONFIG, WEIGHTS, model_card, save_pretrained
from superglobal.models.inference import optimize_for_inference
from superglobal.models.weights import save_weights
from superglobal.reporting.model_card import read_card_results

ROOT = Path(__file__).parents[1]
IMAGE = np.random.default_rng(0).integers(0, 255, (100, 130, 3), dtype=np.uint8)


def network(**settings):
    """Return a random network."""
    return superglobal.load_model("random", **{"backbone": "test_resnet", **settings})


def run(*words: object, **env: str) -> str:
    """Run Python with arguments and return its output."""
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, env=environment(**env), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """Save a model and return its folder."""
    folder = tmp_path_factory.mktemp("shared") / "model"
    save_pretrained(network(scales=1, pooling="gem", dim=16), folder)
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"scales": [0.7071, 1.0], "antialias": True, "dim": 24, "seed": 4},
        {"pooling": {"gem_plus": False, "p": 2.7, "relup": "reference_off", "regional_p": 3.0, "eps": 1e-5}},
        {"pooling": {"scale_p": 10.0, "relup": "off", "regional_window": 3}, "scales": 5},
        {"pooling": "cvnet_global", "dim": 8},
    ],
)
def test_a_saved_folder_restores_the_network(tmp_path, settings):
    saved = network(**settings)
    saved.backbone.std = (0.25, 0.2, 0.3)
    saved.std.copy_(torch.tensor(saved.backbone.std).view(3, 1, 1))
    saved.provenance = {"made by": "test", "root": "/home/somebody/photos", "list": "/home/somebody/list.csv"}
    saved.provenance["start"] = {"scale_p": math.inf}
    save_pretrained(saved, tmp_path / "a")
    again = superglobal.load_model(tmp_path / "a")
    assert again.identity() == saved.identity()
    assert np.array_equal(superglobal.extract(again, IMAGE), superglobal.extract(saved, IMAGE))
    assert not again.training
    save_pretrained(again, tmp_path / "b")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    text = (tmp_path / "a" / CONFIG).read_text()
    assert "somebody" not in text
    json.loads(text, parse_constant=pytest.fail)  # Infinity and NaN are not valid JSON
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["README.md", CONFIG, WEIGHTS]


def test_settings_override_the_stored_ones(shared):
    assert superglobal.load_model(shared).scales == (1.0,)
    assert not superglobal.load_model(shared).config.gem_plus
    overridden = superglobal.load_model(shared, scales=3, pooling={"gem_plus": True}, antialias=True, trainable=True)
    assert (len(overridden.scales), overridden.config.gem_plus, overridden.config.regional, overridden.antialias) == (
        3,
        True,
        False,
        True,
    )
    assert overridden.training
    with pytest.raises(InputError, match="for test_resnet"):
        superglobal.load_model(shared, backbone="resnet18")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {**c, "crop": 3, "rotate": True}, "unknown fields crop, rotate"),
        (lambda c: {k: v for k, v in c.items() if k not in ("scales", "std")}, "missing fields scales, std"),
        (lambda c: {**c, "pooling": {**c["pooling"], "gem_minus": True}}, r"unknown fields pooling\.gem_minus"),
        (
            lambda c: {**c, "pooling": {k: v for k, v in c["pooling"].items() if k != "eps"}},
            r"missing fields pooling\.eps",
        ),
        (lambda c: {**c, "pooling": {**c["pooling"], "p": "three"}}, r"pooling\.p='three'"),
        (lambda c: {**c, "antialias": "yes"}, "antialias='yes': expected bool"),
        (lambda c: {**c, "dim": True}, "dim=True: expected int"),
        (lambda c: {**c, "mean": [0.5]}, "mean=.*three numbers"),
        (lambda c: {**c, "scales": [9]}, "scales"),
        (lambda c: {**c, "format": "superglobal-model-2"}, "shared by this version of superglobal"),
        (lambda c: {"model_type": "bert"}, "expected .superglobal-model-1."),
        (lambda c: [c], "expected .superglobal-model-1."),
        (lambda c: {**c, "backbone": "resnet18"}, "do not match the network.*missing"),
        *((lambda c, dim=dim: {**c, "dim": dim}, r"dim=.*(16 outputs|expected int)") for dim in (17, -5, 10**9, 1e30)),
        (lambda c: {**c, "std": [0.2, 0, 0.2]}, "std > 0"),
        (lambda c: {**c, "provenance": {"origin": "elsewhere"}}, "config.json"),
        (lambda c: {**c, "provenance": functools.reduce(lambda inner, _: [inner], range(900), 0)}, "nested levels"),
        (lambda c: {**c, "backbone": "restnet"}, "no such model"),
    ],
)
def test_an_invalid_field_of_the_config_is_named(shared, tmp_path, change, message):
    folder = shutil.copytree(shared, tmp_path / "m")
    (folder / CONFIG).write_text(json.dumps(change(json.loads((folder / CONFIG).read_text()))))
    with pytest.raises(InputError, match=message):
        superglobal.load_model(folder)


def test_damaged_and_missing_files_are_named(shared, tmp_path):
    folder = shutil.copytree(shared, tmp_path / "m")
    state = load_file(folder / WEIGHTS)
    state["whitening.bias"][0] += 1
    save_file(state, folder / WEIGHTS)
    with pytest.raises(InputError, match="have changed since"):
        superglobal.load_model(folder)
    (folder / WEIGHTS).write_bytes((shared / WEIGHTS).read_bytes()[:-100])
    with pytest.raises(InputError, match=WEIGHTS):
        superglobal.load_model(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(InputError, match=f"{WEIGHTS}: no such file"):
        superglobal.load_model(folder)
    (folder / CONFIG).write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        superglobal.load_model(folder)
    (folder / CONFIG).unlink()
    with pytest.raises(InputError, match=f"{CONFIG}: no such file"):
        superglobal.load_model(folder)
    with pytest.raises(InputError, match="give the folder of a shared model"):
        superglobal.load_model(shared / WEIGHTS, backbone="test_resnet")


def test_networks_that_could_not_be_loaded_are_not_saved(tmp_path):
    changed = network()
    changed.extra = torch.nn.Linear(2, 2)
    for invalid, message in (
        (changed, "2 unexpected: extra"),
        (network().half(), "float16"),
        (optimize_for_inference([network()])[0], "changed layers"),
    ):
        with pytest.raises(InputError, match=message):
            save_pretrained(invalid, tmp_path / "m")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        save_pretrained(network(), tmp_path / "file")


PUSH_AND_LOAD = """
import superglobal
model = superglobal.load_model("random", backbone="test_resnet", scales=1, seed=3)
print(superglobal.push_to_hub(model, "somebody/small", commit_message="first"))
other = superglobal.load_model("random", backbone="test_resnet", scales=1, seed=4)
first = superglobal.load_model("hf:somebody/small")
commit = superglobal.push_to_hub(other, "somebody/small").rpartition("/")[2]
assert first.identity() == model.identity() != other.identity()
for name, wanted in (("hf:somebody/small", other), (f"hf:somebody/small@{commit}", other)):
    assert superglobal.load_model(name).identity() == wanted.identity()
before = superglobal.load_model("hf:somebody/small@" + FIRST)
assert before.identity() == model.identity() and before.weights_label == "hf:somebody/small@" + FIRST
for name in ("hf:somebody/none", "hf:somebody/small@nowhere", "hf:some body"):
    try:
        superglobal.load_model(name)
    except superglobal.InputError as error:
        assert name in str(error) and "owner/name" in str(error), error
    else:
        raise AssertionError(name)
try:
    superglobal.push_to_hub(model, "not a name")
except superglobal.InputError as error:
    assert "not a name: cannot push" in str(error), error
"""


def test_a_hub_repository_restores_the_pushed_network(tmp_path):
    with hub() as server:
        first = server.commit("somebody/small", 1)
        env = {"HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_test", "no_proxy": "127.0.0.1"}
        run("-c", f"FIRST = {first!r}\n{PUSH_AND_LOAD}", **env)
        states = server.repositories["somebody/small"]
    assert [sorted(state) for state in states] == [[], *[["README.md", CONFIG, WEIGHTS]] * 2]
    assert 'load_model("hf:somebody/small")' in states[1]["README.md"].decode()


@pytest.fixture(scope="module")
def evaluated(shared, data, tmp_path_factory) -> Path:
    """Evaluate the shared model with settings that are marked as tuned."""
    outputs = tmp_path_factory.mktemp("outputs")
    settings = ["dataset=revisited", "dataset.name=mini", f"weights={shared}", "rerank.tuned_on='mini (test set)'"]
    paths = [f"paths.data={data}", f"paths.outputs={outputs}", "logger=csv", "figures.queries=0"]
    run("eval.py", *settings, *paths, "trainer.accelerator=cpu", "trainer.num_workers=0", "trainer.progress=false")
    return outputs


def test_a_shared_model_is_evaluated_with_its_settings(shared, evaluated):
    (path,) = evaluated.rglob("results.json")
    about = json.loads(path.read_text())["about"]
    expected = superglobal.load_model(shared).identity()
    assert about["network"] == json.loads(json.dumps(expected).replace("Infinity", '"inf"'))


def test_share_writes_a_card_with_the_results(shared, evaluated, tmp_path, capsys):
    (path,) = evaluated.rglob("results.json")
    result = json.loads(path.read_text())
    folder = tmp_path / "m"
    command = ["share", shared, folder, "--results", evaluated, "--license", "cc-by-4.0", "--name", "Mini"]
    assert cli.main([str(word) for word in command]) == 0
    assert f'load_model("{folder}")' in capsys.readouterr().out
    assert superglobal.load_model(folder).identity() == superglobal.load_model(shared).identity()
    card = ModelCard.load(folder / "README.md")
    assert (card.data.library_name, card.data.license, card.data.model_name) == ("superglobal", "cc-by-4.0", "Mini")
    listed = {(entry.dataset_name, entry.metric_name): entry.metric_value for entry in card.data.eval_results}
    assert len(listed) == 6
    for stage, words in (("search", ""), ("rerank", ", reranked")):
        for protocol, value in result["metrics"][stage]["map"].items():
            key = ("mini", f"mAP {protocol}{words}; settings tuned on mini (test set)")
            assert listed[key] == pytest.approx(100 * value, abs=0.005)
    text = card.text
    for words in (
        "**Settings tuned on mini (test set).**",
        "too optimistic for other images",
        "queries cropped to their boxes",
        "trapezoidal",
        "6 queries, 24 images",
        "the weights are random",
        "scales 1, without antialias",
    ):
        assert words in text, words
    assert str(evaluated) not in text
    assert cli.main([str(word) for word in command]) == 2
    assert "already exists" in capsys.readouterr().err


def test_results_of_different_weights_are_an_error(shared, evaluated, tmp_path):
    (path,) = evaluated.rglob("results.json")
    other = network(scales=1, pooling="gem", dim=16, seed=9)
    with pytest.raises(InputError, match="the result was computed with the weights"):
        read_card_results([path], other)
    result = json.loads(path.read_text())
    del result["about"]["network"]
    (tmp_path / "own.json").write_text(json.dumps(result))
    (tmp_path / "failed.json").write_text(json.dumps({**result, "status": "failed", "metrics": {}}))
    (tmp_path / "other.json").write_text("{}")
    model = superglobal.load_model(shared)
    for name, message in (("own", "own descriptors"), ("failed", "no metrics"), ("other", "not a result of eval")):
        with pytest.raises(InputError, match=message):
            read_card_results([tmp_path / f"{name}.json"], model)


def test_the_card_names_the_source_of_converted_weights(cvnet_checkpoint, tmp_path):
    model = superglobal.load_model(cvnet_checkpoint(50), scales=1)
    save_weights(model, tmp_path / "r50.safetensors", {**model.provenance, "converter": "superglobal"}, False)
    for loaded in (model, superglobal.load_model(tmp_path / "r50.safetensors")):
        text = model_card(loaded).text
        assert "CVNet's files contain no license" in text
        assert "r50.pyth" in text


LOAD_WITH_TORCH_HUB = """
import ast, sys, torch
model = torch.hub.load(sys.argv[1], "superglobal", source="local", weights=sys.argv[2])
print(type(model).__name__, tuple(model(torch.zeros(1, 3, 70, 80)).shape))
for name, module in list(sys.modules.items()):
    if name.split(".")[0] == "superglobal":
        for node in ast.parse(open(module.__file__).read()).body:
            if isinstance(node, ast.Import):
                print("needs", node.names[0].name.split(".")[0])
            elif isinstance(node, ast.ImportFrom):
                print("needs", node.module.split(".")[0])
"""


def test_torch_hub_loads_a_shared_model_with_the_listed_dependencies(shared, tmp_path):
    # The process runs in another folder, so that only torch.hub finds the package.
    words = [sys.executable, "-P", "-c", LOAD_WITH_TORCH_HUB, str(ROOT), str(shared)]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "RetrievalNetwork (1, 16)" in done.stdout
    needed = {line.split()[1] for line in done.stdout.splitlines() if line.startswith("needs ")}
    (listed,) = (
        ast.literal_eval(node.value)
        for node in ast.parse((ROOT / "hubconf.py").read_text()).body
        if isinstance(node, ast.Assign)
    )
    assert needed - set(sys.stdlib_module_names) - {"superglobal"} == set(listed)
