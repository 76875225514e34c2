"""Code blocks, commands, headings and links of README.md and docs/; checks of commands without running them."""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from superglobal import cli
from superglobal.config import ENTRIES, register
from superglobal.config.common import validate_config
from superglobal.config.evaluation import EvalConfig
from superglobal.config.training import TrainConfig

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    *sorted(
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "docs").rglob("*.md")
        if "_build" not in path.parts and path.name != "cli.md"  # made by docs/conf.py
    ),
]
CONFIGURED: dict[str, tuple[str, Any]] = {
    **{entry.script: (entry.name, entry.schema) for entry in ENTRIES},
    "superglobal evaluate": ("eval", EvalConfig),
    "superglobal train": ("train", TrainConfig),
    "my_eval.py": ("eval", EvalConfig),  # of docs/contributing/extending.md
}
"""Program -> its configuration's name and schema; the others parse their arguments by argparse."""


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        language: of the fence.
        text: the code.
        file: name of the file, if the first line is a comment with one.
        needs: requirement in a comment `<!-- needs: ... -->` before the block; such code is not run.
    """

    language: str
    text: str
    file: str | None
    needs: str | None


def text_of(document: str) -> str:
    return (ROOT / document).read_text()


def blocks(text: str, language: str) -> list[Block]:
    """Return the blocks of one language, in order."""
    result = []
    for needs, kind, body in re.findall(r"(?:<!-- needs: (.*?) -->\n+)?^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.M):
        name = re.match(r"# (\S+\.(?:py|yaml))\n", body)
        if kind == language:
            result.append(Block(kind, body, name and name[1], needs or None))
    return result


def without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.M)


def commands(text: str, inline: bool = True) -> list[list[str]]:
    """Return the program and the arguments of every command: ["eval.py", "k=10"], ["superglobal tune", "name=x"].

    inline: include those between backticks in running text.
    """
    lines = "\n".join(block.text for block in blocks(text, "bash")).replace("\\\n", " ").splitlines()
    if inline:
        spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", without_blocks(text))]
        lines += [span for span in spans if re.match(r"(\w+=\S+ )*(python|torchrun|srun|superglobal [a-z-]+) ", span)]
    result = []
    for line in lines:
        words = shlex.split(re.sub(r"\[(--[^\]]+)\]", r"\1", line), comments=True)
        if "superglobal" in words[:-1]:
            start = words.index("superglobal") + 1
            if words[start].startswith("-"):  # --help, --version
                continue
            words[start] = f"superglobal {words[start]}"
        else:
            start = next((i for i, word in enumerate(words) if word.endswith(".py")), 0)
            if not {"python", "torchrun"} & set(words[:start]):
                continue
        # Leave out shell variables and the end of a shell function.
        result.append([word for word in words[start:] if "$" not in word and word != "}"])
    return result


def composed(words: list[str], folder: Path = ROOT) -> DictConfig:
    """Return the validated configuration of a command, of a sweep that of its first job.

    Args:
        words: the command; `...` is left out.
        folder: parent of its `--config-dir`.
    """
    name, schema = CONFIGURED[words[0]]
    flags = ("-m", "--help", "--cfg", "job")
    rest = [word for word in words[1:] if word not in (*flags, "...") and not word.endswith("=...")]
    if "--config-dir" in rest:
        index = rest.index("--config-dir")
        assert (folder / rest[index + 1]).is_dir(), words
        rest[index : index + 2] = [f"hydra.searchpath=[file://{folder / rest[index + 1]}]"]
    first = [re.sub(r"=glob\(\*\)$", "=gem", word if word.endswith("]") else word.split(",")[0]) for word in rest]
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose(name, overrides=first)
    # A store alone says what the rest is: tests/test_page_search.py.
    if not isinstance(config.get("store"), str):
        validate_config(config, schema)
    return config


class _ParsedError(Exception):
    pass


def require_arguments(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Start a program that parses its arguments by argparse, and stop it once they are parsed."""

    def stopping(parse: Any) -> Any:
        def parsed(self: Any, *args: Any, **options: Any) -> Any:
            result = parse(self, *args, **options)
            if self.prog == "superglobal":  # The command's own parser is next.
                return result
            raise _ParsedError

        return parsed

    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, stopping(getattr(argparse.ArgumentParser, name)))
    if words[0].startswith("superglobal "):
        with pytest.raises(_ParsedError):
            cli.main([words[0].removeprefix("superglobal "), *words[1:]])
        return
    assert "argparse" in (ROOT / words[0]).read_text(), f"{words[0]} would run: name its configuration in CONFIGURED"
    monkeypatch.setattr("sys.argv", words)
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    with pytest.raises(_ParsedError):
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")


def anchors(document: str) -> set[str]:
    """Return the anchors that GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", without_blocks(text_of(document)), re.M)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", h).lower()).replace(" ", "-") for h in headings}


def links(document: str) -> Iterator[tuple[str, str]]:
    """Yield (path from the root, anchor) of each link and image that leads to a file of this project."""
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(text_of(document))):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            target_path = (ROOT / document).parent / path if path else ROOT / document
            yield target_path.resolve().relative_to(ROOT.resolve()).as_posix(), anchor
