"""Batches of equally sized images: every image once, independent of interruptions and of stored rows."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from superglobal.data.image_checks import check_images
from superglobal.data.images import ImageItem, read_image, shrunk_size
from superglobal.data.samplers import plan_batches, select_missing

SIZES = [tuple(map(int, size)) for size in np.random.default_rng(0).choice([90, 100, 120], (200, 2))]


def test_every_image_is_in_one_batch_of_images_of_its_size():
    lists = [SIZES, SIZES[:30], []]
    plan = plan_batches(lists, max_pixels=5 * 100 * 100, max_images=4)
    pairs = sorted((batch.number, row) for batch in plan for row in batch.rows)
    assert pairs == [(number, row) for number, sizes in enumerate(lists) for row in range(len(sizes))]
    for number, rows, size in plan:
        assert all(lists[number][row] == size for row in rows)
        assert len(rows) <= 4
        assert len(rows) * size[0] * size[1] <= 5 * 100 * 100 or len(rows) == 1
    areas = [size[0] * size[1] for _, _, size in plan]
    assert areas == sorted(areas, reverse=True)
    assert sum(len(batch.rows) == 4 for batch in plan) > 30  # there are nine sizes, so nearly all batches are full


def test_an_image_larger_than_the_limit_has_a_batch_of_its_own():
    assert [batch.rows for batch in plan_batches([[(50, 50), (50, 50), (500, 500)]], 3000, 8)] == [(2,), (0,), (1,)]


@pytest.mark.parametrize("n", [2, 3, 16])
def test_shards_cover_every_image_once_for_any_batch_size(n):
    shards = [plan_batches([SIZES * 5], 10**5 * (1 + k % 3), 1 + k % 5, (k, n)) for k in range(n)]
    rows = [row for plan in shards for batch in plan for row in batch.rows]
    assert sorted(rows) == list(range(1000))
    counts = [sum(len(batch.rows) for batch in plan) for plan in shards]
    assert max(counts) <= 1.5 * min(counts)


def test_shards_with_different_numbers_of_devices_cover_every_image_once():
    plans = [plan_batches([SIZES * 5], 10**6, 8, (0, 2))]
    plans += [plan_batches([SIZES * 5], 10**6, 8, (1, 2), (rank, 3)) for rank in range(3)]
    assert sorted(row for plan in plans for batch in plan for row in batch.rows) == list(range(1000))


def test_select_missing_keeps_whole_batches_except_for_stored_rows():
    plan = plan_batches([SIZES], 10**6, 8)
    done = {row for batch in plan[:3] for row in batch.rows}
    assert select_missing(plan, [set(range(200)) - done]) == plan[3:]
    first, second = plan[3].rows[:2]
    missing = select_missing(plan, [{first, second}])
    assert missing == [plan[3]._replace(rows=(first, second))]


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("box", [None, (3.7, 2.2, 40.9, 500)])
@pytest.mark.parametrize("max_side", [None, 33])
def test_sizes_from_headers_equal_those_of_decoded_images(tmp_path, orientation, box, max_side):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (70, 51)).save(tmp_path / "a.jpg", exif=exif)
    report = check_images([ImageItem(tmp_path / "a.jpg", box)])
    assert shrunk_size(report.sizes[0], max_side) == read_image(tmp_path / "a.jpg", box, max_side).shape[:2]
