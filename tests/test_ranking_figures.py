"""Numbers behind the figures, compared to brute force, and their colors in the figures."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageColor
from sets import texture

from superglobal.data.evaluation_set import EvaluationSet
from superglobal.data.images import ImageItem
from superglobal.errors import InputError
from superglobal.metrics.gldv2 import average_precision_at, first_hits
from superglobal.metrics.revisited import average_precision
from superglobal.reporting import figures as plots
from superglobal.reporting.figures import (
    BINS,
    EDGES,
    bin_of,
    grid_cells,
    precision_curves,
    precision_over_recall,
    principal_plane,
    project,
    rectangular_steps,
    sample_images,
    similarity_counts,
    trapezoidal_steps,
)
from superglobal.reporting.ranking_figures import COLORS, Comparison, Ranking, draw_comparisons, find_rank, result_strip
from superglobal.reporting.results import Names, cosine_texts, image_sizes_text, print_answers


def unit(rng, *shape):
    """Return random unit vectors of this shape."""
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def colors_of(image):
    """Return the set of colors of an image."""
    packed = np.unique(image[..., :3].astype(np.int64) @ [1 << 16, 1 << 8, 1])
    return {(int(p) >> 16, int(p) >> 8 & 255, int(p) & 255) for p in packed}


def brute_curve(ranks, n, bins):
    """Compute the mean precision in bins of recall, from the definition of the trapezoids at many points."""
    points = (np.arange(bins * 2000) + 0.5) / (bins * 2000)
    values = np.zeros(len(points))
    for i, recall in enumerate(points):
        j = int(recall * n)
        if j < len(ranks):
            before = j / ranks[j] if ranks[j] else 1.0
            values[i] = before + (recall * n - j) * ((j + 1) / (ranks[j] + 1) - before)
    return values.reshape(bins, -1).mean(axis=1)


@pytest.mark.parametrize("seed", range(4))
def test_the_curve_equals_brute_force_and_its_area_is_the_ap(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 30))
    ranks = np.sort(rng.choice(200, rng.integers(0, n + 1), replace=False))
    curve = precision_over_recall(trapezoidal_steps(rng.permutation(ranks), n), 10)
    np.testing.assert_allclose(curve, brute_curve(ranks, n, 10), atol=2e-3)
    assert curve.mean() == pytest.approx(average_precision(ranks, n), abs=1e-12)


def test_the_curve_of_a_perfect_ranking_is_one_everywhere():
    assert np.allclose(precision_over_recall(trapezoidal_steps([0, 1, 2], 3)), 1)
    assert np.allclose(precision_over_recall(trapezoidal_steps([], 3)), 0)


@pytest.mark.parametrize(("n", "depth"), [(3, 100), (40, 25), (7, 5)])
def test_the_area_under_rectangular_steps_is_ap_at_the_depth(n, depth):
    rng = np.random.default_rng(n)
    predicted, relevant = rng.permutation(60), rng.permutation(60)[:n]
    steps = rectangular_steps(predicted, relevant, depth)
    assert len(steps) == min(n, depth)
    assert (steps[:, 0] == steps[:, 1]).all()
    truth = average_precision_at(first_hits(predicted, relevant, depth), n, depth)
    assert precision_over_recall(steps).mean() == pytest.approx(truth, abs=1e-12)


def test_a_query_without_a_positive_has_no_curve():
    rows = precision_curves([trapezoidal_steps([0], 1), trapezoidal_steps([], 0)], 10)
    assert np.allclose(rows[0], 1)
    assert np.isnan(rows[1]).all()


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_similarity_counts_equal_brute_force_also_at_edges(leave_one_out):
    rng = np.random.default_rng(0)
    X = unit(rng, 500, 8)
    Q = X[:30].copy() if leave_one_out else unit(rng, 30, 8)
    # Some scores are exactly on an edge of a bin: products of axes are 0, 1 and -1.
    X[100:108], X[108:116] = np.eye(8), -np.eye(8)
    Q[3:11] = np.eye(8)
    if leave_one_out:
        X[:30] = Q
    exclude = np.arange(30) if leave_one_out else None
    sets = [{"positive": p[:6], "junk": p[6:9]} for p in (rng.permutation(np.arange(30, 500)) for _ in Q)]
    counts = similarity_counts(Q, X, sets, exclude=exclude, block_rows=64)
    scores = (Q[:, None].astype(np.float64) * X[None]).sum(axis=2)
    kind = np.full(scores.shape, "negative", dtype="U8")
    for query, labels in enumerate(sets):
        for name, ids in labels.items():
            kind[query, ids] = name
        if leave_one_out:
            kind[query, query] = "excluded"
    for name in ("positive", "junk", "negative"):
        brute = np.bincount(bin_of(scores[kind == name]), minlength=BINS)
        np.testing.assert_array_equal(counts[name], brute, err_msg=name)
    assert sum(bins.sum() for bins in counts.values()) == scores.size - 30 * leave_one_out


def test_bins_match_their_edges():
    assert list(bin_of(np.array([-1.0, 0.0, 0.005, 1.0, 1.0000001]))) == [0, BINS // 2, BINS // 2, BINS - 1, BINS - 1]
    assert EDGES[BINS // 2] == 0


def test_the_principal_plane_has_the_largest_variance():
    rng = np.random.default_rng(1)
    X = rng.normal(size=(200, 6)) * [1, 9, 1, 1, 4, 1]
    points, projected, shares = principal_plane(X, X[:3])
    values = np.linalg.eigvalsh(np.cov(X.T, bias=True))[::-1]
    np.testing.assert_allclose(points.var(axis=0), values[:2])
    np.testing.assert_allclose(shares, values[:2] / values.sum())
    np.testing.assert_allclose(projected, points[:3])
    assert abs(np.corrcoef(points[:, 0], X[:, 1])[0, 1]) > 0.99


def test_tsne_keeps_clusters_together_and_is_reproducible():
    rng = np.random.default_rng(2)
    X = np.concatenate([rng.normal(size=(20, 6)), rng.normal(size=(20, 6)) + 30]).astype(np.float32)
    points, marked, _ = project(X, X[:2], "tsne", 0)
    near, far = (
        np.linalg.norm(points[:20] - points[:20].mean(0), axis=1).max(),
        points[20:].mean(0) - points[:20].mean(0),
    )
    assert near < np.linalg.norm(far)
    assert np.array_equal(project(X, X[:2], "tsne", 0)[0], points)
    assert marked.shape == (2, 2)


def test_a_map_of_four_images_is_an_error():
    with pytest.raises(InputError, match="at least 5"):
        project(np.eye(4), np.eye(4), "pca", 0)


def test_samples_are_seeded_limited_and_half_from_labeled_landmarks():
    groups = ["a"] * 100 + [None] * 1000
    sample = sample_images(groups, 60, np.array([0, 500]), 0)
    assert len(sample) == 60 == len(set(sample))
    assert (sample < 100).sum() == 30
    assert not {0, 500} & set(sample.tolist())
    assert np.array_equal(sample, sample_images(groups, 60, np.array([0, 500]), 0))
    assert not np.array_equal(sample, sample_images(groups, 60, np.array([0, 500]), 1))
    assert len(sample_images(groups, 5000, np.array([], int), 0)) == 1100
    assert (sample_images(["a"] * 10 + [None] * 2, 8, np.array([], int), 0) < 10).sum() == 6


def test_each_grid_cell_has_the_thumbnail_nearest_to_its_center():
    points = np.array([[0, 0], [1.2, 1.2], [1.0, 1.0], [4, 4], [0.2, 4]], float)
    assert grid_cells(points, 2, 2) == {(0, 0): 2, (1, 1): 3, (0, 1): 4}


@pytest.fixture
def small_set(tmp_path):
    """Return a small evaluation set and its images."""
    paths = []
    for i in range(14):
        paths.append(tmp_path / f"{i}.jpg")
        texture(i, 0).save(paths[-1])
    items = [ImageItem(path) for path in paths]
    gnd = [{"easy": np.array([1]), "hard": np.array([2]), "junk": np.array([3])}]
    query = [ImageItem(paths[0], (10.0, 10.0, 90.0, 70.0))]
    dataset = EvaluationSet("d", query, items, gnd, ["0"], "revisited", False, tmp_path, "")
    return dataset, items


def test_two_rankings_are_drawn_side_by_side_with_borders_and_rank_changes(small_set, tmp_path):
    dataset, items = small_set
    before, after = np.array([4, 1, 2, 3, 5, 6]), np.array([1, 2, 4, 3, 5, 7])
    rankings = [Ranking("a", np.linspace(0.9, 0.4, 6), before), Ranking("b", np.linspace(0.9, 0.4, 6), after)]
    path = tmp_path / "sheet.png"
    draw_comparisons(path, dataset, items, [Comparison(0, "title", rankings, [before, after])])
    sheet = np.asarray(Image.open(path))
    cell, line = 164, 178
    assert sheet.shape[:2] == (28 + 44 + 2 * line + 6, cell + 2 * (5 * cell + 18) + 6)
    top, left = 28 + 44 + 2, cell + 6 + 18 + 2
    kinds = {1: "easy", 2: "hard", 3: "junk"}
    for side, ids in enumerate((before, after)):
        for rank, image in enumerate(ids):
            x = left + side * (5 * cell + 18) + rank % 5 * cell
            color = ImageColor.getrgb(COLORS[kinds.get(int(image), "negative")])
            assert tuple(sheet[top + rank // 5 * line, x]) == color, (side, rank)
    assert (0xFF, 0xE6, 0x00) in colors_of(sheet[top : top + 158, :cell])  # the query's box
    # Below image 1, which moved up from rank 2, and image 4, which moved down.
    under = sheet[top + 160 : top + 174]
    after_left = left + 5 * cell + 18
    assert ImageColor.getrgb(COLORS["query"]) in colors_of(under[:, after_left : after_left + cell - 8])
    assert ImageColor.getrgb(COLORS["negative"]) in colors_of(
        under[:, after_left + 2 * cell : after_left + 3 * cell - 8]
    )
    assert ImageColor.getrgb(COLORS["query"]) not in colors_of(under[:, left : left + 5 * cell - 8])


def test_find_rank_returns_the_position_of_an_image():
    assert find_rank(np.array([5, 3, 9]), 9) == 2
    assert find_rank(np.array([5, 3, 9]), 4) is None


def test_heat_maps_are_bright_only_at_positive_contributions():
    photo = np.full((40, 60, 3), 90, np.uint8)
    shares = np.zeros((40, 60))
    shares[5:15, 40:50] = 0.01
    shares[30:, :10] = -0.02
    heat = plots.heat_overlay(photo, shares).astype(int).sum(axis=2)
    assert heat[10, 45] > 2 * heat[20, 20]
    assert heat[35, 5] == heat[20, 20]


def test_figures_are_written_with_the_expected_colors(tmp_path):
    curve = np.linspace(1, 0.2, 100)
    lines = {"search": {"easy": curve, "hard": np.full(100, np.nan)}, "rerank": {"easy": curve, "hard": curve * np.nan}}
    plots.draw_curves(tmp_path / "curves.png", "t", lines, {"easy": 3, "hard": 0}, "mAP")
    counts = {"easy": np.bincount([150], minlength=BINS), "negative": np.bincount([90, 91], minlength=BINS)}
    scores = {"easy": np.array([0.9]), "negative": np.array([0.1, 0.2])}
    plots.draw_similarities(tmp_path / "similarities.png", "t", counts, scores)
    points = np.random.default_rng(0).normal(size=(20, 2))
    known = ["a", None] * 10
    photos = {n: np.full((10, 14, 3), (255, 0, 255), np.uint8) for n in grid_cells(points, 4, 3).values()}
    plots.draw_map(tmp_path / "map.png", "t", ["x", "y"], (points, known), (points[:2], ["a", "b"]), photos, (4, 3))
    panel = plots.HeatPanel(np.zeros((20, 30, 3), np.uint8), np.ones((20, 30)), "c", "hard")
    plots.draw_heat_maps(tmp_path / "activation.png", "t", [[panel, None], [panel, panel]])
    expected = {
        "curves": ["#0072b2", "#d55e00"],
        "similarities": [COLORS["easy"], COLORS["negative"]],
        "map": ["#0072b2", "#bdbdbd", "#ff00ff"],
        "activation": [COLORS["hard"]],
    }
    for name, expected_colors in expected.items():
        image = np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB"))
        assert min(image.shape[:2]) > 300
        assert image.std() > 10
        for color in expected_colors:
            assert ImageColor.getrgb(color) in colors_of(image), (name, color)


def test_results_show_the_cosine_of_the_search_after_reranking():
    scores, ids = np.array([[0.9, 0.8, 0.7]]), np.array([[4, 2, 9]])
    stages = {"search": (scores, ids), "rerank": (np.array([[1.026, 0.9, -np.inf]]), np.array([[2, 5, 4]]))}
    assert cosine_texts(stages, "rerank", 0, 3) == ["0.800", "", "0.900"]
    assert cosine_texts(stages, "search", 0, 2) == ["0.900", "0.800"]


def test_places_without_a_result_are_left_out(tmp_path, capsys):
    stages = {"search": (np.array([[0.9, -np.inf]]), np.array([[0, -1]]))}
    assert cosine_texts(stages, "search", 0, 2) == ["0.900", ""]
    print_answers(Names(["query.jpg"], ["first.jpg", "last.jpg"], None), stages)
    assert "first.jpg" in (out := capsys.readouterr().out)
    assert "last.jpg" not in out
    texture(0, 0).save(tmp_path / "a.png")
    items = [ImageItem(tmp_path / "a.png")]
    dataset = EvaluationSet("d", items, items, None, None, "none", False, tmp_path, "")
    strip = np.asarray(result_strip(dataset, items, 0, ["0.900", ""], np.array([0, -1])))
    assert (strip[:, strip.shape[1] // 2 :] == 255).all()


def test_tiles_of_results_show_file_names(tmp_path):
    strips = []
    for name in ("a.png", "b.png", f"{'x' * 200}.png"):
        texture(0, 0).save(tmp_path / name)
        items = [ImageItem(tmp_path / name)]
        dataset = EvaluationSet("x", items, items, None, None, "none", False, tmp_path, "")
        strips.append(np.asarray(result_strip(dataset, items, 0, ["0.500"], np.array([0]))))
    rows = [sorted(set(np.nonzero(strip != strips[0])[0])) for strip in strips]
    assert not rows[0]
    assert 0 < len(rows[1]) <= 14
    assert rows[2]
    assert (strips[2][-14:, -6:] == 255).all()


def test_an_enlargement_is_reported_only_if_the_network_enlarges_images():
    assert image_sizes_text({"max_side": 1024, "min_side": 1}) == "images: shrunk to a longer side of 1024 px"
    assert image_sizes_text({"max_side": None, "min_side": 65}).endswith("a shorter side of 65 px if smaller")
