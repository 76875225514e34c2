"""Every setting in words, taken from the schemas: what `--help` prints, and docs/configuration.md."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

from omegaconf import MISSING, OmegaConf

from superglobal.config.common import PoolingSettings, conf_dir
from superglobal.models.pooling import PoolingConfig
from superglobal.reporting.runs import ABLATIONS, MODULES

_WIDTH, _NAMES = 120, 32
_PREFACE = (
    "Made by `python scripts/config_reference.py` from the schemas in superglobal/config/ and the options in conf/;",
    "`python eval.py --help` and `python train.py --help` print the same. A setting is given as *name=value*, an",
    "option of a group, which sets several, as *group=option*. Defaults are those before options; `<other>` is the",
    "value of another setting, null is none.",
)
# Classes whose words stand elsewhere.
_DESCRIBED_BY = {PoolingSettings: (PoolingSettings, PoolingConfig)}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A script that Hydra configures.

    Args:
        name: of its configuration in conf/.
        script: as it is called.
        schema: of its settings.
        purpose: in a sentence.
        examples: command lines.
    """

    name: str
    script: str
    schema: type
    purpose: str
    examples: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Setting:
    """Settings that share a line of documentation, with their defaults as texts, "" for what must be given."""

    names: tuple[str, ...]
    defaults: tuple[str, ...]
    words: str


@dataclasses.dataclass(frozen=True)
class Section:
    """Settings below one prefix ("" for those of the top), with what their schema says of itself."""

    prefix: str
    words: str
    settings: tuple[Setting, ...]


def sections(schema: type) -> list[Section]:
    """All settings of a schema, the top's own first, as dotted names.

    Args:
        schema: a dataclass such as `EvalConfig`.

    Raises:
        LookupError: a field that no docstring describes.
    """
    return list(_sections(schema, ""))


def _sections(schema: type, prefix: str) -> Iterator[Section]:
    words, described = _described(schema)
    kinds = {name: _dataclass(hint) for name, hint in get_type_hints(schema).items()}
    nested = {name: kind for name, kind in kinds.items() if kind is not None}
    plain = {field.name: field for field in dataclasses.fields(schema) if field.name not in nested}
    settings, told = [], set()
    for names, text in described.items():
        if mine := [name for name in names if name in plain]:
            defaults = tuple(_default(plain[name]) for name in mine)
            settings.append(Setting(tuple(prefix + name for name in mine), defaults, text))
            told.update(mine)
    if missing := plain.keys() - told:
        raise LookupError(f"{schema.__name__}: no docstring describes {', '.join(sorted(missing))}")
    yield Section(prefix.rstrip("."), words, tuple(settings))
    for name, kind in nested.items():
        yield from _sections(kind, f"{prefix}{name}.")


def _dataclass(hint: Any) -> type | None:
    """The dataclass in a type such as `BackboneConfig | None`."""
    return next((kind for kind in (hint, *get_args(hint)) if dataclasses.is_dataclass(kind)), None)  # type: ignore[return-value]


def _described(schema: type) -> tuple[str, dict[tuple[str, ...], str]]:
    """A class's first paragraph, and its "Args:" with those of its bases, names -> words."""
    words, found = "", dict[tuple[str, ...], str]()
    for kind in _DESCRIBED_BY.get(schema, [k for k in schema.__mro__ if dataclasses.is_dataclass(k)]):
        summary, _, listed = inspect.cleandoc(kind.__doc__ or "").partition("\nArgs:\n")
        words = words or " ".join(summary.split("\n\n")[0].split())
        for names, text in re.findall(r"^    ([\w, ]+): (.*(?:\n {8,}.*)*)", listed, re.MULTILINE):
            found.setdefault(tuple(names.split(", ")), " ".join(text.split()))
    return words, found


def _default(field: dataclasses.Field[Any]) -> str:
    value: Any = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if value == MISSING:
        return ""
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    if dataclasses.is_dataclass(value):
        return str(vars(value)).replace("'", "")
    # As it is written on the command line; a reference to another setting by that one's name.
    text = OmegaConf.to_yaml({"_": value}, resolve=False).partition(":")[2].strip()
    return re.sub(r"\$\{([\w.]+)\}", r"<\1>", text.strip("'\""))


