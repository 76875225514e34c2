"""Check the command line before Hydra reads it, and quote paths and names so that Hydra keeps them as they were typed.

Hydra's grammar changes or rejects many paths and names: it reads 2023_08 as a number, and has no characters such as ó.
"""

from __future__ import annotations

import os
import re
import shlex
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass, make_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from superglobal.config.common import conf_dir
from superglobal.config.help import Entry, dataclass_in, default_options
from superglobal.errors import InputError, did_you_mean, one_of

OLD_SETTINGS = {
    "statistics": "use whitening=none, center or pca",
    "statistics.kind": "use whitening.kind",
    "statistics.dims": "use whitening.dims",
    "extraction.part": "use extraction.shard",
    "extraction.compile": "it was removed and had no effect; delete it",
    "pictures.queries": "use figures.queries",
    "pictures.ranks": "use figures.ranks",
    "logger.pictures": "use logger.images",
    "dataset.neighbours": "use dataset.neighbors",
    "data.bad_budget": "use data.max_corrupt_fraction",
    "data.max_corrupt": "use data.max_corrupt_fraction",
    "distractors.skip_budget": "use distractors.max_corrupt_fraction",
    "validation.images": "use validation.max_images",
}
"""Name of a setting that was renamed or removed -> advice on what to do instead."""
_OVERRIDE = re.compile(r"(\+{0,2}|~)([^=]*)=(.*)", re.DOTALL)
_FUNCTION = re.compile(r"(choice|glob|interval|range|shuffle|sort|tag)\(.*\)", re.DOTALL)
_TEXTS = re.compile(r"\[([^'\"\[\]{}]*)\]")
_INTERPOLATION = re.compile(r"\$\{[^}]*\}")
_EXPECTED = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a text",
    list: "a list in brackets, such as [a,b]",
}


def prepare_arguments(entry: Entry, arguments: Iterable[str]) -> list[str]:
    """Check the arguments of a command, and return them in the form that Hydra reads.

    A text, such as a path or a name, reaches the command as it was typed, except that "~" at its start becomes the home
    folder. Values in Hydra's quotes, null, references such as ${paths.data}, and lists a,b of a sweep keep their
    meaning.

    Args:
        entry: command.
        arguments: arguments of the command line, such as "dataset.database=photos [2024]".

    Raises:
        InputError: an argument is not of the form name=value, or has an unknown name, option or type of value.
    """
    arguments = list(arguments)
    validate_arguments(arguments)
    for text in arguments:
        if re.match(r"--[\w.]+=", text) and not re.match(r"--(cfg|config-\w+|experimental-rerun|info|package)=", text):
            raise InputError(f"{text}: settings have no dashes; write {text.lstrip('-')}")
    flags, rest = get_args_parser().parse_known_args(arguments)
    overrides = [text for text in (*flags.overrides, *rest) if not text.startswith("-")]
    if flags.config_path or flags.config_name or flags.experimental_rerun:
        return arguments  # another configuration; Lightning also starts further processes in this way
    settings = dict(_settings(entry.schema))
    prepared = {}
    for number, text in enumerate(overrides):
        match = _OVERRIDE.fullmatch(text)
        if match is None and not text.startswith("~"):
            both = shlex.quote(" ".join(overrides[max(0, number - 1) : number + 1]))
            raise InputError(f"{text}: expected name=value" + (f", or quotes around a value: {both}" if number else ""))
        prefix, name, value = match.groups() if match else ("~", text[1:], "")
        if re.match(r"hydra\b", name) or re.search("[@/]", name):
            continue
        if name not in settings:
            _check_name(entry, settings, prefix, name, text)
            _check_option(name, value, text, flags, overrides)
        elif prefix != "~":
            value = _as_typed(settings[name], value, flags.multirun)
            _check_value(name, settings[name], value, text, flags.multirun)
            prepared[text] = f"{prefix}{name}={value}"
    return [prepared.get(text, text) for text in arguments]


def validate_arguments(arguments: Iterable[str]) -> None:
    """Reject command lines that contain a setting that was renamed or removed, or text that is not UTF-8.

    Args:
        arguments: arguments of the command line, such as "whitening.kind=pca".

    Raises:
        InputError: an argument contains a renamed or removed setting, and the message says what to use instead; or an
            argument or the name of the current folder is not UTF-8, or contains a number that Hydra cannot read.
    """
    arguments = list(arguments)
    for text in (*arguments, os.getcwd()):
        if text != text.encode(errors="ignore").decode():
            raise InputError(f"{text}: not UTF-8; rename the file or folder, or use a link with another name")
        if re.search(r"\d[\d_]{299}", text):  # Hydra cannot convert an integer above 1e308 to a floating-point number.
            raise InputError(f"{text[:40]}...: expected a number of fewer than 300 digits")
    for argument in arguments:
        name = argument.lstrip("+~").partition("=")[0]
        if name in OLD_SETTINGS:
            raise InputError(f"{argument}: the setting {name} no longer exists; {OLD_SETTINGS[name]}")


