"""The code for accelerators, run on the CPU, gives the same ids, ranks and messages as the code for the CPU."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from vectors import brute_force, sorted_ranks, store_of, treat_as_accelerator, unit, with_duplicates, without

from superglobal.errors import InputError
from superglobal.reporting.figures import similarity_counts
from superglobal.reranking.registry import rerank, rerank_candidates
from superglobal.retrieval import rows as vectors
from superglobal.retrieval import scan
from superglobal.retrieval.ranks import count_better, exact_ranks, search_and_rank, target_scores
from superglobal.retrieval.rows import as_rows, concat
from superglobal.retrieval.scores import TOLERANCE, block_pair_scores, pair_scores, pair_scores_on
from superglobal.retrieval.search import search
from superglobal.retrieval.store import DescriptorStore

N, D = 160, 16
KINDS = [
    "float16 map", "float32", "float64", "half store", "store", "half tensor", "tensor", "double tensor", "custom",
    "half stores", "stores", "mixed", "tensors", "tensor and store",
]  # fmt: skip


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat the CPU as an accelerator without FAISS, in everything but pinned memory and streams."""
    treat_as_accelerator(monkeypatch)


class Custom:
    """Source with only the required methods, which records the threads that read it."""

    def __init__(self, x: np.ndarray, bad_row: int | None = None) -> None:
        self._x, self._bad_row = x, bad_row
        self.shape = x.shape
        self.threads: set[int] = set()

    def block(self, start: int, stop: int) -> np.ndarray:
        self.threads.add(threading.get_ident())
        if self._bad_row is not None and start <= self._bad_row < stop:
            raise InputError(f"row {self._bad_row} cannot be read")
        return self._x[start:stop]

    def take(self, ids: np.ndarray) -> np.ndarray:
        return self._x[ids]


class Concurrent(Custom):
    """Source that several threads may read."""

    concurrent = True


