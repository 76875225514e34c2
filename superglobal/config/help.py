"""Text of `--help` and of docs/reference/configuration.md, made from the docstrings and fields of the schemas."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, get_args, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

from superglobal.config.common import PoolingOverrides, allowed_values, conf_dir
from superglobal.models.pooling import PoolingConfig

_WIDTH, _NAMES = 120, 32
_PREFACE = (
    "Made by `python scripts/config_reference.py` from the schemas in superglobal/config/ and the options in conf/;",
    "the commands print the same by `--help`. Give a setting as *name=value*, and an option of a group, which sets",
    "several settings, as *group=option*. Defaults are those before options change them; `<name>` is the value of",
    "another setting, null is none.",
)
# Classes whose fields are documented by another class.
_DOCUMENTED_BY = {PoolingOverrides: (PoolingOverrides, PoolingConfig)}


class Entry(NamedTuple):
    """A command that Hydra configures: its configuration in conf/, the command as users type it, and its help."""

    name: str
    script: str
    schema: type
    purpose: str
    examples: tuple[str, ...]


class Setting(NamedTuple):
    """Settings that share a description, which includes the allowed values; their distinct defaults as texts."""

    names: tuple[str, ...]
    defaults: tuple[str, ...]
    words: str


class Section(NamedTuple):
    """Settings below one prefix, "" for the top level, with the description of their schema."""

    prefix: str
    words: str
    settings: tuple[Setting, ...]


def describe_arguments(documented: Any) -> dict[str, str]:
    """Return the descriptions in the "Args" section of a docstring, by name; "a, b: text" describes both."""
    return {name: text for names, text in _argument_lines(documented).items() for name in names}


def _argument_lines(documented: Any) -> dict[tuple[str, ...], str]:
    text = inspect.cleandoc(documented.__doc__ or "").partition("\nArgs:\n")[2]
    lines = re.findall(r"^    ([\w, ]+): (.*(?:\n {8,}.*)*)", text.split("\n\n")[0], re.MULTILINE)
    return {tuple(names.split(", ")): " ".join(words.split()) for names, words in lines}


def sections(schema: type, prefix: str = "") -> Iterator[Section]:
    """Yield the settings of a schema, those of the top level first.

    Args:
        schema: dataclass such as `EvalConfig`.
        prefix: of the names.

    Raises:
        LookupError: no docstring describes a field.
    """
    nested = {name: kind for name, hint in get_type_hints(schema).items() if (kind := _dataclass_in(hint))}
    plain = {f.name: f for f in dataclasses.fields(schema) if f.name not in nested}
    documented = _DOCUMENTED_BY.get(schema, [kind for kind in schema.__mro__ if dataclasses.is_dataclass(kind)])
    settings, described = [], set[str]()
    for names, text in itertools.chain.from_iterable(_argument_lines(kind).items() for kind in documented):
        if own := [name for name in names if name in plain and name not in described]:
            limits = dict.fromkeys(_limits(plain[name], text) for name in own)
            defaults = dict.fromkeys(_default(plain[name]) for name in own)
            names = tuple(prefix + name for name in own)
            settings.append(Setting(names, tuple(defaults), " ".join([text, *limits]).strip()))
            described.update(own)
    if missing := plain.keys() - described:
        raise LookupError(f"{schema.__name__}: no docstring describes {', '.join(sorted(missing))}")
    summary = inspect.cleandoc(schema.__doc__ or "").split("\n\n")[0]
    yield Section(prefix.rstrip("."), " ".join(summary.split()), tuple(settings))
    for name, kind in nested.items():
        yield from sections(kind, f"{prefix}{name}.")


def _limits(field: dataclasses.Field[Any], text: str) -> str:
    """Return the allowed values in parentheses, unless the description has all of them."""
    choices: tuple[Any, ...] = field.metadata.get("choices", ())
    allowed = allowed_values(field)
    return "" if not allowed or (choices and all(f'"{choice}"' in text for choice in choices)) else f"({allowed})"


def _dataclass_in(hint: Any) -> Any:
    """Return the dataclass in a type such as `BackboneConfig | None`, or None."""
    kinds: list[Any] = [kind for kind in (hint, *get_args(hint)) if dataclasses.is_dataclass(kind)]
    return kinds[0] if kinds else None


def _default(field: dataclasses.Field[Any]) -> str:
    value: Any = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if value == MISSING:
        return "required"
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    if dataclasses.is_dataclass(value):
        return str(vars(value)).replace("'", "")
    # YAML is the notation of the command line; a reference to another setting becomes its name.
    text = OmegaConf.to_yaml({"_": value}, resolve=False).partition(":")[2].strip()
    return re.sub(r"\$\{([\w.]+)\}", r"<\1>", text.strip("'\""))


def groups(config_name: str) -> dict[str, list[tuple[str, str, bool]]]:
    """Return the options of each group of a configuration as (name, description, whether it is the default).

    The options are files in conf/, described by their first comments, and those that `register` adds.
    """
    config: Any = OmegaConf.load(conf_dir() / f"{config_name}.yaml")
    chosen = {
        str(group): option for line in config["defaults"] if not isinstance(line, str) for group, option in line.items()
    }
    found = {}
    for group, default in chosen.items():
        if group.startswith("override "):
            continue
        options = {path.stem: _comments(path.read_text()) for path in (conf_dir() / group).glob("*.yaml")}
        registered = ConfigStore.instance().repo.get(group, {})
        for file, node in registered.items():
            settings = {key: value for key, value in node.node.items() if key != "defaults"}
            options[file.removesuffix(".yaml")] = re.sub(r"[{}'\"]", "", str(settings))
        if group == "experiment":  # the comments of an experiment give its command
            options = {name: words for name, words in options.items() if f"{config_name}.py" in words}
        found[group] = [(name, words, name == default) for name, words in sorted(options.items())]
    return found


def _comments(text: str) -> str:
    """Return the comments that a file begins with, in one line."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    return " ".join(line[1:].strip() for line in lines if "@package" not in line)


