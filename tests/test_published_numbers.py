"""Scores of the paper in tables: shown only for exactly the same configuration, and marked as not measured."""

from __future__ import annotations

import io
from dataclasses import asdict

import numpy as np
import pytest
from PIL import Image
from test_tables import job, rows_of

from superglobal.models.pooling import PoolingConfig
from superglobal.reporting.runs import read_results
from superglobal.reporting.table_rows import published_for
from superglobal.reporting.tables import write_tables
from superglobal.reranking.registry import get_reranker

PAPER = {
    "dataset__kind": "revisited", "dataset__crop_query": True, "dataset__max_side": None, "index__kind": "flat",
    "whitening__kind": "none",
}  # fmt: skip
RERANKED = {"enabled": True, "kind": "superglobal", "junk": "keep", **get_reranker("superglobal").complete({})}


def paper_about(backbone="resnet101", weights_format="CVNet", **pooling):
    """Return the `about` section of a result in the configuration of the paper."""
    stored = {k: str(v) if v == float("inf") else v for k, v in asdict(PoolingConfig(relup="on", **pooling)).items()}
    network = {"backbone": backbone, "pooling": stored, "scales": [0.7071, 1.0, 1.4142], "antialias": False}
    return {"network": network, "weights_format": weights_format}


def test_scores_of_the_paper_are_shown_for_their_configuration_and_marked(tmp_path, capsys):
    runs = [("rerank", RERANKED), ("no_rerank", RERANKED | {"enabled": False})]
    for number, (label, rerank) in enumerate(runs):
        more = {f"rerank__{key}": value for key, value in rerank.items()}
        about = paper_about()
        job(
            tmp_path / f"{number}_j",
            np.full((3, 12), 0.9),
            dataset="roxford5k",
            label=label,
            about=about,
            **PAPER,
            **more,
        )
    write_tables(tmp_path)
    rows = rows_of(tmp_path / "table-roxford5k.csv")
    assert [row["source"].split(",")[0] for row in rows] == ["measured"] * 2 + ["paper"] * 2
    assert sorted(row["hard"] for row in rows[2:]) == ["72.10", "80.20"]
    assert all("2308.06954" in row["source"] and not row["medium"] and not row["gain hard"] for row in rows[2:])
    for kind in ("md", "tex"):
        text = (tmp_path / f"table-roxford5k.{kind}").read_text()
        assert text.count("arXiv:2308.06954") >= 2
        (line,) = [line for line in text.splitlines() if "80.2" in line]
        assert ("*80.2*" if kind == "md" else r"\textit{80.2}") in line
        assert "paper" in line
    assert "not measured" in capsys.readouterr().out
    # The chart has an extra legend for the stars of the paper, so it is higher than without them.
    with_stars = (tmp_path / "chart.png").read_bytes()
    for path in tmp_path.glob("*/results.json"):
        path.write_text(path.read_text().replace('"CVNet"', '"other"'))
    write_tables(tmp_path)
    assert "paper" not in (tmp_path / "table-roxford5k.csv").read_text()
    assert Image.open(tmp_path / "chart.png").height < Image.open(io.BytesIO(with_stars)).height


@pytest.mark.parametrize(
    "change",
    [
        {"about": paper_about("resnet50")},
        {"about": paper_about(weights_format=None)},
        {"about": paper_about(regional=False)},
        {"about": paper_about(gem_plus_p=4.0)},
        {"dataset": "toy"},
        {"distractors": "revisitop1m"},
        {"dataset__crop_query": False},
        {"dataset__max_side": 1024},
        {"index__kind": "ivf_pq"},
        {"whitening__kind": "pca"},
        {"rerank__K": 8},
        {"rerank__junk": "drop"},
        {"rerank__kind": "aqe"},
    ],
)
def test_other_configurations_have_no_scores_of_the_paper(tmp_path, change):
    same = {f"rerank__{key}": value for key, value in RERANKED.items()} | PAPER
    settings = {"dataset": "roxford5k", "about": paper_about(), **same}
    job(tmp_path / "same", np.full((3, 12), 0.5), **settings)
    job(tmp_path / "other", np.full((3, 12), 0.5), **(settings | change))
    (same,), (changed,) = (read_results(tmp_path / name) for name in ("same", "other"))
    assert published_for(same) is not None
    assert dict(published_for(same).scores) == {"hard": 80.2}
    assert published_for(changed) is None