def groups(script: str) -> dict[str, list[tuple[str, str, bool]]]:
    """Options of each group that a configuration takes: name, words, whether it is the default.

    Args:
        script: name of a file in conf/, without its ending.
    """
    lines = OmegaConf.select(OmegaConf.load(conf_dir() / f"{script}.yaml"), "defaults")
    chosen = {str(group): option for line in lines if not isinstance(line, str) for group, option in line.items()}
    found = {}
    for group, option in chosen.items():
        if not group.startswith("override "):
            files = {path.stem: _comments(path) for path in sorted((conf_dir() / group).glob("*.yaml"))}
            if group == "ablation":
                on = {name: [m for m, state in zip(MODULES, s, strict=True) if state] for name, s in ABLATIONS.items()}
                files = {name: f"On: {', '.join(modules) or 'no module'}" for name, modules in on.items()}
            # An experiment belongs to the script that its comments call.
            mine = {name: words for name, words in files.items() if group != "experiment" or f"{script}.py" in words}
            found[group] = [(name, words, name == option) for name, words in mine.items()]
    return found


def _comments(path: Path) -> str:
    """The comments that a file begins with."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines())
    return " ".join(line[1:].strip() for line in lines if "@package" not in line)


def help_text(entry: Entry) -> str:
    """What `python <script> --help` prints."""
    lines = [entry.purpose, "", *(f"  {example}" for example in entry.examples), ""]
    lines += ["Options, one of a group (group=option), the default in brackets:", ""]
    for group, options in groups(entry.name).items():
        names = [f"[{name}]" if default else name for name, _, default in options]
        lines += _entry(group, ", ".join(names))
    lines += ["", "Settings (name=value), with their defaults before options change them; null is none:"]
    for section in sections(entry.schema):
        title = f"{section.prefix}: {section.words}" if section.prefix else section.words
        lines += ["", *textwrap.wrap(title, _WIDTH, subsequent_indent="  ", break_on_hyphens=False)]
        for setting in section.settings:
            lines += _entry(", ".join(setting.names), f"{setting.words} [{', '.join(_shown(setting))}]")
    lines += ["", "-m sweeps over comma-separated values. --cfg job prints the composed configuration and ends."]
    lines += ["The same as a page: docs/configuration.md. Hydra's own flags: --hydra-help."]
    return "\n".join(lines)


def _shown(setting: Setting) -> list[str]:
    """The defaults, once where they are all the same."""
    shown = [default or "must be given" for default in setting.defaults]
    return shown if len(set(shown)) > 1 else shown[:1]


def _entry(name: str, words: str) -> list[str]:
    indent = " " * (_NAMES + 2)
    lines = textwrap.wrap(words, _WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    if len(name) < _NAMES:
        lines[0] = f"  {name:{_NAMES}}{lines[0][_NAMES + 2 :]}"
        return lines
    return [f"  {name}", *lines]


def page(entries: Sequence[Entry]) -> str:
    """docs/configuration.md."""
    lines = ["# Configuration", "", *_PREFACE, ""]
    for entry in entries:
        lines += [f"## {entry.script}", "", entry.purpose, "", "| group | option | |", "|---|---|---|"]
        for group, options in groups(entry.name).items():
            lines += [
                f"| `{group}` | `{name}`{' (default)' if default else ''} | {_cell(words)} |"
                for name, words, default in options
            ]
        for section in sections(entry.schema):
            lines += ["", f"### {entry.script}: `{section.prefix}`" if section.prefix else "", "", section.words, ""]
            lines += ["| setting | default | |", "|---|---|---|"]
            for setting in section.settings:
                names = ", ".join(f"`{name}`" for name in setting.names)
                defaults = ", ".join(f"`{default}`" for default in _shown(setting))
                lines.append(f"| {names} | {defaults} | {_cell(setting.words)} |")
        lines.append("")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


def _cell(words: str) -> str:
    return words.replace("|", "\\|").replace("<", "&lt;")
