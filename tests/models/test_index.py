"""The index: its kind by size, the smallest parameter that reaches the target, never less in silence."""

import subprocess
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest
from numpy.typing import NDArray

from models import index

WIDTH = 50


def clusters(n: int, seed: int) -> NDArray[np.float32]:
    """f32[n, 16] around 40 centres."""
    centres = np.random.default_rng(0).standard_normal((40, 16))
    rng = np.random.default_rng(seed)
    return (centres[rng.integers(0, 40, n)] + 0.5 * rng.standard_normal((n, 16))).astype(np.float32)


ITEMS, USERS = clusters(6_000, 1), clusters(100, 2)


def silent(_: str) -> None:
    """Says nothing."""


@pytest.mark.parametrize(
    ("n", "width", "kind"),
    [
        (20_000, 500, "flat"),
        (20_001, 500, "hnsw"),
        (20_001, 501, "ivf_sq8"),
        (1_000_001, 500, "ivf_sq8"),
        (20_000_000, 500, "ivf_sq8"),
        (20_000_001, 500, "ivf_sq4"),
    ],
)
def test_the_catalogues_size_and_the_width_suggest_the_kind(n: int, width: int, kind: str) -> None:
    assert index.kind_for(n, width) == kind


def test_a_small_catalogue_is_searched_exactly() -> None:
    built = index.build(ITEMS, USERS, WIDTH, 0.95, say=silent)
    assert (built.kind, built.search, built.recall.reached) == ("flat", {}, 1.0)


@pytest.mark.parametrize("kind", ["hnsw", "ivf_sq8", "ivf_sq4", "ivf_pq"])
def test_the_parameter_is_the_smallest_that_reaches_the_target(kind: index.Kind) -> None:
    built = index.build(ITEMS, USERS, WIDTH, 0.9, kind=kind, say=silent)
    exact = np.argsort(-USERS @ ITEMS.T, axis=1)[:, :WIDTH]
    fetched = int(WIDTH * built.overfetch)
    (parameter,) = built.search.values()
    found = index.search(built.index, kind, USERS, fetched, parameter)
    assert built.kind == kind
    assert built.recall.reached == pytest.approx(index.recall_of(found, exact), abs=1e-9)
    assert built.recall.reached >= 0.9
    if parameter > (WIDTH if kind == "hnsw" else 1):
        fewer = index.search(built.index, kind, USERS, fetched, parameter - 1)
        assert index.recall_of(fewer, exact) < 0.9


def test_a_fair_sample_of_the_rows_is_used_where_many_are_fetched() -> None:
    kinds: tuple[index.Kind, ...] = ("ivf_sq8", "ivf_sq4", "ivf_pq", "flat")
    made = {kind: index._filled(kind, ITEMS) for kind in kinds}
    by_kind = {kind: index.sampled_by(one, kind, USERS, 1_000, 256) for kind, one in made.items()}
    assert by_kind == {"ivf_sq8": index.SAMPLED, "ivf_sq4": index.SAMPLED, "ivf_pq": 0, "flat": 0}
    assert index.sampled_by(made["ivf_sq8"], "ivf_sq8", USERS, index.LEAST_SAMPLED - 1, 256) == 0


@pytest.mark.parametrize("share", [0.0, 2.0], ids=["nothing near", "too much"])
def test_a_sample_that_is_none_is_not_used(share: float) -> None:
    """Of the near there are none in the first sixteenth of the rows, or twice as many as fair."""
    near = np.argsort(-ITEMS @ USERS[0])[:600]
    n_first, rng = len(ITEMS) // index.SAMPLED, np.random.default_rng(0)
    first = near[: int(share * 600 / index.SAMPLED)]
    others = np.setdiff1d(np.arange(len(ITEMS)), near)
    first = np.append(first, rng.permutation(others)[: n_first - len(first)])
    order = np.append(first, rng.permutation(np.setdiff1d(np.arange(len(ITEMS)), first)))
    alike = np.repeat(USERS[:1], 60, axis=0) + 1e-3 * USERS[:60]  # one kind of people, whom the order is for
    used = {}
    for name, items in (("fair", ITEMS), ("none", ITEMS[order])):
        lists = index._filled("ivf_sq8", items)
        used[name] = index.sampled_by(lists, "ivf_sq8", alike, 600, lists.nlist)
    assert used == {"fair": index.SAMPLED, "none": 0}


def test_a_sample_of_lists_that_hold_too_few_is_not_used() -> None:
    lists = index._filled("ivf_sq8", ITEMS)
    assert index.sampled_by(lists, "ivf_sq8", USERS, 1_000, 1) == 0


def test_each_list_has_its_rows_in_order_or_a_sample_could_not_be_cut_out() -> None:
    built = index._filled("ivf_sq8", ITEMS)  # owns its lists
    lists = faiss.extract_index_ivf(built).invlists
    held = [faiss.rev_swig_ptr(lists.get_ids(at), lists.list_size(at)) for at in range(lists.nlist)]
    assert sum(map(len, held)) == len(ITEMS)
    assert all(np.all(np.diff(rows) > 0) for rows in held)


def test_a_kind_that_misses_the_target_gives_way_and_says_so() -> None:
    said: list[str] = []
    built = index.build(ITEMS, USERS, WIDTH, 1.0, kind="ivf_pq", say=said.append)
    assert built.recall.reached == 1.0
    assert built.kind != "ivf_pq"
    assert any("ivf_pq reaches recall@50" in line for line in said)