def create_source(kind: str, X: np.ndarray, folder) -> tuple[object, np.ndarray, np.ndarray]:
    """Return a source of rows close to X, their float32 values, and the rows that it skips."""
    half = X.astype(np.float16)
    if kind == "float16 map":
        np.save(folder / "x.npy", half)
        source = np.load(folder / "x.npy", mmap_mode="r")
    elif kind == "custom":
        source = Custom(X)
    elif kind == "float64":
        source = X.astype(np.float64)
    elif kind == "half store":
        source = store_of(folder / "s", X, "float16", skipped=[3, 77])
    elif kind == "store":
        source = store_of(folder / "s", X, skipped=[5, 70])
    elif kind == "half stores":
        source = concat(store_of(folder / "s", X[:90], "float16", skipped=[2]), half[90:])
    elif kind == "stores":
        source = concat(store_of(folder / "s", X[:90], skipped=[2]), X[90:140], Custom(X[140:]))
    elif kind == "mixed":
        source = concat(half[:50], store_of(folder / "s", X[50:120]), half[120:])
    elif kind == "tensors":
        source = concat(torch.from_numpy(half[:50]), torch.from_numpy(X[50:]))
    elif kind == "tensor and store":
        source = concat(torch.from_numpy(half[:50]), store_of(folder / "s", X[50:], "float16", skipped=[1]))
    else:
        source = {
            "float32": X,
            "half tensor": torch.from_numpy(half),
            "tensor": torch.from_numpy(X),
            "double tensor": torch.from_numpy(X.astype(np.float64)),
        }[kind]
    rows = as_rows(source)
    return source, rows.block(0, len(rows)).copy(), rows.skipped


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block_rows", [37, 1000])
def test_ids_and_ranks_equal_brute_force(tmp_path, accelerator, kind: str, block_rows: int) -> None:
    rng = np.random.default_rng(KINDS.index(kind))
    X = with_duplicates(rng, N, D, 70)
    X[100:120] = X[0]
    X[np.arange(100, 120), rng.integers(D, size=20)] *= np.float32(1 + 2e-7)
    source, X, skipped = create_source(kind, X, tmp_path)
    Q = np.concatenate([unit(rng, 3, D), X[:1] / np.linalg.norm(X[:1])])
    kept = np.setdiff1d(np.arange(N), skipped)
    exclude = rng.choice(kept, 4)
    for excluded in (None, exclude):
        options = {"block_rows": block_rows, "exclude": excluded}
        lists = [without(X, skipped, Q[q : q + 1], N, None if excluded is None else excluded[q : q + 1])[0]
                 for q in range(4)]  # fmt: skip
        targets = [rng.permutation(rows)[:count] for rows, count in zip(lists, (0, 5, 60, 150), strict=True)]
        (scores, ids), ranks = search_and_rank(Q, source, 40, targets, **options)
        np.testing.assert_array_equal(ids, [order[:40] for order in lists])
        for target_ranks, target_ids, order in zip(ranks, targets, lists, strict=True):
            np.testing.assert_array_equal(target_ranks, [np.flatnonzero(order == i)[0] for i in target_ids])
        alone = search(Q, source, 40, **options, dtype=np.float64)
        np.testing.assert_array_equal(alone[1], ids)
        np.testing.assert_array_equal(alone[0].astype(np.float32), scores)
        for actual, expected in zip(exact_ranks(Q, source, targets, **options), ranks, strict=True):
            np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_all_results_equal_those_of_the_cpu(tmp_path, monkeypatch, kind: str) -> None:
    rng = np.random.default_rng(KINDS.index(kind))
    source, X, skipped = create_source(kind, unit(rng, N, D), tmp_path)
    Q = unit(rng, 6, D)
    kept = np.setdiff1d(np.arange(N), skipped)
    targets = [rng.choice(kept, 20, replace=False) for _ in range(6)]
    candidates = torch.from_numpy(X[kept[:60]].reshape(6, 10, D))

    def results() -> Iterator[np.ndarray]:
        scores, ids = search(Q, source, 100, dtype=np.float64, block_rows=64)
        yield from (scores, ids)
        yield from exact_ranks(Q, source, targets, block_rows=64)
        yield from target_scores(Q, source, targets)
        yield from count_better(Q, source, target_scores(Q, source, targets), targets, block_rows=64)
        for method in ("superglobal", "mutual", "kreciprocal", "diffusion"):
            yield from rerank(Q, source, ids, 50, method=method, batch_size=4)
        yield from rerank_candidates(Q, candidates, batch_size=4)
        sets = [{"easy": ids[:3]} for ids in targets]
        yield from similarity_counts(Q, source, sets, block_rows=64).values()

    expected = list(results())
    treat_as_accelerator(monkeypatch)
    # Tensors were treated as arrays of the CPU above, so the source has to be created again.
    if "tensor" in kind:
        source = create_source(kind, X, tmp_path / "again")[0] if "store" not in kind else source
    for actual, expected_values in zip(results(), expected, strict=True):
        np.testing.assert_array_equal(actual, expected_values)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "store" not in kind and kind != "mixed"])
@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, "has NaN"), (np.inf, "has NaN or infinite"), (3, "has norm"), (1.002, "has norm")]
)
def test_an_invalid_row_is_named(tmp_path, accelerator, kind: str, value: float, message: str) -> None:
    rng = np.random.default_rng(0)
    X, Q = unit(rng, N, D), unit(rng, 3, D)
    X[131] *= value
    source = create_source(kind, X, tmp_path)[0]
    for run in (lambda: search(Q, source, 5, block_rows=50), lambda: exact_ranks(Q, source, [[0]] * 3)):
        with pytest.raises(InputError, match=f": row 131 {message}"):
            run()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_damage_to_a_store_is_detected(tmp_path, accelerator, dtype: str, value: float) -> None:
    rng = np.random.default_rng(0)
    X, Q = unit(rng, N, D), unit(rng, 3, D)
    store_of(tmp_path / "s", X, dtype)
    shard = np.load(tmp_path / "s" / "shard-00002.npy", mmap_mode="r+")
    shard[5, 2] = value
    shard.flush()
    store = DescriptorStore.open(tmp_path / "s")
    for source in (store, concat(X[:10], store), concat(torch.from_numpy(X[:10]), store)):
        for run in (lambda x: search(Q, x, 5, block_rows=50), lambda x: exact_ranks(Q, x, [[0]] * 3)):
            with pytest.raises(InputError, match=r"shard-00002\.npy: row 85 is damaged"):
                run(source)


