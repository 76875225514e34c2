"""The search page without a browser: search results, callbacks and rendered HTML."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import os
import re
import shutil
import socket
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import numpy as np
import pytest
from evaluations import BASE, mini, run
from PIL import Image
from search_pages import compose_serve_config, open_search_database
from sets import png_of, texture, write_folders

from superglobal.data.images import ImageItem
from superglobal.errors import InputError
from superglobal.retrieval.rows import as_rows
from superglobal.search_page import html, image_search
from superglobal.search_page.image_search import Hit, QueryImage, SearchResult
from superglobal.search_page.page import PageCallbacks
from superglobal.search_page.serve import open_database, read_config, serve
from superglobal.search_page.server import Thumbnails, _RequestFilter, open_socket, upload_folder

ROOT = Path(__file__).parents[1]
PLAIN = [o for o in BASE if not o.startswith(("logger", "figures"))]


def stores(outputs: Path) -> list[Path]:
    """Return the folders of all stores."""
    return sorted(path for path in (outputs / "stores").iterdir() if path.is_dir())


@pytest.fixture(scope="module")
def evaluated(data, tmp_path_factory) -> SimpleNamespace:
    """Evaluate "mini" with rerank.M=6 and open the search of the page for the same stores."""
    outputs = tmp_path_factory.mktemp("outputs")
    result = run(outputs, *mini(data), "rerank.M=6")
    before = stores(outputs)
    database = open_search_database(outputs, *PLAIN, *mini(data))
    return SimpleNamespace(outputs=outputs, result=result, before=before, opened=database, data=data)


def test_the_page_searches_the_stores_of_eval(evaluated):
    assert stores(evaluated.outputs) == evaluated.before
    assert len(evaluated.opened.search) == 24
    assert len(evaluated.opened.queries) == 6
    assert list(evaluated.opened.search.names[:2]) == ["l0_000001.jpg", "l0_000002.jpg"]


def test_queries_give_the_rankings_of_eval(evaluated):
    rankings = np.load(evaluated.result["folder"] / "rankings.npz")
    search = evaluated.opened.search
    for number, item in enumerate(evaluated.opened.queries):
        query = search.extract(QueryImage("query", item.path), item.box)
        plain = search.find_similar(query, M=6, rerank=False, count=24)
        assert [hit.id for hit in plain.hits] == rankings["search_ids"][number].tolist()
        assert all(hit.rank == hit.rank_before for hit in plain.hits)
        assert np.allclose([hit.score for hit in plain.hits], rankings["search_scores"][number], atol=1e-5)
        reranked = search.find_similar(query, M=6, count=24)
        ids = rankings["rerank_ids"][number].tolist()
        assert [hit.id for hit in reranked.hits] == ids
        assert [plain.hits[hit.rank_before - 1].id for hit in reranked.hits] == ids
        assert [hit.score is None for hit in reranked.hits] == [False] * 6 + [True] * 18
        assert set(query.seconds | reranked.seconds) == {"decode", "extract", "search", "rerank"}


def test_a_database_image_does_not_find_itself(evaluated):
    search = evaluated.opened.search
    result = search.find_similar(search.extract(search.database_image(3)), M=400, count=400)
    assert sorted(hit.id for hit in result.hits) == [i for i in range(24) if i != 3]
    with pytest.raises(InputError, match="there is no photo 24"):
        search.database_image(24)


def test_the_stored_descriptor_of_an_unchanged_database_image_is_used(evaluated, tmp_path):
    search = evaluated.opened.search
    image = search.database_image(3)
    stored = search.extract(image)
    assert set(stored.seconds) == {"decode"}
    assert np.array_equal(stored.descriptor, search.database.take(np.array([3])))
    assert "extract" in search.extract(image, (0.0, 0.0, 60.0, 60.0)).seconds
    Image.new("RGB", (64, 64), "grey").save(tmp_path / "other.png")
    changed = search.extract(QueryImage("other", tmp_path / "other.png", 3))
    assert "extract" in changed.seconds
    assert (changed.descriptor @ stored.descriptor.T).item() < 0.99


def test_a_stored_descriptor_equals_the_extracted_one(evaluated):
    overrides = [*PLAIN, *mini(evaluated.data), "whitening=center", "store.dtype=float16"]
    search = open_search_database(evaluated.outputs, *overrides).search
    stored = search.extract(search.database_image(3))
    extracted = search.extract(replace(stored.image, id=None))
    assert np.allclose(stored.descriptor, extracted.descriptor, atol=2e-3)
    assert len(search.find_similar(stored, M=6).hits) == 23


@pytest.mark.parametrize("rerank", [False, True])
def test_more_results_continue_the_ranking(evaluated, monkeypatch, rerank):
    """The search of this test finds other images if it is longer, as that of an approximate index can."""
    search = evaluated.opened.search
    query = search.extract(search.database_image(3))
    best = search.find_similar(query, rerank=False, count=1).hits[0].id

    def approximate(q: np.ndarray, k: int, exclude: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        if k > 12:
            return image_search.search(q, search.database, k, exclude=exclude)
        scores, ids = image_search.search(q, search.database, k + 1, exclude=exclude)
        kept = ids[0] != best
        return scores[:, kept], ids[:, kept]

    monkeypatch.setattr(search, "first_stage", approximate)
    monkeypatch.setattr(image_search, "_MIN_SHORTLIST", 4)
    results = [search.find_similar(query, M=6, rerank=rerank, count=count).hits for count in (4, 6, 12, 20, 400)]
    for hits, longer in itertools.pairwise(results):
        assert longer[: len(hits)] == hits
    assert sorted(hit.id for hit in results[-1]) == [i for i in range(24) if i != 3]


def test_an_exact_search_is_done_once_and_approximate_ones_are_limited(evaluated, monkeypatch):
    search = evaluated.opened.search
    query = search.extract(search.database_image(3))
    lengths = []

    def recorded(q: np.ndarray, k: int, exclude: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        lengths.append(k)
        return image_search.search(q, search.database, k, exclude=exclude)

    monkeypatch.setattr(search, "_search", recorded)
    monkeypatch.setattr(image_search, "_MIN_SHORTLIST", 4)
    monkeypatch.setattr(image_search, "MAX_RESULTS", 15)
    assert len(search.find_similar(query, M=6, count=20).hits) == 20
    assert lengths == [20]
    monkeypatch.setattr(search, "first_stage", recorded)
    assert len(search.find_similar(query, M=6, count=20).hits) == 15
    assert lengths == [20, 6, 12, 15]


def test_a_query_without_similar_images_is_probably_absent(evaluated, tmp_path):
    search = evaluated.opened.search
    present = [search.find_similar(search.extract(search.database_image(number))) for number in range(24)]
    assert sum(result.is_absent for result in present) <= 0.1 * 25
    Image.new("RGB", (120, 96), "white").save(tmp_path / "white.png")
    absent = search.find_similar(search.extract(QueryImage("white", tmp_path / "white.png")))
    assert absent.is_absent
    boxed = search.find_similar(search.extract(QueryImage("white", tmp_path / "white.png"), (0.0, 0.0, 120.0, 96.0)))
    assert not boxed.is_absent
    assert "Probably no match" in html.render_results(absent, search.names, "photos/x", 24, 9)
    assert "Probably no match" not in html.render_results(present[0], search.names, "photos/x", 24, 9)


@pytest.mark.parametrize("count", [1, 2, 8])
def test_a_tiny_database_has_no_estimate_of_absence(evaluated, count):
    search = replace(evaluated.opened.search, database=as_rows(evaluated.opened.search.database.block(0, count)))
    assert not image_search.is_probably_absent(-1.0, search._nearest)


def test_a_box_has_the_descriptor_of_its_crop(evaluated, tmp_path):
    search = evaluated.opened.search
    whole, part = tmp_path / "whole.png", tmp_path / "part.png"
    image = Image.open(evaluated.opened.queries[0].path).convert("RGB")
    image.save(whole)
    image.crop((10, 5, 101, 90)).save(part)
    boxed = search.extract(QueryImage("whole", whole), (10.0, 5.0, 101.0, 90.0))
    assert np.allclose(boxed.descriptor, search.extract(QueryImage("part", part)).descriptor, atol=1e-6)
    assert boxed.size == image.size
    assert boxed.preview.shape[:2] == image.size[::-1]


def test_concurrent_searches_equal_sequential_searches(evaluated):
    search = evaluated.opened.search

    def search_database_image(number: int) -> list[tuple[int, int]]:
        result = search.find_similar(search.extract(search.database_image(number)), M=4 + number, K=2)
        return [(hit.id, hit.rank_before) for hit in result.hits]

    sequential = [search_database_image(number) for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(search_database_image, range(8))) == sequential


@pytest.mark.parametrize(
    "override",
    ["whitening=center", "index=hnsw", "rerank=mutual", "rerank=gnn rerank.k1=2", "distractors.name=noise"],
)
def test_settings_of_eval_also_apply_to_the_page(evaluated, override):
    result = run(evaluated.outputs, *mini(evaluated.data), "rerank.M=6", *override.split())
    database = open_search_database(evaluated.outputs, *PLAIN, *mini(evaluated.data), *override.split())
    rankings = np.load(result["folder"] / "rankings.npz")
    item = database.queries[2]
    search_result = database.search.find_similar(
        database.search.extract(QueryImage("query", item.path), item.box), M=6, **_search_parameters(override)
    )
    assert [hit.id for hit in search_result.hits] == rankings["rerank_ids"][2].tolist()
    assert all("/" not in name for name in database.search.names)


def _search_parameters(override: str) -> dict[str, Any]:
    return {"K": 5, "beta": 0.3} if override == "rerank=mutual" else {}


def test_errors_about_uploads_name_the_file_but_not_its_path(evaluated, tmp_path, monkeypatch):
    search = evaluated.opened.search
    monkeypatch.setattr(search, "max_pixels", 5_000_000)
    (tmp_path / "text.jpg").write_text("no photo")
    (tmp_path / "bomb.png").write_bytes(png_of(60_000, 60_000))
    Image.new("L", (2_600, 2_000)).save(tmp_path / "large.png")
    (tmp_path / "cut.jpg").write_bytes(evaluated.opened.queries[0].path.read_bytes()[:900])
    reasons = {
        "text": "not an image",
        "bomb": "expected at most 5 megapixels",
        "large": "expected at most 5 megapixels",
        "cut": "truncated",
    }
    for name, reason in {**reasons, "gone": "upload the image, or choose another one"}.items():
        path = next(iter(tmp_path.glob(f"{name}.*")), tmp_path / "gone.jpg")
        with pytest.raises(InputError, match=rf"^holiday\.jpg: .*{reason}") as error:
            search.extract(QueryImage("holiday.jpg", path))
        assert str(tmp_path) not in str(error.value)


def test_the_page_is_busy_while_it_decodes_other_uploads(evaluated, monkeypatch):
    search, path = evaluated.opened.search, evaluated.opened.queries[0].path
    monkeypatch.setattr(image_search, "_MAX_SECONDS", 0.05)
    started, finish = threading.Barrier(3), threading.Event()

    def slow(data: bytes, **_: Any) -> np.ndarray:
        started.wait(10)
        finish.wait(10)
        return np.zeros((64, 64, 3), np.uint8)

    monkeypatch.setattr(image_search, "decode_image", slow)
    with ThreadPoolExecutor(2) as pool:
        uploads = [pool.submit(search.extract, QueryImage("slow.jpg", path)) for _ in range(2)]
        started.wait(10)
        with pytest.raises(InputError, match="the server is busy"):
            search.extract(QueryImage("holiday.jpg", path))
        finish.set()
        assert [upload.result(10).size for upload in uploads] == [(64, 64)] * 2


def test_requests_of_other_sites_are_rejected_and_responses_have_security_headers():
    async def page(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    def request(local_names: frozenset[str] | None, **headers: str) -> tuple[int, dict[bytes, bytes]]:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "path": "/config", "headers": pairs}
        asyncio.run(_RequestFilter(page, local_names)(scope, None, send))
        return sent[0]["status"], dict(sent[0]["headers"])

    for local_names in (None, frozenset({"10.0.0.5"})):
        status, headers = request(local_names, host="10.0.0.5:7860", origin="http://10.0.0.5:7860")
        assert status == request(local_names, host="10.0.0.5:7860")[0] == 200
        assert headers[b"cross-origin-resource-policy"] == b"same-origin"
        assert b"default-src 'self'" in headers[b"content-security-policy"]
        for origin in ("http://evil.example", "http://10.0.0.5:1", "null"):
            assert request(local_names, host="10.0.0.5:7860", origin=origin)[0] == 403
        assert request(local_names, host="[")[0] == 400


def test_uploads_are_private_and_those_of_a_killed_server_are_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with upload_folder() as first, upload_folder() as second:
        (private,) = tmp_path.iterdir()
        assert first.is_dir()
        assert second.is_dir()
    assert list(private.iterdir()) == []
    (private / "killed").mkdir()
    (private / "killed" / "upload.jpg").write_bytes(b"")
    with upload_folder() as folder:
        assert folder.parent == private
        assert not (private / "killed").exists()


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs POSIX")
def test_a_folder_of_uploads_that_another_user_may_have_made_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    with pytest.raises(InputError, match="cannot be written"), upload_folder():
        pass
    (tmp_path / "temporary").mkdir()
    with upload_folder() as folder:
        private = folder.parent
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    private.chmod(0o711)
    with pytest.raises(InputError, match="expected a folder to which only you have access"), upload_folder():
        pass
    if os.getuid() == 0:
        private.chmod(0o700)
        os.chown(private, 1, -1)
        with pytest.raises(InputError, match="expected a folder to which only you have access"), upload_folder():
            pass
    private.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    private.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="expected a folder to which only you have access"), upload_folder():
        pass
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_missing_folder_for_uploads_is_reported_before_the_extraction(evaluated, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("tempfile._candidate_tempdir_list", lambda: [str(tmp_path / "missing")])
    config = compose_serve_config(f"paths.outputs={tmp_path}", "page.port=0", *PLAIN, *mini(evaluated.data))
    with pytest.raises(InputError, match="set TMPDIR to a folder that you can write to"):
        serve(config)
    assert not (tmp_path / "stores").exists()


def test_the_page_takes_its_settings_from_a_store(evaluated, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    store = next(path for path in evaluated.before if "-database-" in path.name)
    config, folder = read_config(compose_serve_config(f"store={store}"))
    assert (config.dataset.name, config.weights, config.scales) == ("mini", "random", [1.0])
    database = open_database(config, folder)
    assert database.search.database.fingerprint() == evaluated.opened.search.database.fingerprint()
    query = database.search.extract(database.search.database_image(0))
    same = evaluated.opened.search.extract(evaluated.opened.search.database_image(0))
    np.testing.assert_array_equal(query.descriptor, same.descriptor)
    assert not list(tmp_path.iterdir())


def test_a_store_of_a_folder_needs_no_query_and_its_weights_must_match(tmp_path):
    photos = write_folders(tmp_path / "photos", 3, 2)
    overrides = ["dataset=folder", f"dataset.database={photos}", *PLAIN, "pooling.p=2.5"]
    first = open_search_database(tmp_path, *overrides)
    assert first.name == "photos"
    assert not len(first.queries)
    (store,) = stores(tmp_path)
    assert len(open_search_database(tmp_path, f"store={store}").search) == 6
    seed = "weights=random do not match the store in weights"
    for override, message in (("seed=1", seed), ("weights=package", "backbone=resnet18")):
        with pytest.raises(InputError, match=message):
            open_search_database(tmp_path, f"store={store}", override)
    texture(9, 9).save(photos / "label0" / "new.jpg")
    with pytest.raises(InputError, match="have changed since the extraction; leave out store="):
        open_search_database(tmp_path, f"store={store}")


def test_information_missing_from_a_store_is_reported(evaluated, tmp_path):
    store = next(path for path in evaluated.before if "-database-" in path.name)
    queries = next(path for path in evaluated.before if "-queries-" in path.name)
    with pytest.raises(InputError, match="the store contains queries"):
        read_config(compose_serve_config(f"store={queries}"))
    with pytest.raises(InputError, match="no descriptor store"):
        read_config(compose_serve_config(f"store={tmp_path}"))
    old = shutil.copytree(store, tmp_path / "old")
    manifest = json.loads((old / "manifest.json").read_text())
    manifest["provenance"] = {"device": "cpu"}
    (old / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"does not record its images and weights; .*dataset=\.\.\. and weights="):
        read_config(compose_serve_config(f"store={old}"))
    assert len(open_search_database(tmp_path, f"store={old}", *mini(evaluated.data), "weights=random").search) == 24
    done = np.load(old / "done.npy")
    done[5] = 0
    np.save(old / "done.npy", done)
    with pytest.raises(InputError, match="1 of 24 descriptors are missing"):
        open_search_database(tmp_path, f"store={old}", *mini(evaluated.data), "weights=random")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"identity": {"model": "mine"}},
            "invalid or missing: backbone, pooling, scales, antialias, precision, max_side",
        ),
        ({"pooling": {"p": "3"}}, r"invalid or missing: pooling\.p"),
        ({"pooling": {"p": 3.0, "eps": "x"}}, r"manifest\.json is damaged \("),
        ({"provenance": {"dataset": "mini"}}, "invalid or missing: provenance"),
        ({"provenance": {"dataset": {"name": "mini"}, "weights": "random"}}, r"missing settings: dataset\.kind"),
    ],
)
def test_a_store_that_no_evaluation_wrote_is_reported(evaluated, tmp_path, changes, message):
    store = next(path for path in evaluated.before if "-database-" in path.name)
    folder = shutil.copytree(store, tmp_path / "store")
    manifest = json.loads((folder / "manifest.json").read_text())
    if changes.keys() & manifest.keys():
        manifest |= changes
    else:
        manifest["identity"] |= changes
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=message) as raised:
        read_config(compose_serve_config(f"store={folder}"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("rerank=aqe", "rerank=auto, superglobal or none"),
        ("page.port=70000", "page.port=70000"),
        ("page.max_upload=0", "page.max_upload=0"),
        ("page.host=''", "page.host"),
        ("extraction.shard=1/2", "extraction.shard"),
        ("trainer.devices=2", "single process"),
        ("dataset=descriptors", "descriptors"),
    ],
)
def test_settings_that_the_page_does_not_support_raise_errors(override, match):
    with pytest.raises(InputError, match=match):
        read_config(compose_serve_config("dataset=toy", "backbone=resnet18", "weights=random", override))


def test_a_missing_dataset_or_store_is_reported():
    with pytest.raises(InputError, match=r"missing settings: dataset\.kind"):
        read_config(compose_serve_config())


def test_a_port_in_use_is_reported():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with (
            pytest.raises(InputError, match=r"or page\.port=0 for any free port"),
            open_socket("127.0.0.1", listener.getsockname()[1]),
        ):
            pass


def test_movement_and_summary_show_rank_changes():
    hits = [Hit(7, 1, 1, 1.2), Hit(3, 2, 9, 1.1), Hit(5, 3, 2, 1.0), Hit(4, 4, 4, None)]
    assert [re.sub("<[^>]*>", "", html.movement(hit)) for hit in hits] == ["=", "9 → 2 ▲", "2 → 3 ▼", "="]
    summary = html.summary(SearchResult(hits, True, {}), 20)
    assert "changed the rank of 2 of them; 1 had a rank beyond 4; the largest gain is 9 → 2." in summary
    assert "by similarity" in html.summary(SearchResult(hits, False, {}), 20)
    assert "Reranking did not change their ranks" in html.summary(SearchResult(hits[:1], True, {}), 20)


def test_file_names_are_escaped_in_html():
    name = '"><script>alert(1)</script>.jpg'
    rendered = html.render_results(SearchResult([Hit(0, 1, 1, 0.5)], True, {}), [name], "photos/x", 1, 9)
    rendered += (
        html.render_error(name)
        + html.render_examples([("database/0", "photos/x", name)], "")
        + html.render_header(name, [name])
    )
    assert "<script" not in rendered
    assert '"">' not in rendered


@pytest.fixture
def callbacks(evaluated, tmp_path) -> PageCallbacks:
    """Return the callbacks of the page."""
    config, _ = read_config(compose_serve_config(*PLAIN, *mini(evaluated.data)))
    (tmp_path / "uploads").mkdir()
    return PageCallbacks(config, evaluated.opened, tmp_path / "uploads", "photos/x")


def event(**data: Any) -> gr.EventData:
    """Return a Gradio event with data."""
    return gr.EventData(None, data)


SETTINGS = (True, 10, 3, 0.15)


def test_only_uploaded_files_are_accepted_as_queries(callbacks, evaluated, tmp_path):
    good = callbacks.uploads / "a" / "photo.jpg"
    good.parent.mkdir()
    shutil.copy(evaluated.opened.queries[0].path, good)
    message, query, _, results, times = callbacks.photo(*SETTINGS, event(path=str(good), name="../mine.jpg"))
    assert message == ""
    assert query.image.name == "mine.jpg"
    assert 'data-rank="1"' in results
    assert "extract" in times
    (callbacks.uploads / "link.jpg").symlink_to(evaluated.opened.queries[0].path)
    outside = [
        evaluated.opened.queries[0].path,
        callbacks.uploads / ".." / "x",
        callbacks.uploads / "link.jpg",
        "",
        "/",
    ]
    for path in outside:
        message, *rest = callbacks.photo(*SETTINGS, event(path=str(path), name="x"))
        assert "the upload was not found" in message
        assert rest == [gr.skip()] * 4


@pytest.mark.parametrize("pick", ["database/24", "queries/6", "database/-1", "elsewhere/../etc", "", "queries/²"])
def test_an_invalid_pick_shows_a_message(callbacks, pick):
    message, *rest = callbacks.pick(*SETTINGS, event(pick=pick))
    assert 'role="alert"' in message
    assert rest == [gr.skip()] * 4


def test_more_results_are_one_page_longer(callbacks, monkeypatch):
    monkeypatch.setattr(callbacks.config.page, "results", 9)
    _, query, _, first, _ = callbacks.pick(*SETTINGS, event(pick="database/0"))
    assert 'data-shown="9">Show 9 more' in first
    message, *skipped, more, _ = callbacks.more(query, *SETTINGS, event(shown=9))
    assert (message, skipped) == ("", [gr.skip()] * 2)
    cards = [re.findall("<figure.*?</figure>", text, re.DOTALL) for text in (first, more)]
    assert [len(c) for c in cards] == [9, 18]
    assert cards[1][:9] == cards[0]
    assert 'data-shown="18">Show 5 more' in more
    assert "data-shown" not in callbacks.more(query, *SETTINGS, event(shown=10**30))[3]
    for invalid in ("9", None, 1.5):
        assert 'role="alert"' in callbacks.more(query, *SETTINGS, event(shown=invalid))[0]
    assert 'role="alert"' in callbacks.more(None, *SETTINGS, event(shown=9))[0]


def test_a_box_entered_in_pixels_is_not_changed_by_rounding(callbacks):
    query = callbacks.pick(*SETTINGS, event(pick="database/0"))[1]
    width, height = query.size
    for x in range(1, width - 1, 8):
        box = [x / width, x % height / height, x / width + 1 / width, x % height / height + 1 / height]
        boxes = callbacks.box(query, *SETTINGS, event(box=box))[1].box
        assert boxes == (x, x % height, x + 1, x % height + 1)


@pytest.mark.parametrize("box", [None, [0, 0, 1], ["a", 0, 1, 1], [float("nan"), 0, 1, 1], {"x": 1}])
def test_an_invalid_box_shows_a_message(callbacks, box):
    query = callbacks.pick(*SETTINGS, event(pick="queries/0"))[1]
    assert query.box is not None
    assert 'role="alert"' in callbacks.box(query, *SETTINGS, event(box=box))[0]
    assert 'role="alert"' in callbacks.box(None, *SETTINGS, event(box=[0, 0, 1, 1]))[0]
    assert callbacks.whole(query, *SETTINGS)[1].box is None


def test_examples_are_queries_or_images_with_matching_names(callbacks):
    assert set(re.findall(r'data-pick="(\w+)/\d+"', callbacks.examples("", 0))) == {"queries"}
    examples = callbacks.examples(" L3_ ", 0)
    assert len(re.findall("data-pick", examples)) == 5
    assert "database/12" in examples
    assert "No file name" in callbacks.examples("<nowhere>", 0)
    assert "<nowhere>" not in callbacks.examples("<nowhere>", 0)


def test_thumbnails_are_small_and_only_of_listed_images(evaluated, tmp_path):
    Image.effect_noise((3000, 1000), 50).convert("RGB").save(tmp_path / "large.jpg")
    items = [ImageItem(tmp_path / "large.jpg"), ImageItem(tmp_path / "gone.jpg")]
    thumbnails = Thumbnails({"database": items})
    sizes = [Image.open(io.BytesIO(thumbnails.jpeg("database", 0, size) or b"")).size for size in ("small", "large")]
    assert sizes == [(240, 80), (1280, 427)]
    invalid = [("database", 1, "small"), ("database", 2, "small"), ("database", -1, "small"), ("queries", 0, "small")]
    assert all(thumbnails.jpeg(*arguments) is None for arguments in [*invalid, ("database", 0, "huge")])