def _settings(schema: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the name and the type of each setting of a schema, including those of nested schemas."""
    hints = get_type_hints(schema)
    for field in fields(schema):
        hint, name = hints[field.name], prefix + field.name
        nested = dataclass_in(hint)
        if hint is Any and is_dataclass(factory := field.default_factory):  # a section that a path may replace
            nested, hint = factory, str
            yield name, hint
        if nested is None:
            yield name, hint
        else:
            yield from _settings(nested, f"{name}.")


def _check_name(entry: Entry, settings: dict[str, Any], prefix: str, name: str, text: str) -> None:
    """Raise InputError if a command has no setting or group of options of this name.

    Args:
        entry: command.
        settings: settings of the command, by name.
        prefix: "+" or "++" if the argument adds a group, "~" if it removes one, else empty.
        name: name of the setting or the group.
        text: the argument.
    """
    groups = [group for group in default_options(entry.name) if not group.startswith("override ")]
    if name in groups or (prefix and (conf_dir() / name).is_dir()):
        return
    inside = [setting for setting in settings if setting.startswith(f"{name}.")]
    if inside and text.partition("=")[2].startswith("{"):
        return
    if inside:
        raise InputError(f"{text}: {name} is a section; expected one of its settings: {', '.join(inside)}")
    hint = did_you_mean(name, [*settings, *groups]) or "; --help lists all settings"
    raise InputError(f"{text}: there is no setting {name}{hint}")


def _check_option(group: str, value: str, text: str, flags: Namespace, overrides: Sequence[str]) -> None:
    """Raise InputError if a group has no such option, or if there are several without a sweep.

    Args:
        group: name of the group, such as "dataset".
        value: option, or several options separated by commas.
        text: the argument.
        flags: Hydra's flags; --config-dir is a folder with further options, and -m runs a sweep.
        overrides: all settings of the command line; `hydra.searchpath` may add folders, and then all options are valid.
    """
    if value in ("", "null") or re.search(r"""['"()\[\]{}$]""", value):
        return
    if any(override.lstrip("+").startswith("hydra.searchpath=") for override in overrides):
        return
    folders = [conf_dir(), *([Path(flags.config_dir)] if flags.config_dir else [])]
    options = {path.stem for folder in folders for path in (folder / group).glob("*.yaml")}
    options |= {file.removesuffix(".yaml") for file in ConfigStore.instance().repo.get(group, {})}
    for option in value.split(","):
        name = option.strip().removesuffix(".yaml")
        if name not in options and not any((folder / group / f"{name}.yaml").is_file() for folder in folders):
            raise InputError(f"{text}: {group} has no option {name}; expected {one_of(name, sorted(options))}")
    if "," in value and not flags.multirun:
        raise InputError(f"{text}: several options; add -m to run the command once for each")


def _check_value(name: str, hint: Any, value: str, text: str, multirun: bool) -> None:
    """Raise InputError if a value does not have the type of its setting.

    Args:
        name: name of the setting.
        hint: type of the setting.
        value: value, in the form that Hydra reads.
        text: the argument.
        multirun: whether the command runs once for each value of a list a,b.
    """
    kinds = [get_origin(hint)] if get_origin(hint) is list else [hint, *get_args(hint)]
    expected = " or ".join(_EXPECTED[kind] for kind in kinds if kind in _EXPECTED)
    message = f"{text}: expected {expected or 'a value in the grammar of Hydra; put a text in quotes'}"
    try:
        override = OverridesParser.create().parse_override(f"{name}={value}")
    except HydraException as error:
        raise InputError(message) from error
    if override.is_sweep_override() and not multirun:
        raise InputError(f"{text}: several values; add -m to run the command once for each, or use a list {name}=[...]")
    values = override.value()
    for element in values.list if isinstance(values, ChoiceSweep) else [] if override.is_sweep_override() else [values]:
        try:
            OmegaConf.structured(make_dataclass("Typed", [("value", hint)])).value = element
        except OmegaConfBaseException as error:
            raise InputError(message) from error


def _as_typed(hint: Any, value: str, multirun: bool) -> str:
    """Return the value of a setting, with texts quoted where Hydra would otherwise reject or change them.

    Args:
        hint: type of the setting.
        value: value as it was typed.
        multirun: whether a list a,b consists of several texts.
    """
    if hint == list[str] and (elements := _TEXTS.fullmatch(value)):
        return f"[{','.join(_quote(text.strip()) for text in elements[1].split(','))}]"
    if get_origin(hint) is list or str not in (hint, *get_args(hint)) or (multirun and _FUNCTION.fullmatch(value)):
        return value
    if not multirun:
        return _quote(value)
    if re.search("['\"]", value) and _parse(value) is not None:
        return value
    return ",".join(_quote(text.strip().replace("\\,", ",")) for text in re.split(r"(?<!\\),", value))


def _quote(text: str) -> str:
    """Return a text in quotes, unless Hydra reads it without quotes as the same text."""
    home = re.match(r"~(?=/|$)", text)
    text = os.path.expanduser(text) if home else text
    value = _parse(text)
    if isinstance(value, QuotedString) or text.lower() in ("", "null") or value == text:
        return text
    if not _INTERPOLATION.search(text):
        # OmegaConf reads ${ as the start of a reference, unless a backslash precedes it.
        text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    return QuotedString(text=text, quote=Quote.single).with_quotes()


def _parse(text: str) -> Any:
    """Return the value that Hydra reads from a text; None if it cannot read it."""
    try:
        return OverridesParser.create().parse_override(f"x={text}")._value
    except HydraException:
        return None