def readers() -> list[str]:
    """Return the names of running reader threads."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("descriptor-reader")]


def test_an_error_in_the_reader_thread_is_raised_and_ends_the_thread(accelerator) -> None:
    rng = np.random.default_rng(1)
    X, Q = unit(rng, N, D), unit(rng, 3, D)
    with pytest.raises(InputError, match="row 120 cannot be read"):
        search(Q, Concurrent(X, bad_row=120), 5, block_rows=20)
    assert not readers()


def test_the_reader_thread_ends_if_a_consumer_raises(accelerator) -> None:
    rng = np.random.default_rng(2)
    X, Q = unit(rng, N, D), unit(rng, 3, D)

    class Failing:
        blocks = 0

        def add(self, block: scan.Block) -> None:
            assert readers()
            self.blocks += 1
            if self.blocks == 3:
                raise ValueError("enough")

    with pytest.raises(ValueError, match="enough") as caught:
        scan.scan(Q, as_rows(X), lambda tolerance: [Failing()], None, None, 20)
    assert caught.value.__traceback__ is not None  # the traceback still references the frames
    assert not readers()


def test_only_concurrent_sources_are_read_by_another_thread(accelerator) -> None:
    rng = np.random.default_rng(3)
    X, Q = unit(rng, N, D), unit(rng, 3, D)
    custom, concurrent = Custom(X), Concurrent(X)
    for source in (custom, concurrent):
        np.testing.assert_array_equal(search(Q, source, 20, block_rows=20)[1], brute_force(Q, X, 20))
    assert custom.threads == {threading.get_ident()}
    assert threading.get_ident() not in concurrent.threads


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_results_do_not_depend_on_the_gradient_mode(accelerator, mode) -> None:
    rng = np.random.default_rng(9)
    X, Q = unit(rng, N, D), unit(rng, 3, D)
    expected = brute_force(Q, X, 20)
    with mode():
        for source in (
            X,
            X.astype(np.float32),
            torch.from_numpy(X).requires_grad_(),
            concat(torch.from_numpy(X), X[:0]),
        ):
            np.testing.assert_array_equal(search(Q, source, 20, block_rows=20)[1], expected)
            assert rerank(Q, source, expected, 10)[1].shape == (3, 20)


def test_blocks_are_copied_in_their_stored_dtype(accelerator, monkeypatch, tmp_path) -> None:
    X = unit(np.random.default_rng(4), N, D)
    store = store_of(tmp_path / "s", X, "float16")
    rows, mixed = as_rows(store), concat(store, X)
    assert rows.stored_dtype == np.float16
    assert mixed.stored_dtype == np.float32
    assert rows.host_buffer(3, torch.device("cpu")).dtype == torch.float16
    block_lengths = []
    for start, block in scan.device_blocks(rows, 70, 2, torch.device("cpu")):
        np.testing.assert_array_equal(block.numpy(), store.block(start, min(start + 70, N)))
        block_lengths.append(len(block))
    assert block_lengths == [70, 70, 20]
    monkeypatch.setattr(scan, "STAGED_BYTES", 1100 * D * 2)
    large = as_rows(np.repeat(X.astype(np.float16), 10, axis=0))
    lengths = [len(block) for _, block in scan.device_blocks(large, 65536, 2, torch.device("cpu"))]
    assert lengths == [1100, 500]
    assert list(scan.device_blocks(as_rows(X[:0]), 70, 2, torch.device("cpu"))) == []


def test_tensors_on_the_device_are_not_copied(accelerator) -> None:
    X = torch.from_numpy(unit(np.random.default_rng(5), N, D))
    rows = as_rows(X)
    assert rows.is_on(X.device)
    blocks = [block for _, block in scan.device_blocks(rows, 100, 2, X.device)]
    assert [block.data_ptr() for block in blocks] == [X[start:].data_ptr() for start in (0, 100)]
    assert not concat(X, X.numpy()).is_on(X.device)
    ids = np.array([[5, 3], [159, 0]])
    np.testing.assert_array_equal(rows.take_on(ids, X.device).numpy(), X.numpy()[ids])


def test_thousands_of_near_ties_are_ranked_exactly(accelerator) -> None:
    """Many rows are equal, entire blocks tie with targets, and scores increase with the row."""
    rng = np.random.default_rng(6)
    X = unit(rng, 6000, 32)
    X[rng.permutation(6000)[:4000]] = X[0]
    Q = np.concatenate([X[:1], unit(rng, 2, 32)])
    X = X[np.argsort(X @ Q[1], kind="stable")]
    targets = [rng.choice(6000, 300, replace=False) for _ in range(3)]
    order = sorted_ranks(Q, X)
    for source in (X, torch.from_numpy(X)):
        (_, ids), rank_lists = search_and_rank(Q, source, 100, targets, block_rows=500)
        np.testing.assert_array_equal(ids, brute_force(Q, X, 100))
        for query, query_ranks in enumerate(rank_lists):
            np.testing.assert_array_equal(query_ranks, order[query, targets[query]])


class Sequential(torch.Tensor):
    """Float32 tensor whose matrix products sum sequentially, as those of accelerators may."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.addmm_):
            *total, a, b = (arg.as_subclass(torch.Tensor) for arg in args)
            terms = a[:, None, :] * b.T[None]
            sums = torch.zeros(terms.shape[:2])
            for number in range(terms.shape[-1]):
                sums += terms[..., number]
            return (total[0].add_(sums) if total else sums).as_subclass(cls)
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("dim", [64, 256, 512, 2048])
def test_sequentially_summed_products_are_within_the_tolerance(accelerator, dim) -> None:
    """The descriptors have no negative values, so rounding errors do not cancel, and include copies with score 1."""
    rng = np.random.default_rng(7)
    X = np.maximum(rng.standard_normal((300, dim), np.float32), 0) + np.float32(0.01)
    X /= np.linalg.norm(X, axis=1, keepdims=True)
    Q, rows = (torch.from_numpy(x).as_subclass(Sequential) for x in (X[:100], X))
    scores = scan.inner_products(Q, rows).as_subclass(torch.Tensor).numpy()
    assert np.abs(scores - X[:100].astype(np.float64) @ X.T.astype(np.float64)).max() < TOLERANCE


