"""Activation maps: what the descriptors of a query and of its results look at when they are similar."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from superglobal.data.evaluation_set import file_names
from superglobal.data.images import image_tensor, read_image
from superglobal.evaluation.pipeline import search_device
from superglobal.evaluation.saved_run import FinishedRun
from superglobal.models.attribution import Contributions, contributions
from superglobal.models.extract import extract
from superglobal.models.network import RetrievalNetwork
from superglobal.reporting.figures import HeatPanel, draw_heat_maps
from superglobal.reporting.ranking_figures import relevance

_SHOWN_SIDE = 480  # pixels of a photo in the picture


def draw_activations(run: FinishedRun, target: Path, queries: Sequence[int] | np.ndarray, ranks: int) -> list[Path]:
    """Write a PNG per query: what it looks at by itself, and with each of its first results what both look at.

    Only the photos shown go through the network. Shares are exact (models/contributions.py), of all scales together;
    a query is shown as it is described, cropped to its box.

    Args:
        run: of images and a network.
        target: folder of the pictures.
        queries: their numbers.
        ranks: results of the last stage that are shown of each.
    """
    assert run.dataset is not None
    network = run.network().to(search_device(run.config))
    names = file_names(run.dataset.queries, run.dataset.root)
    paths = []
    for query in map(int, queries):
        ids = list(run.stages.values())[-1][1][query][:ranks]
        path = target / f"activation-{query:04d}-{re.sub(r'[^A-Za-z0-9_.-]+', '_', Path(names[query]).stem)[:60]}.png"
        how = "" if run.config.whitening.kind == "none" else f", before whitening={run.config.whitening.kind}"
        scales = f"{len(network.scales)} scales together" if len(network.scales) > 1 else "one scale"
        title = f"query {query}: {names[query]}. What makes the similarity of two descriptors{how}, {scales}"
        draw_heat_maps(path, title, _columns(run, network, query, [int(image) for image in ids if image >= 0]))
        paths.append(path)
    return paths


def _columns(
    run: FinishedRun, network: RetrievalNetwork, query: int, ids: Sequence[int]
) -> list[list[HeatPanel | None]]:
    """Photos, the query's shares, the results' shares, from top to bottom; the query by itself comes first."""
    assert run.dataset is not None
    max_side = run.config.dataset.max_side
    items = [run.dataset.queries[query], *(run.images[image] for image in ids)]
    described = [read_image(item.path, item.box, max_side) for item in items]
    vectors = extract(network, described)
    shown = [read_image(item.path, item.box, min(_SHOWN_SIDE, max_side or _SHOWN_SIDE)) for item in items]

    def panel(which: int, other: int, what: str, kind: str) -> HeatPanel:
        found = contributions(network, image_tensor(described[which]), vectors[other])
        return HeatPanel(shown[which], found.heatmap(*shown[which].shape[:2]), f"{what}\n{_sum(found)}", kind)

    own = panel(0, 0, "query with itself", "query")
    columns: list[list[HeatPanel | None]] = [[HeatPanel(shown[0], None, "query", "query"), own, None]]
    for place, image in enumerate(ids, 1):
        kind = relevance(run.dataset, query, image)
        named = "" if kind == "unlabeled" else f", {kind}"
        caption = f"rank {place}{named}\nsimilarity {float(vectors[0] @ vectors[place]):.3f}"
        photo = HeatPanel(shown[place], None, caption, kind)
        pair = panel(0, place, f"query, with rank {place}", "query"), panel(place, 0, f"rank {place}, with query", kind)
        columns.append([photo, *pair])
    return columns


def _sum(found: Contributions) -> str:
    """Where a similarity comes from, in one line."""
    places = np.concatenate([one.ravel() for one in found.maps])
    parts = [f"{places[places > 0].sum():+.3f}", f"{places[places < 0].sum():+.3f}"]
    text = f"places {' '.join(part for part in parts if abs(float(part)) >= 5e-4)}"
    return text + (f", bias {found.bias:+.3f}" if abs(found.bias) >= 5e-4 else "")
