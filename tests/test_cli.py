"""The command `superglobal`: help, version, exit status, and agreement with the scripts of a checkout."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import warnings

import pytest

import superglobal
from superglobal import cli


def test_help_lists_every_command_on_one_line(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([])
    assert end.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    for name, (_, _, summary) in cli.COMMANDS.items():
        assert any(line.split() == [name, *summary.split()] for line in lines), name


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        sys.exit(cli.main([command, "--help"]))
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert f"superglobal {command} " in text or f"python {command.replace('evaluate', 'eval')}.py " in text
    assert len(text.splitlines()) > 5


def test_version_is_printed_and_the_package_runs_as_a_module():
    for words in (["--version"], ["store", "--help"]):
        done = subprocess.run([sys.executable, "-m", "superglobal", *words], capture_output=True, text=True, check=True)
        assert f"superglobal {superglobal.__version__}" in done.stdout or "usage: superglobal store" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["describe"], "'describe': expected one of evaluate, train"),
        (["store", "info", "nowhere"], "error: nowhere"),
        (["visualize", "."], "error: .: "),
        (["export", "nowhere.safetensors", "x.onnx"], "error: weights=nowhere.safetensors: no such file"),
        (["evaluate", "dataset=roxford5k", "weights=random", "backbone=test_resnet", "hydra.run.dir=."], "error: "),
        (
            ["train", "paths.outputs=/dev/null"],
            "(Not a directory); move away what is in its place, or change",
        ),
        (["train", "-m", "seed=0,1", "paths.outputs=/dev/null"], "error: /dev/null/train/sweep/"),
    ],
)
def test_invalid_arguments_print_a_message_and_exit_with_status_2(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        sys.exit(cli.main(words))
    assert end.value.code == 2
    assert message in capsys.readouterr().err


# Commands print, and Hydra logs to stdout.
LOGGING = """
import logging, sys
from superglobal.utils.distributed import exit_on_closed_output
with exit_on_closed_output():
    logging.basicConfig(stream=sys.stdout)
    logging.warning("")
    print("not reached", file=sys.stderr)
"""


@pytest.mark.parametrize("code", ["import superglobal.cli; superglobal.cli.main(['--help'])", LOGGING])
def test_a_command_ends_quietly_when_nobody_reads_its_output(code):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_the_folder_of_a_sweep_job_has_a_short_and_safe_name(tmp_path, capsys):
    words = ["dataset=folder", "dataset.database=nowhere", "dataset.query=nowhere", "backbone=test_resnet"]
    words += ["weights=random", "rerank=none,mutual", f"pooling.tuned_on=../a {'b' * 300}"]
    with pytest.raises(SystemExit) as end:
        cli.main(["evaluate", "-m", *words, f"paths.outputs={tmp_path}"])
    assert end.value.code == 2
    (sweep,) = (tmp_path / "eval/sweep").iterdir()
    names = sorted(path.name for path in sweep.iterdir() if path.is_dir())
    assert [name[:26] for name in names] == ["0_backbone=test_resnet,dat", "1_backbone=test_resnet,dat"]
    assert all("pooling.tuned_on=..-a-bbb" in name and len(name) == 102 for name in names)


def test_warnings_of_pil_that_name_no_file_are_not_shown():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        importlib.reload(cli)
        warnings.warn_explicit("Truncated File Read", UserWarning, "TiffImagePlugin.py", 1, "PIL.TiffImagePlugin")
        warnings.warn_explicit("other", UserWarning, "other.py", 1, "other")
    assert [str(warning.message) for warning in caught] == ["other"]
