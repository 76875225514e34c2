"""Trackers, tested by the files they write: Weights & Biases records, TensorBoard events and CSV files."""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from PIL import Image, ImageColor
from pytorch_lightning.loggers import TensorBoardLogger
from trackers import events, read_offline_run, references, table

from superglobal.config import register
from superglobal.config.common import validate_config
from superglobal.config.evaluation import EvalConfig
from superglobal.errors import InputError
from superglobal.evaluation.pipeline import evaluate
from superglobal.loggers import evaluation_loggers
from superglobal.loggers.csv_tensorboard import CurveFile, TensorBoardCurves
from superglobal.loggers.wandb import TrackedRun
from superglobal.reporting.ranking_figures import COLORS

ROOT = Path(__file__).parents[1]
FAST = ["backbone=test_resnet", "weights=random", "scales=1", "trainer.accelerator=cpu", "trainer.num_workers=0"]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Remove the settings of W&B from the environment."""
    for key in [key for key in os.environ if key.startswith("WANDB")]:
        monkeypatch.delenv(key)


def compose_eval_config(data: Path, outputs: Path, *overrides: str):
    """Compose the configuration of an evaluation of the toy set."""
    paths = [f"paths.data={data}", f"paths.outputs={outputs}", "trainer.progress=false", "figures.queries=2"]
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("eval", overrides=["dataset=toy", *FAST, *paths, *overrides])


@pytest.fixture(scope="module")
def evaluated(toy_data, tmp_path_factory) -> Path:
    """Evaluate a weights file with all trackers and return the result folder."""
    import superglobal
    from superglobal.models.weights import save_weights

    outputs = tmp_path_factory.mktemp("outputs")
    model = superglobal.load_model("random", backbone="test_resnet", scales=1)
    save_weights(model, outputs / "some weights.safetensors", {})
    folder = outputs / "run"
    folder.mkdir()
    settings = ["logger.tensorboard=true", "logger.project=mine", "logger.tags=[tried]", "logger.images=3"]
    weights = [f"weights='{outputs / 'some weights.safetensors'}'", "figures.ranks=4"]
    with pytest.MonkeyPatch.context() as patch:
        for key in [key for key in os.environ if key.startswith("WANDB")]:
            patch.delenv(key)
        evaluate(compose_eval_config(toy_data, outputs, *settings, *weights), folder)
    return folder


def test_an_offline_run_contains_settings_and_metrics(evaluated):
    run, result = read_offline_run(evaluated), json.loads((evaluated / "results.json").read_text())
    assert run.exit_code == 0
    assert (run.run.project, run.run.job_type, run.run.run_group) == ("mine", "eval", "")
    assert list(run.run.tags) == ["tried", "toy"]
    assert run.run.run_id == (evaluated / "wandb_id").read_text()
    assert run.config["rerank"]["K"] == 9
    assert run.config["counts"] == result["counts"]
    assert run.config["about"]["network"] == result["about"]["network"]
    (point,) = run.history
    for stage, scores in result["metrics"].items():
        for protocol, value in scores["map"].items():
            assert point[f"{stage}/map/{protocol}"] == pytest.approx(100 * value)
            assert run.summary[f"{stage}/map/{protocol}"] == point[f"{stage}/map/{protocol}"]
    assert point["seconds/search"] == pytest.approx(result["seconds"]["search"])
    searched = result["seconds"]["search"] + result["seconds"]["rerank"]
    assert point["ms_per_query"] == pytest.approx(1000 * searched / result["counts"]["queries"])
    assert run.summary["status"] == "ok"


def test_wandb_tables_contain_every_query_and_images_with_borders(evaluated):
    run = read_offline_run(evaluated)
    with (evaluated / "per_query.csv").open() as file:
        written = list(csv.DictReader(file))
    columns, rows, _ = table(run, "per_query")
    assert len(rows) == len(written)
    for row, line in zip(rows, written, strict=True):
        got = dict(zip(columns, row, strict=True))
        assert got["query"] == line["query"]
        for stage in ("search", "rerank"):
            value = line[f"{stage} easy AP"]  # empty for a query without easy images
            assert got[f"{stage} easy AP"] == (pytest.approx(100 * float(value)) if value else None)
        assert got["change"] == pytest.approx(got["rerank medium AP"] - got["search medium AP"])

    columns, rows, files = table(run, "rankings")
    assert len(rows) == 3
    listed = {entry["number"]: entry for entry in json.loads((evaluated / "rankings.json").read_text())}
    corners = []
    for row in rows:
        got = dict(zip(columns, row, strict=True))
        names = [entry["image"] for entry in listed[got["number"]]["results"][:4]]
        assert got["first results of rerank"]["caption"] == ", ".join(names)
        strip = Image.open(files[got["first results of rerank"]["path"]])
        assert strip.width == pytest.approx(4 * 164, abs=8)
        corners.append([strip.getpixel((rank * 164 + 2, 2)) for rank in range(4)])
        assert Image.open(files[got["image"]["path"]]).width <= 148

    columns, rows, files = table(run, "descriptors")
    assert len(rows) == 3 + 3 * 4
    axes = np.array([row[columns.index("axis0") :] for row in rows], dtype=float)
    kinds = [row[columns.index("kind")] for row in rows]
    assert kinds[:3] == ["query"] * 3
    assert set(kinds[3:]) <= {"easy", "hard", "junk", "negative"}
    # The color of a result's border, at its upper left corner, shows its relevance.
    borders = np.array([ImageColor.getrgb(COLORS[kind]) for kind in kinds[3:]])
    assert np.abs(np.reshape(corners, (-1, 3)) - borders).max() < 40
    with np.load(evaluated / "rankings.npz") as rankings:
        first = rankings["search_scores"][0, :4]
        ids, reranked = rankings["search_ids"][0, :4].tolist(), rankings["rerank_ids"][0, :4].tolist()
    # Squared distances between points equal those between descriptors: 2 - 2 s.
    for position, image in enumerate(reranked):
        if image in ids:
            distance = ((axes[0] - axes[3 + position]) ** 2).sum()
            assert distance == pytest.approx(2 - 2 * first[ids.index(image)], abs=1e-4)


def test_artifacts_of_model_and_stores_only_refer_to_their_files(evaluated):
    run, result = read_offline_run(evaluated), json.loads((evaluated / "results.json").read_text())
    assert references(run, "model") == [f"file://{evaluated.parent / 'some weights.safetensors'}"]
    stores = {Path(value.removeprefix("file://")).parent for value in references(run, "descriptors")}
    prints = {title: value["fingerprint"] for title, value in result["about"]["stores"].items()}
    assert {json.loads((store / "manifest.json").read_text())["rows"] for store in stores} == set(
        result["counts"].values()
    )
    assert sorted(store.name[-16:] for store in stores) == sorted(value[:16] for value in prints.values())
    for artifact in run.artifacts.values():
        if artifact.type in ("model", "descriptors"):
            assert not any(entry.local_path for entry in artifact.manifest.contents)
    # The files to upload later are stored with the run, not in the home folder.
    assert all(path.is_relative_to(evaluated) for path in table(run, "rankings")[2].values())


def test_tensorboard_and_csv_contain_the_same_metrics(evaluated):
    run, written_events = read_offline_run(evaluated), events(evaluated / "tensorboard")
    with (evaluated / "csv/metrics.csv").open() as file:
        (written,) = csv.DictReader(file)
    metrics = {key: value for key, value in run.history[0].items() if "/map/" in key or "seconds/" in key}
    assert len(metrics) > 8
    for name, value in metrics.items():
        (event,) = written_events.Scalars(name)
        assert event.value == pytest.approx(value, rel=1e-5, abs=1e-5)
        assert float(written[name]) == pytest.approx(value)
    strips = [tag for tag in written_events.Tags()["images"] if tag.endswith("/rerank")]
    assert len(strips) == 3
    image = Image.open(io.BytesIO(written_events.Images(strips[0])[0].encoded_image_string))
    assert np.asarray(image).std() > 20
    assert "search/medium AP" in written_events.Tags()["histograms"]


def test_repeating_an_evaluation_continues_its_run_and_needs_no_images(evaluated, toy_data, tmp_path):
    rng = np.random.default_rng(0)
    for name, count in (("q", 5), ("x", 30)):
        x = rng.standard_normal((count, 8)).astype(np.float32)
        np.save(tmp_path / f"{name}.npy", x / np.linalg.norm(x, axis=1, keepdims=True))
    descriptors = [f"descriptors.query={tmp_path / 'q.npy'}", f"descriptors.database={tmp_path / 'x.npy'}"]
    folder = tmp_path / "run"
    folder.mkdir()
    for _ in range(2):
        evaluate(compose_eval_config(toy_data, tmp_path, "dataset=descriptors", *descriptors), folder)
    runs = list(folder.glob("wandb/offline-run-*/*.wandb"))
    assert [path.stem for path in runs] == [f"run-{(folder / 'wandb_id').read_text()}"] * len(runs)
    run = read_offline_run(folder)
    assert run.exit_code == 0
    columns, rows, files = table(run, "rankings")
    assert columns[-2:] == ["first results of search", "first results of rerank"]
    listed = json.loads((folder / "rankings.json").read_text())
    assert rows[0][-1] == ", ".join(result["image"] for result in listed[0]["results"][:10])
    assert list(files) == ["rankings.table.json"]
    assert not references(run, "model")


def test_failed_and_interrupted_runs_are_recorded_as_such(toy_data, tmp_path, caplog):
    caplog.set_level("INFO")
    failed = tmp_path / "failed"
    with pytest.raises(InputError):
        evaluate(compose_eval_config(toy_data, tmp_path, "weights=nowhere.pth"), failed)
    run = read_offline_run(failed)
    assert run.exit_code == 1
    assert run.summary["status"] == "failed"
    assert "nowhere.pth" in run.summary["error"]
    assert "W&B" not in caplog.text
    assert "WANDB_DATA_DIR" not in os.environ
    config = validate_config(compose_eval_config(toy_data, tmp_path), EvalConfig)
    for error in (KeyboardInterrupt, SystemExit):
        folder = tmp_path / error.__name__
        with pytest.raises(error), evaluation_loggers(config, folder, "a sweep"):
            raise error(143)
        run = read_offline_run(folder)
        assert (run.exit_code, run.run.run_group, run.summary["status"]) == (255, "a sweep", "interrupted")


def test_tensorboard_hides_the_lost_steps_of_a_resumed_training(tmp_path):
    for start in (0, 3):
        curves = TensorBoardCurves(tmp_path, start)
        for step in range(start + 1, start + 6):
            curves.log_metrics({"loss": float(10 * start + step)}, step=step)
        curves.close(None)
        time.sleep(1.1)  # event files are ordered by the time in their names, in seconds
    shown = {event.step: event.value for event in events(tmp_path / "tensorboard").Scalars("loss")}
    assert shown == {1: 1, 2: 2, 3: 3, 4: 34, 5: 35, 6: 36, 7: 37, 8: 38}


def test_the_curves_of_a_resumed_training_drop_later_and_incomplete_rows(tmp_path):
    path = tmp_path / "curves.csv"
    curves = CurveFile(path, 0)
    for step in range(1, 6):
        curves.log_metrics({"loss": float(step)}, step=step)
    with path.open("a") as file:
        file.write("6,6")
    curves = CurveFile(path, 3)
    curves.log_metrics({"loss": 40.0, "val/map": 0.5}, step=4)
    curves.log_metrics({"loss": 50.0}, step=5)
    assert path.read_text().splitlines() == ["step,loss,val/map", "1,1.0,", "2,2.0,", "3,3.0,", "4,40.0,0.5", "5,50.0,"]
    CurveFile(path, 0).log_metrics({"loss": 1.0}, step=1)
    assert path.read_text().splitlines() == ["step,loss", "1,1.0"]


def test_failing_curves_stop_with_one_warning_and_training_continues(tmp_path, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise OSError("no space")

    curves = TensorBoardCurves(tmp_path, 0)
    curves.log_metrics({"loss": 1.0}, step=1)
    monkeypatch.setattr(TensorBoardLogger, "log_metrics", fail)
    for step in (2, 3):
        curves.log_metrics({"loss": 1.0}, step=step)
    monkeypatch.undo()
    curves.log_metrics({"loss": 1.0}, step=4)
    curves.close(None)
    assert [event.step for event in events(tmp_path / "tensorboard").Scalars("loss")] == [1]
    assert caplog.text.count("TensorBoard failed (no space) and is stopped; curves.csv still records the curves") == 1


def test_a_failing_tracker_is_closed_with_a_warning(toy_data, tmp_path, caplog):
    config = validate_config(compose_eval_config(toy_data, tmp_path), EvalConfig)
    with evaluation_loggers(config, tmp_path / "run", None) as track:
        track("no result")  # type: ignore[arg-type]
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [text.split(" (")[0] for text in warnings] == ["CSV failed", "W&B failed"]
    assert all(str(tmp_path / "run") in text for text in warnings)
    assert read_offline_run(tmp_path / "run").exit_code == 0


def environment(**more: str) -> dict[str, str]:
    """Return the environment variables without those of W&B, with lines of 200 characters and `more`."""
    return {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {"COLUMNS": "200", **more}


def test_a_sweep_in_a_terminal_without_a_wandb_key_does_not_prompt(toy_data, tmp_path):
    """This also holds for WANDB_MODE=online."""
    paths = [f"paths.data={toy_data}", f"paths.outputs={tmp_path}", "hydra.sweep.dir=${paths.outputs}/tried"]
    command = [sys.executable, str(ROOT / "eval.py"), "-m", "dataset=toy", *FAST, *paths, "rerank.K=3,5"]
    controller, terminal = pty.openpty()
    # W&B prompts only if all three streams are terminals.
    env = environment(WANDB_MODE="online", HOME=str(tmp_path), NETRC=str(tmp_path / "none"))
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)
    text = b""
    while True:
        try:
            text += (part := os.read(controller, 65536))
        except OSError:  # Linux raises this error when there is no writer anymore
            break
        if not part:
            break
    os.close(controller)
    output = text.decode()
    assert process.wait(timeout=200) == 0, output
    assert "there is no API key" in output
    assert "2 jobs, 1 different extractions" in output
    runs = [read_offline_run(folder) for folder in sorted((tmp_path / "tried").glob("*_*"))]
    assert [run.run.run_group for run in runs] == ["tried"] * 2
    assert [run.config["rerank"]["K"] for run in runs] == [3, 5]
    assert len({run.run.run_id for run in runs}) == 2


def test_a_run_continues_offline_if_the_server_does_not_answer(tmp_path):
    code = (
        "import logging, sys; from pathlib import Path; logging.basicConfig();"
        "from superglobal.config.common import LoggerConfig; from superglobal.loggers.wandb import TrackedRun\n"
        "for name in 'ab':\n"
        " folder = Path(sys.argv[1]) / name; folder.mkdir()\n"
        " run = TrackedRun(LoggerConfig(), folder, name='n', job_type='eval', group=None, tags=[], config={})\n"
        " run.finish(None)"
    )
    env = environment(WANDB_API_KEY="0" * 40, WANDB_BASE_URL="http://127.0.0.1:9", WANDB_INIT_TIMEOUT="1")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("continues offline") == 1
    assert [read_offline_run(tmp_path / name).exit_code for name in "ab"] == [0, 0]


def test_names_and_tags_are_shortened_to_the_limits_of_wandb(tmp_path):
    from superglobal.config.common import LoggerConfig

    run = TrackedRun(
        LoggerConfig(tags=["t" * 90]), tmp_path, name="n" * 300, job_type="eval", group="g" * 300, tags=[""], config={}
    )
    run.log_reference("a name/with: what is not allowed", "model", Path(__file__), {"p": float("inf")}, checksum=True)
    run.finish(None)
    offline_run = read_offline_run(tmp_path)
    assert (len(offline_run.run.display_name), len(offline_run.run.run_group)) == (128, 128)
    assert [len(tag) for tag in offline_run.run.tags] == [64]
    assert references(offline_run, "model") == [f"file://{Path(__file__).resolve()}"]


def test_logger_settings_are_validated(toy_data, tmp_path):
    with pytest.raises(InputError, match=r"logger\.images=-1"):
        validate_config(compose_eval_config(toy_data, tmp_path, "logger.images=-1"), EvalConfig)
    config = validate_config(compose_eval_config(toy_data, tmp_path, "logger=tensorboard"), EvalConfig)
    assert (config.logger.wandb, config.logger.tensorboard) == (False, True)


WITHOUT = "import runpy, sys; sys.modules.update(dict.fromkeys(('wandb', 'faiss')))\n"


@pytest.mark.parametrize("script", ["eval.py", "train.py"])
def test_wandb_and_faiss_are_optional(script):
    code = f"{WITHOUT}import superglobal.evaluation.pipeline\nrunpy.run_path({script!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_evaluation_without_the_wandb_package_needs_logger_csv(toy_data, tmp_path):
    code = f"{WITHOUT}sys.argv[0] = 'eval.py'; runpy.run_path('eval.py', run_name='__main__')"
    paths = [f"paths.data={toy_data}", f"paths.outputs={tmp_path}", f"hydra.run.dir={tmp_path}/run"]
    command = [sys.executable, "-c", code, "dataset=toy", *FAST, *paths]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2
    message = "the package wandb is not installed; run `pip install wandb`, or use logger=csv"
    assert f"error: logger.wandb=true: {message}" in done.stderr
    done = subprocess.run([*command, "logger=csv"], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/results.json").is_file()
