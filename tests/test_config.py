"""Configurations: switch values, messages about typos, and composition of every option."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, MissingConfigException
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

import superglobal
from superglobal.cli.hydra_commands import OutputFolder
from superglobal.config import ENTRIES, OLD_SETTINGS, prepare_arguments, register, validate_arguments
from superglobal.config.common import validate_config
from superglobal.config.evaluation import EvalConfig
from superglobal.config.help import groups, sections
from superglobal.config.training import TrainConfig
from superglobal.errors import InputError
from superglobal.models.pooling import PRESETS, PoolingConfig, make_pooling
from superglobal.reporting.ablations import ABLATIONS
from superglobal.reporting.results import plain_types

CONF = Path(__file__).parents[1] / "conf"


def config(*overrides, script="eval"):
    """Compose and validate a configuration."""
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return validate_config(
            compose(script, overrides=list(overrides)), EvalConfig if script == "eval" else TrainConfig
        )


@pytest.mark.parametrize(
    ("value", "expected"), [("off", False), ("false", False), ("no", False), ("on", True), ("true", True)]
)
def test_switch_values_become_booleans(value, expected):
    assert config(f"pooling.regional={value}").pooling.regional is expected


@pytest.mark.parametrize(("value", "mode"), [("off", "off"), ("true", "on"), ("reference_off", "reference_off")])
def test_relup_values_become_modes(value, mode):
    assert make_pooling(config(f"pooling.relup={value}").pooling.overrides()).relup == mode


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("pooling.regional=maybe", ConfigCompositionException, "maybe"),
        ("pooling.gemplus=on", ConfigCompositionException, "gemplus"),
        ("dataset=oxf", MissingConfigException, "roxford5k"),
        ("rerank.M=many", ConfigCompositionException, "many"),
        ("pooling.relup=perhaps", InputError, "on, off, reference_off"),
        ("rerank=mutual rerank.k_query=9223372036854775808", InputError, r"k_query=9\d+"),
        ("k=9223372036854775808", InputError, r"k=9\d+"),
        ("index.backend=annoy", InputError, "auto, faiss, torch"),
        ("index.kind=annoy", InputError, "flat, flat_fp16, ivf_flat, ivf_pq, hnsw"),
        ("index=ivf_flat index.nprobe=0", InputError, r"index\.nprobe=0: expected an integer from 1 to"),
        ("index.nprobe=3", InputError, r"index\.nprobe=3: index=flat has no setting nprobe; choose from backend"),
        ("index.compare=3", InputError, r"index\.compare=3: index=flat has no setting compare; choose from backend"),
        (
            "index=hnsw index.nlist=5",
            InputError,
            r"index\.nlist=5: index=hnsw has no setting nlist; choose from M",
        ),
        (
            "index=ivf_pq index.M=5",
            InputError,
            r"index\.M=5: index=ivf_pq has no setting M; choose from nlist, nprobe, pq_m",
        ),
        ("index=flat_fp16 index.backend=torch", InputError, "flat_fp16 has no setting backend; choose from candidates"),
        ("store.dtype=int8", InputError, "float32, float16"),
        ("dataset=revisited", InputError, r"dataset\.name"),
        ("dataset=descriptors", InputError, r"descriptors\.query"),
        ("descriptors.query=q.npy", InputError, "both"),
    ],
)
def test_invalid_settings_raise_errors_that_name_them(override, error, message):
    with pytest.raises(error) as caught:
        config(*override.split())
    assert re.search(message, f"{caught.value} {caught.value.__cause__}")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            "rerank=aqe index=hnsw",
            r"rerank\.kind=aqe runs an exact search of the whole database.* index=hnsw; use index=flat",
        ),
        ("rerank=adba index=flat_fp16", r"rerank\.kind=adba runs an exact search of the whole database"),
        (
            "ablation=rerank rerank=mutual",
            r"ablation=rerank requires .*\(rerank=superglobal\); remove the ablation or rerank=mutual",
        ),
        ("ablation=no_scale rerank=aqe", r"ablation=no_scale requires the paper's reranking"),
        (
            "dataset=gldv2_recognition rerank=kreciprocal",
            r"dataset\.votes=similarity: .*kreciprocal .*votes=nearest",
        ),
        ("dataset=gldv2_recognition rerank=kreciprocal dataset.votes=distance", r"dataset\.votes=distance: "),
    ],
)
def test_incompatible_settings_raise_errors(overrides, message):
    with pytest.raises(InputError, match=message):
        config(*overrides.split())


@pytest.mark.parametrize(
    "overrides",
    [
        "rerank=mutual index=hnsw",
        "rerank=aqe rerank.enabled=false index=hnsw",
        "rerank=adba index=torch",
        "ablation=rerank rerank=superglobal_paper",
        "ablation=gem rerank.kind=mutual",
        "dataset=gldv2_recognition rerank=kreciprocal dataset.votes=nearest",
        "dataset=gldv2_recognition rerank=mutual",
    ],
)
def test_compatible_settings_are_accepted(overrides):
    config(*overrides.split())


@pytest.mark.parametrize(
    ("override", "message"), [("head=softmax", "arcface"), ("pooling.regionl=on", "regionl"), ("data=toi", "toy")]
)
def test_a_typo_in_a_training_setting_is_reported(override, message):
    with pytest.raises((ConfigCompositionException, MissingConfigException)) as caught:
        config(override, script="train")
    assert message in f"{caught.value} {caught.value.__cause__}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("head.kind=softmax", "arcface, cosface, curricularface"),
        ("head.margin=1.6", "a number from 0 to 1.5708 for arcface"),
        ("head=cosface head.margin=1.1", "a number from 0 to 1 for cosface"),
        ("head.centers=0", r"head\.centers=0"),
        ("head.negatives=0", r"head\.negatives=0"),
        ("head.negatives=1.1", "a number from 0.0001 to 1"),
        ("head=cosface head.easy_margin=on", "easy_margin=true: not supported by cosface"),
        ("head=curricularface head.dynamic_margin=on", "dynamic_margin=true: not supported by curricularface"),
    ],
)
def test_invalid_head_settings_raise_errors(overrides, message):
    with pytest.raises(InputError, match=message):
        config(*overrides.split(), script="train")


def options(group, script="eval"):
    """Return the options of a configuration group."""
    register()
    return [name for name, _, _ in groups(script)[group]]


@pytest.mark.parametrize("group", ["backbone", "pooling", "index", "rerank", "trainer", "logger", "paths"])
def test_every_option_composes(group):
    assert options(group)
    for option in options(group):
        extra = ["backbone.name=resnet18"] if (group, option) == ("backbone", "timm") else []
        config(f"{group}={option}", *extra)


@pytest.mark.parametrize("group", ["backbone", "pooling", "data", "head", "optim", "trainer", "logger", "paths"])
def test_every_option_of_training_composes(group):
    assert options(group, "train")
    for option in options(group, "train"):
        needs = {("backbone", "timm"): ["backbone.name=resnet18"], ("data", "folder"): ["data.root=x"]}
        config(f"{group}={option}", *needs.get((group, option), []), script="train")


def test_every_experiment_composes():
    """Other training experiments are tested in test_recipes.py."""
    config("experiment=full_factorial")
    photos = config("experiment=photos", "dataset.database=x", "dataset.query=y")
    assert (photos.whitening.kind, photos.rerank.kind, photos.scales) == ("center", "auto", 1)
    demo = config("experiment=demo", script="train")
    assert demo.name == config("dataset=toy").name == "demo"


def test_images_of_your_own_are_logged_to_wandb_only_on_request():
    folder = ["dataset=folder", "dataset.database=x", "dataset.query=y"]
    choices = {(): False, ("experiment=photos",): False, ("logger=wandb",): True, ("logger.wandb=true",): True}
    assert {words: config(*folder, *words).logger.wandb for words in choices} == choices
    assert config().logger.wandb
    assert not config("logger=csv").logger.wandb


def test_every_dataset_and_distractor_set_composes():
    needs = {
        "revisited": ["dataset.name=x"],
        "folder": ["dataset.database=x", "dataset.query=y"],
        "descriptors": ["descriptors.query=q", "descriptors.database=x"],
    }
    for option in options("dataset"):
        config(f"dataset={option}", *needs.get(option, []))
    assert config("dataset=toy").dataset.root == "data/toy"
    assert config("distractors=toy", "paths.data=d").distractors.root == "d/toy"
    # The option is named none, because Hydra does not accept null for a group in a sweep.
    assert config("distractors=none").distractors.name is config().distractors.name is None
    assert config("distractors=revisitop1m").distractors.name == "revisitop1m"
    assert config("distractors=list", "distractors.name=x").distractors.name == "x"


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_the_same_in_config_and_api(preset):
    overrides = config(f"pooling={preset}").pooling.overrides()
    assert make_pooling(overrides) == make_pooling(preset)
    # A preset replaces the pooling that is stored with the weights.
    stored = {"gem_plus": False, "regional": False, "scale": False, "relup": "reference_off"}
    assert make_pooling(overrides, stored) == make_pooling(preset)


def test_an_override_keeps_the_rest_of_a_preset():
    overrides = config("pooling=gem", "pooling.regional=on").pooling.overrides()
    assert overrides == {"gem_plus": False, "regional": True, "scale": False, "relup": "off"}


@pytest.mark.parametrize(
    "argument",
    ["statistics=mean", "+statistics.dims=3", "extraction.compile=true", "~pictures.queries", "extraction.part=1/2"],
)
def test_old_settings_raise_errors_that_name_the_replacement(argument):
    with pytest.raises(
        InputError, match=r"the setting (statistics|extraction|pictures)[.a-z]* no longer exists; (use|it was removed)"
    ):
        validate_arguments(["dataset=toy", argument])


@pytest.mark.parametrize("name", ["../x", "/x", ".", "", "a/../b", ".a", "a\\b", "a\nb", "x" * 201])
def test_names_stay_in_their_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = ["dataset=folder", "dataset.database=x", "dataset.query=x", "backbone=resnet18"]
    for setting in ("name", "dataset.name", "distractors.name"):
        cfg = OmegaConf.structured(config(*folder))
        OmegaConf.update(cfg, setting, name)
        with pytest.raises(InputError, match=rf"^{re.escape(setting)}="):
            validate_config(cfg, EvalConfig)
    run = OmegaConf.create({"name": name, "hydra": {"run": {"dir": f"runs/{name}"}}})
    with pytest.raises(SystemExit):
        OutputFolder().on_run_start(run)
    assert list(tmp_path.iterdir()) == []


def test_arguments_that_hydra_cannot_read_raise_errors():
    with pytest.raises(InputError, match=r"dataset.database=caf\\xe9: not UTF-8"):
        validate_arguments(["dataset.database=caf\udce9"])
    with pytest.raises(InputError, match=r"^k=10+\.\.\.: expected a number of fewer than 300 digits$"):
        validate_arguments(["k=1" + 399 * "0"])
    for setting in ("k", "trainer.num_workers", "rerank.M"):
        with pytest.raises(InputError, match=rf"^{setting}=1000000000"):
            config("dataset=toy", "backbone=resnet18", f"{setting}={10**400}")


def test_a_folder_of_photos_needs_a_set_that_reads_it():
    with pytest.raises(
        InputError, match=r"dataset\.database=photos: only for images of your own; add experiment=photos"
    ):
        config("dataset.database=photos")


def test_settings_with_dashes_are_named():
    with pytest.raises(InputError, match="--experiment=photos: settings have no dashes; write experiment=photos"):
        prepare_arguments(ENTRIES[0], ["--experiment=photos"])
    assert prepare_arguments(ENTRIES[0], ["--config-dir=conf"]) == ["--config-dir=conf"]


def test_the_name_of_the_link_to_the_last_evaluation_is_reserved():
    with pytest.raises(InputError, match=r"dataset\.name=latest: reserved"):
        config("dataset=toy", "dataset.name=latest")


MISTAKES = {  # argument -> the end of the message
    "dataset.dattabase=p": "there is no setting dataset.dattabase; did you mean dataset.database?",
    "+dattabase=p": "there is no setting dattabase; did you mean dataset.database or descriptors.database?",
    "rerank.k=3": "there is no setting rerank.k; did you mean rerank.K or rerank.k1 or rerank.k2?",
    "whitenning=pca": "there is no setting whitenning; did you mean whitening or whitening.dims or whitening.kind?",
    "zzz=3": "there is no setting zzz; --help lists all settings",
    "dataset=oxford5k": "; did you mean roxford5k?",
    "rerank=none,mutal": "rerank has no option mutal; expected one of adba, aqe, auto, diffusion, gnn, kreciprocal, "
    "mutual, none, superglobal, superglobal_paper; did you mean mutual?",
    "experiment=fotos": "did you mean photos?",
    "figures=3": "figures is a section; expected one of its settings: figures.queries, figures.ranks",
    "k=abc": "expected an integer",
    "whitening.dims=1.5": "expected an integer",
    "pooling.p=x": "expected a number",
    "dataset.labels=si": "expected true or false",
    "logger.tags=a": "expected a list in brackets, such as [a,b]",
    "k=1,2": "several values; add -m to run the command once for each, or use a list k=[...]",
    "rerank=none,mutual": "several options; add -m to run the command once for each",
    "scales=[1,2": "expected a value in the grammar of Hydra; put a text in quotes",
    "photos": "expected name=value, or quotes around a value: 'dataset.database=my photos'",
}


@pytest.mark.parametrize("argument", MISTAKES)
def test_mistyped_arguments_name_what_was_meant(argument):
    register()
    with pytest.raises(InputError, match=f"^{re.escape(argument)}: .*{re.escape(MISTAKES[argument])}$"):
        prepare_arguments(ENTRIES[0], ["-c", "job", "dataset.database=my", argument, "--resolve"])


def test_a_mistyped_value_names_the_choice_that_was_meant():
    with pytest.raises(InputError, match=r"^dataset\.role=tets: expected one of .*; did you mean test\?$"):
        config("dataset=toy", "backbone=resnet18", "dataset.role=tets")


def test_values_that_hydra_accepts_are_not_mistakes(tmp_path):
    register()
    (tmp_path / "pooling").mkdir()
    (tmp_path / "pooling" / "mine.yaml").touch()
    arguments = ["-m", "--config-dir", str(tmp_path), "pooling=mine,gem", "ablation=glob(*)", "k=1,2", "scales=[0.5,1]"]
    arguments += ["hydra.run.dir=x y", "backbone=null", "+figures={ranks: 3}", "~distractors", "rerank.K=choice(1,3)"]
    arguments += ["trainer.devices=[0,1]", "weights=null", "logger.tags=[a,'b,c']", "trainer.accelerator=${weights}"]
    assert prepare_arguments(ENTRIES[0], arguments) == arguments


def read_by_hydra(*arguments):
    """Return the values that Hydra and OmegaConf read from prepared arguments."""
    parsed = OverridesParser.create().parse_overrides(prepare_arguments(ENTRIES[0], arguments))
    assert not any(override.is_sweep_override() for override in parsed)
    return [OmegaConf.create({"value": override.value()}).value for override in parsed]


@example("2023_08")
@example("photos [2024], Córdoba's")
@example("IMG(1).jpg")
@example("a=b, ${c.jpg")
@example("\\")
@example("true")
@hypothesis_settings(max_examples=30, deadline=None)
@given(st.text(st.sampled_from("ab1_ .,'\"\\$#={[(~é日:&\t/"), min_size=1))
def test_paths_and_names_reach_the_command_as_typed(name):
    if name[0] in "'\"" or name.partition("/")[0] == "~":  # quotes and the home folder, see below
        name = f"a{name}"
    assert read_by_hydra(f"dataset.database={name}") == [name]


def test_texts_keep_their_meaning_in_quotes_lists_and_sweeps(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    values = read_by_hydra("dataset.database=~/é", "dataset.query='a b'", "logger.tags=[é,2023_08]", "+name=~x")
    assert values == ["/home/me/é", "a b", ["é", "2023_08"], "~x"]
    arguments = [r"dataset.database=é,a\,b", "dataset.query='a b','c'", "dataset.name=2023_08,x", "weights=choice(a,b)"]
    assert prepare_arguments(ENTRIES[0], [*arguments, "-m"]) == [
        "dataset.database='é','a,b'",
        "dataset.query='a b','c'",
        "dataset.name='2023_08',x",
        "weights=choice(a,b)",
        "-m",
    ]
    assert prepare_arguments(ENTRIES[0], ["whitening.kind=none, pca", "-m"]) == ["whitening.kind=none,pca", "-m"]


def test_old_settings_do_not_exist_and_their_replacements_do():
    names = {
        name for entry in ENTRIES for section in sections(entry.schema) for s in section.settings for name in s.names
    }
    assert not names & OLD_SETTINGS.keys()
    for hint in OLD_SETTINGS.values():
        assert not hint.startswith("use ") or hint.split()[1].partition("=")[0] in {*names, "whitening"}
    validate_arguments(["dataset=toy", "weights=statistics.npz", "-m"])


def test_defaults_are_the_same_in_config_and_api():
    assert config().pooling.overrides() == {}
    assert make_pooling({}) == PoolingConfig() == make_pooling(None)
    api = inspect.signature(superglobal.load_model).parameters
    assert (config().scales, config().antialias) == (api["scales"].default, api["antialias"].default)


def test_cumulative_ablations_add_one_module_and_the_others_remove_one():
    def switches(name):
        c = config(f"ablation={name}")
        return (c.pooling.gem_plus, c.pooling.regional, c.pooling.scale, c.pooling.relup != "off", c.rerank.enabled)

    steps = ("gem", "gem_plus", "regional", "scale", "relup", "rerank")
    assert [sum(switches(step)) for step in steps] == [0, 1, 2, 3, 4, 5]
    for before, after in pairwise(steps):
        assert all(b <= a for b, a in zip(switches(before), switches(after), strict=True))
    for i, step in enumerate(steps[1:]):
        assert [j for j, on in enumerate(switches(f"no_{step}")) if not on] == [i]
    assert list(ABLATIONS) == [*steps, *(f"no_{s}" for s in steps[1:])]
    assert config("ablation=scale").ablation == "scale"


@pytest.mark.parametrize(
    "overrides", [(), ("index=hnsw",), ("index=ivf_pq", "index.compare=0"), ("rerank=kreciprocal",), ("rerank=none",)]
)
def test_the_configuration_stored_in_a_result_is_valid(overrides):
    checked = config("dataset=toy", *overrides)
    stored = json.loads(json.dumps(plain_types(asdict(checked))))
    assert validate_config(OmegaConf.merge(OmegaConf.structured(EvalConfig), stored), EvalConfig) == checked


def test_configurations_load_without_slow_imports():
    heavy = "timm torchvision pytorch_lightning faiss"
    code = f"import sys, eval; print([name for name in {heavy.split()} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