def test_pair_scores_do_not_depend_on_the_number_of_threads(monkeypatch, tmp_path) -> None:
    rng = np.random.default_rng(8)
    X, Q = unit(rng, N, 512), unit(rng, 5, 512)
    store = DescriptorStore.open_or_create(tmp_path / "s", {}, [str(i) for i in range(N)], 512, 40, dtype="float16")
    store.write_rows(np.arange(N), X)
    store.flush()
    query_of, row_of = rng.integers(5, size=9000), rng.integers(N, size=9000)
    rows = as_rows(store)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    expected = pair_scores(Q, rows, query_of, row_of)
    plain = (Q[query_of].astype(np.float64) * store.block(0, N)[row_of].astype(np.float64)).sum(axis=1)
    np.testing.assert_allclose(expected, plain, atol=1e-15, rtol=0)
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        np.testing.assert_array_equal(pair_scores(Q, rows, query_of, row_of), expected)
        np.testing.assert_array_equal(block_pair_scores(Q, store.block(0, N), query_of, row_of), expected)
        monkeypatch.setattr(vectors, "is_host", lambda device: False)
        taken = rows.take_on(row_of.reshape(3, -1), torch.device("cpu"))
        np.testing.assert_array_equal(taken.numpy(), store.block(0, N)[row_of.reshape(3, -1)])
        monkeypatch.undo()


@pytest.mark.parametrize("dim", [1, 63, 64, 65, 200, 2048])
def test_pair_scores_are_bit_identical_in_all_implementations(dim):
    rng = np.random.default_rng(dim)
    Q, X = rng.standard_normal((5, dim), np.float32), rng.standard_normal((40, dim), np.float32).astype(np.float16)
    query_of, row_of = rng.integers(5, size=300), rng.integers(40, size=300)
    expected = []
    for query, row in zip(query_of, row_of, strict=True):
        products = Q[query].astype(np.float64) * X[row].astype(np.float64)
        lanes = np.zeros(64)
        for start in range(0, dim, 64):
            part = products[start : start + 64]
            lanes[: len(part)] += part
        while len(lanes) > 1:
            lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
        expected.append(lanes[0])
        assert lanes[0] == pytest.approx(math.fsum(products), abs=1e-12)
    assert pair_scores(Q, X, query_of, row_of).tolist() == expected
    vectors = torch.from_numpy(X)
    assert pair_scores_on(torch.from_numpy(Q), vectors, query_of, row_of).tolist() == expected