@pytest.mark.parametrize("kind", ["hnsw", "ivf_sq8", "ivf_sq4", "ivf_pq"])
def test_the_same_items_make_the_same_index(kind: index.Kind) -> None:
    first, second = (index.build(ITEMS, USERS, WIDTH, 0.9, kind=kind, say=silent) for _ in range(2))
    assert np.array_equal(faiss.serialize_index(first.index), faiss.serialize_index(second.index))
    assert first.search == second.search


@pytest.mark.parametrize("kind", ["ivf_sq8", "ivf_sq4", "ivf_pq"])
def test_lists_are_the_same_whatever_the_number_of_cores(kind: index.Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for cores in (1, 2):
        monkeypatch.setattr(index.os, "cpu_count", lambda cores=cores: cores)
        made.append(faiss.serialize_index(index._filled(kind, ITEMS)))
        assert faiss.omp_get_max_threads() == 1
    assert np.array_equal(*made)


@pytest.mark.parametrize("kind", ["ivf_sq8", "ivf_sq4", "ivf_pq"])
def test_where_lists_are_many_a_graph_finds_them_as_well(kind: index.Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = index._filled(kind, ITEMS)
    monkeypatch.setattr(index, "GRAPH_MOST", 16)
    built = index._filled(kind, ITEMS)
    flat = faiss.downcast_index(faiss.extract_index_ivf(built).quantizer)
    assert isinstance(flat, faiss.IndexFlat)  # searches don't use the graph
    assert built.ntotal == len(ITEMS)
    sizes = [faiss.extract_index_ivf(one).invlists for one in (exact, built)]
    moved = sum(abs(sizes[0].list_size(i) - sizes[1].list_size(i)) for i in range(sizes[0].nlist))
    assert moved < 0.05 * len(ITEMS)
    found = [index.search(one, kind, USERS, 200, 8) for one in (exact, built)]
    assert index.recall_of(found[1], found[0]) > 0.95


def test_the_number_of_lists_grows_with_the_root_up_to_a_most() -> None:
    assert [index.n_lists(n) for n in (10**6, 10**7, 10**8, 10**9)] == [4_096, 16_384, 16_384, 16_384]


def test_exact_search_in_blocks_is_exact_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "BLOCK", 700)
    found = index.search_exactly(ITEMS.astype(np.float16), USERS, WIDTH)
    products = USERS @ ITEMS.astype(np.float16).astype(np.float32).T
    assert index.recall_of(found, np.argsort(-products, axis=1)[:, :WIDTH]) == 1.0


def test_without_enough_different_users_items_with_noise_stand_in_and_it_is_said() -> None:
    said: list[str] = []
    queries = index.enough_queries(ITEMS, np.repeat(USERS[:2], 100, axis=0), said.append)
    assert len(queries) == 2 * 100 + 4 * index.ENOUGH_QUERIES
    assert "only 2 different" in said[0]


def test_people_alike_count_as_often_as_they_come() -> None:
    users = np.concatenate([USERS, np.repeat(USERS[:1], 300, axis=0)])
    assert np.array_equal(index.enough_queries(ITEMS, users, silent), users)


def test_recall_is_the_share_of_the_exact_rows_that_were_found() -> None:
    exact, found = np.array([[1, 2, 3, 4], [5, 6, 7, 8]]), np.array([[4, 3, 9, -1], [8, 7, 6, 5]])
    assert index.recall_of(found, exact) == (2 / 4 + 4 / 4) / 2


@pytest.mark.parametrize("wanted", [1, 2, 3, 17, 64, 99, 100])
def test_the_smallest_is_found_between_the_bounds(wanted: int) -> None:
    assert index.smallest(1, 100, lambda p: p >= wanted) == wanted


def test_the_upper_bound_is_what_is_left_when_nothing_reaches() -> None:
    assert index.smallest(3, 100, lambda _: False) == 100


def test_a_width_beyond_the_catalogue_is_the_catalogue() -> None:
    built = index.build(ITEMS[:30], USERS, WIDTH, 0.95, say=silent)
    assert built.recall.at == 30


COPIED = """
import sys
import faiss
def own():
    return next(int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith("Pss_Anon"))
before = own()
index = faiss.read_index(sys.argv[1], faiss.IO_FLAG_MMAP_IFC | faiss.IO_FLAG_ONDISK_SAME_DIR)
print(1024 * (own() - before))
"""


@pytest.mark.parametrize(("kind", "is_mapped"), [("ivf_sq8", True), ("ivf_sq4", True), ("ivf_pq", False)])
def test_codes_of_a_scalar_quantiser_are_mapped_and_not_copied(
    kind: index.Kind, is_mapped: bool, tmp_path: Path
) -> None:
    """What above 20 million items counts: of a product quantiser each process would have its own four gigabytes."""
    file = tmp_path / "index"
    rows = np.random.default_rng(3).standard_normal((100_000, 32)).astype(np.float32)
    faiss.write_index(index._filled(kind, rows), str(file))
    copied = int(subprocess.check_output([sys.executable, "-c", COPIED, str(file)]))
    assert (copied < 0.5 * file.stat().st_size) == is_mapped