def help_text(entry: Entry) -> str:
    """Return what the command prints for `--help`."""
    lines = [entry.purpose, "", *(f"  {example}" for example in entry.examples), ""]
    lines += ["Options, one per group (group=option), the default in brackets:", ""]
    for group, options in groups(entry.name).items():
        names = [f"[{name}]" if default else name for name, _, default in options]
        lines += _help_lines(group, ", ".join(names))
    lines += ["", "Settings (name=value), with their defaults before options change them; null is none:"]
    for section in sections(entry.schema):
        title = f"{section.prefix}: {section.words}" if section.prefix else section.words
        lines += ["", *textwrap.wrap(title, _WIDTH, subsequent_indent="  ", break_on_hyphens=False)]
        for setting in section.settings:
            lines += _help_lines(", ".join(setting.names), f"{setting.words} [{', '.join(setting.defaults)}]")
    lines += ["", "-m sweeps over comma-separated values. --cfg job prints the composed configuration and ends."]
    lines += ["The same as a page: docs/reference/configuration.md. Hydra's own flags: --hydra-help."]
    return "\n".join(lines)


def _help_lines(name: str, words: str) -> list[str]:
    indent = " " * (_NAMES + 2)
    lines = textwrap.wrap(words, _WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    if len(name) < _NAMES:
        lines[0] = f"  {name:{_NAMES}}{lines[0][_NAMES + 2 :]}"
        return lines
    return [f"  {name}", *lines]


def reference_page(entries: Sequence[Entry]) -> str:
    """Return docs/reference/configuration.md; a table that an earlier command has, too, is not repeated."""
    lines, printed = ["# Configuration", "", *_PREFACE, ""], dict[Any, str]()
    for entry in entries:
        tables: dict[str, list[str]] = {}
        for group, options in groups(entry.name).items():
            rows = [
                f"| `{name}`{' (default)' if default else ''} | {_cell(words)} |" for name, words, default in options
            ]
            tables[f"{group}="] = ["| option | |", "|---|---|", *rows]
        for prefix, summary, settings in sections(entry.schema):
            rows = [f"| {_code(names)} | {_code(defaults)} | {_cell(words)} |" for names, defaults, words in settings]
            tables[prefix or "top level"] = [summary, "", "| setting | default | |", "|---|---|---|", *rows]
        first = {name: printed.setdefault((name, *table), entry.script) for name, table in tables.items()}
        lines += [f"## {entry.script}", "", entry.purpose, ""]
        for script in dict.fromkeys(first.values()):
            if script != entry.script:
                shared = _code([name for name in tables if first[name] == script])
                lines += [f"Takes from {script}: {shared}.", ""]
        for name, table in tables.items():
            if first[name] == entry.script:
                lines += [f"### {entry.script}: `{name}`", "", *table, ""]
    return "\n".join(lines)


def _code(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _cell(words: str) -> str:
    return words.replace("|", "\\|").replace("<", "&lt;")
