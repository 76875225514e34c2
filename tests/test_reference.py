"""`--help` and docs/reference/configuration.md show the settings of the schemas."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from superglobal.config import ENTRIES, register
from superglobal.config.help import help_text, reference_page, sections

ROOT = Path(__file__).parents[1]


def dotted(config, prefix=""):
    """Yield the dotted names of all settings."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_every_setting_of_a_composed_configuration_is_documented(entry):
    register()
    overrides = ["backbone=resnet50", "dataset=roxford5k"] if entry.name != "train" else []
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        composed = OmegaConf.to_container(compose(entry.name, overrides=overrides))
    described = [name for section in sections(entry.schema) for one in section.settings for name in one.names]
    assert sorted(described) == sorted(set(described))
    names = set(dotted(composed))
    # A setting that may be a string or a group of settings has a single entry.
    whole = {name for name in described if any(one.startswith(f"{name}.") for one in names)}
    under = {name for name in names if name.startswith(tuple(f"{one}." for one in whole))}
    assert names == under | {*described} - whole
    assert len(whole) <= 1


def test_a_setting_without_a_description_is_an_error():
    @dataclass
    class Silent:
        """Says nothing.

        Args:
            told: what it is.
        """

        told: int = 1
        untold: str = "x"

    with pytest.raises(LookupError, match="Silent: no docstring describes untold"):
        list(sections(Silent))


def test_names_descriptions_and_defaults_come_from_the_schema():
    @dataclass
    class Inner:
        """Inside.

        Args:
            a, b: two
                lines.
        """

        a: int | None = None
        b: list[int] = field(default_factory=lambda: [1, 2])

    @dataclass
    class Outer:
        """Outside.

        Args:
            path: where.
        """

        path: str = "${root}/x"
        inner: Inner = field(default_factory=Inner)

    # Annotations are strings in this file, which cannot be resolved because the classes are local.
    Outer.__annotations__["inner"] = Inner
    outer, inner = sections(Outer)
    assert (outer.prefix, outer.words, outer.settings[0].defaults) == ("", "Outside.", ("<root>/x",))
    assert (inner.prefix, inner.words) == ("inner", "Inside.")
    (pair,) = inner.settings
    assert (pair.names, pair.defaults, pair.words) == (("inner.a", "inner.b"), ("null", "[1, 2]"), "two lines.")


@pytest.mark.parametrize("columns", [70, 100])
def test_help_fits_into_the_terminal(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    register()
    entry = ENTRIES[1]
    lines = [line for line in help_text(entry).splitlines() if line.strip() not in entry.examples]
    assert columns - 10 < max(map(len, lines)) <= columns


def test_the_configuration_page_is_up_to_date():
    register()
    text = (ROOT / "docs" / "reference" / "configuration.md").read_text()
    assert text == reference_page(ENTRIES), "run: python scripts/config_reference.py"


@pytest.mark.parametrize("script", ["eval.py", "train.py"])
def test_help_describes_the_settings(script):
    done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"python {script} " in done.stdout
    for words in ("backbone", "resnet50", "trainer.num_workers", "processes per device that decode images", "null"):
        assert words in " ".join(done.stdout.split())
    assert "${" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120
