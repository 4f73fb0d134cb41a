"""Filters and exclusions against brute force, over index kinds and on both sides of the exact search."""

from dataclasses import replace

import faiss
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.bundle import Ids
from app.flow import Filter, Query
from app.stages import retrieval
from app.stages.retrieval import Retrieval, matches, near
from app.warmup import offline_query
from tests import world

N = 400
RNG = np.random.default_rng(7)
EMBEDDING = RNG.normal(size=(N, world.D)).astype(np.float32)
TABLES = {
    "embedding": EMBEDDING,
    "year": RNG.integers(0, 8, N).astype(np.float32),
    "price": (RNG.integers(0, 10, N) / 10).astype(np.float16),
    "stock": RNG.integers(-2, 3, N).astype(np.int32),
    "genres": np.stack([RNG.integers(0, 6, N), RNG.integers(-1, 6, N)], axis=1).astype(np.int16),
    "rare": np.where(np.arange(N) % 97 == 0, 1, 0).astype(np.int8),
}
TABLES["year"][::50] = np.nan
COLUMNS = {name: table.tolist() for name, table in TABLES.items() if name != "embedding"}


def index_of(kind: str) -> faiss.Index:
    if kind == "flat":
        index = faiss.IndexFlatIP(world.D)
    elif kind == "hnsw":
        index = faiss.IndexHNSWFlat(world.D, 16, faiss.METRIC_INNER_PRODUCT)
    else:
        quantizer = faiss.IndexFlatIP(world.D)
        index = faiss.IndexIVFScalarQuantizer(
            quantizer, world.D, 4, getattr(faiss.ScalarQuantizer, f"QT_{kind[-1]}bit"), faiss.METRIC_INNER_PRODUCT
        )
        index.train(EMBEDDING)
    index.add(EMBEDDING)
    return index


SEARCH = {"flat": {}, "hnsw": {"efSearch": 32}, "ivf_sq8": {"nprobe": 2}, "ivf_sq4": {"nprobe": 2}}


@pytest.fixture(scope="module", params=[20_000, 0], ids=["exact", "index"])
def exact_rows(request):
    """Up to so many matching rows are searched exactly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "EXACT_ROWS", request.param)
        yield request.param


SAMPLED = "ivf_sq8, sampled"  # the same rows are found


@pytest.fixture(scope="module", params=[*SEARCH, SAMPLED])
def over(request, generation):
    """Retrieval over the random catalogue with an index of this kind."""
    kind, _, is_sampled = request.param.partition(", ")
    fetches = {"overfetch": 2.0 if kind.startswith("ivf") else 1.0, "sampled": 4 if is_sampled else 0}
    retriever = generation.manifest.retrievers[0].model_copy(
        update={"kind": kind, "n": N, "search": SEARCH[kind], **fetches}
    )
    patched = replace(
        generation,
        ids=Ids(np.arange(N), np.arange(N)),
        tables=TABLES,
        index=index_of(kind),
        popular=np.arange(N)[::-1].copy(),
        manifest=generation.manifest.model_copy(update={"retrievers": (retriever,)}),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "LEAST_SAMPLED", 1)
        yield Retrieval(patched)


def test_a_sample_is_looked_at_where_there_is_no_filter(over, generation, monkeypatch):
    monkeypatch.setattr(retrieval, "EXACT_ROWS", 0)
    looked = []
    monkeypatch.setattr(retrieval, "near", lambda *given: looked.append(given[-1]) or near(*given))
    over.search(asked(generation, [], [], []), 20)
    assert looked == [4] * bool(over.retriever.sampled)
    over.search(asked(generation, [Filter("price", None, -1.0, None)], [], []), 20)
    assert looked == [4] * bool(over.retriever.sampled)


def test_a_narrower_search_looks_in_fewer_lists_unless_it_is_filtered(generation, monkeypatch):
    monkeypatch.setattr(retrieval, "EXACT_ROWS", 0)
    most = [Filter("price", None, -1.0, None)]
    retriever = generation.manifest.retrievers[0].model_copy(
        update={"kind": "ivf_sq8", "n": N, "search": {"nprobe": 3}, "overfetch": 1.0}
    )
    widths = generation.manifest.funnel.model_copy(update={"retrieve": 30, "rerank": 4})
    manifest = generation.manifest.model_copy(update={"retrievers": (retriever,), "funnel": widths})
    over = Retrieval(
        replace(
            generation, ids=Ids(np.arange(N), np.arange(N)), tables=TABLES, index=index_of("ivf_sq8"), manifest=manifest
        )
    )
    looked_in = []
    for conditions, width in [([], 60), ([], 30), ([], 16), ([], 10), ([], 1), (most, 10), ([], 30)]:
        faiss.cvar.indexIVF_stats.reset()
        over.search(asked(generation, conditions, [], []), width)
        looked_in.append(faiss.cvar.indexIVF_stats.nlist)
    assert looked_in == [3, 3, 2, 1, 1, 3, 3]


def satisfies(row: int, condition: Filter) -> bool:
    held = COLUMNS[condition.table][row]
    values = [v for v in held if v != -1] if isinstance(held, list) else [held]
    wanted = None if condition.values is None else [stored(condition, w) for w in condition.values.tolist()]
    low = -np.inf if condition.low is None else stored(condition, condition.low)
    high = np.inf if condition.high is None else stored(condition, condition.high)
    is_free = condition.low is None and condition.high is None
    return any((wanted is None or v in wanted) and (is_free or low <= v <= high) for v in values)


def stored(condition: Filter, number: float) -> float:
    """What the table would hold where this number was stored: prices are float16."""
    if condition.table != "price" or np.isnan(number):
        return float(number)
    return float(np.float16(number)) if abs(number) < 65504 else float(np.copysign(np.inf, number))


NUMBERS = st.integers(-3, 9) | st.sampled_from([0.1, 0.5, 0.7, 2.5, 1e308, -1e308])  # prices are tenths


@st.composite
def filters(draw: st.DrawFn) -> Filter:
    table = draw(st.sampled_from(sorted(COLUMNS)))
    values = draw(st.none() | st.lists(NUMBERS, min_size=1, max_size=4))
    if values is not None:
        values = np.array([*values, np.nan] if draw(st.booleans()) else values, np.float64)  # NaN: no such name
    low, high = draw(st.none() | NUMBERS), draw(st.none() | NUMBERS)
    return Filter(table, values, low, high)


def asked(generation, conditions, exclude, history) -> Query:
    query = offline_query({}, generation)
    person = replace(query.person, history=np.array(history, np.int64))
    exclude = np.unique(np.array(exclude, np.int64))
    return replace(query, person=person, filters=tuple(conditions), exclude=exclude)


ROWS = st.lists(st.integers(0, N - 1), max_size=30)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    conditions=st.lists(filters(), min_size=0, max_size=3),
    exclude=ROWS,
    history=ROWS,
    width=st.sampled_from([1, 20, 150, N]),
)
def test_what_is_found_satisfies_every_filter_and_nothing_that_does_is_left_out(
    over, exact_rows, conditions, exclude, history, width
):
    query = asked(over.generation, conditions, exclude, history)
    found = over.search(query, width)
    banned = set(exclude) | set(history)
    eligible = [r for r in range(N) if r not in banned and all(satisfies(r, c) for c in conditions)]
    rows = found.rows.tolist()
    assert set(rows) <= set(eligible)
    assert len(rows) == len(set(rows))
    scores = EMBEDDING.astype(float) @ found.user_embedding
    np.testing.assert_allclose(found.retrieval_scores, scores[rows], atol=1e-5)
    kind = over.retriever.kind
    if conditions or kind == "flat":
        assert len(rows) == min(width, len(eligible))
    if kind == "flat" or (conditions and len(eligible) <= max(exact_rows, width)):  # searched exactly
        best = sorted(eligible, key=lambda r: -scores[r])[:width]
        np.testing.assert_allclose(scores[rows], scores[best], atol=1e-5)


def test_where_few_rows_match_all_of_them_are_found(over, exact_rows):
    few = [row for row in range(N) if row % 97 == 0]
    query = asked(over.generation, [Filter("rare", np.array([1.0]))], [], [])
    assert sorted(over.search(query, width=40).rows.tolist()) == few


def test_excluded_rows_are_not_found_though_they_are_the_nearest(over):
    query = asked(over.generation, [], [], [])
    nearest = over.search(query, width=20).rows.tolist()
    again = over.search(asked(over.generation, [], nearest[:10], []), width=20).rows.tolist()
    assert not set(again) & set(nearest[:10])
    assert len(again) == 20


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(conditions=st.lists(filters(), max_size=3), exclude=ROWS, candidates=st.lists(ROWS, max_size=1))
def test_filters_and_exclusions_hold_for_popular_items_and_for_the_callers_own(over, conditions, exclude, candidates):
    query = asked(over.generation, conditions, exclude, [])
    if candidates:
        query = replace(query, candidates=np.unique(np.array(candidates[0], np.int64)))
    pool = range(N)[::-1] if not candidates else sorted(set(candidates[0]))
    expected = [r for r in pool if r not in exclude and all(satisfies(r, c) for c in conditions)]
    scope = type("Scope", (), {"retrieve_width": N})()
    assert over.substitute(scope, query, None).rows.tolist() == expected
    if candidates:
        assert over.search(query, N).rows.tolist() == expected


# -------------------------------------------------------------------------------------- one condition


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        (Filter("t", np.array([2.0])), [True, True, False]),
        (Filter("t", low=4), [False, False, True]),
        (Filter("t", low=2, high=3), [True, True, False]),
        (Filter("t", high=0), [False, False, False]),  # -1 pads a row and is no value
        (Filter("t", np.array([-1.0])), [False, False, False]),
        (Filter("t", low=1.5, high=1.9), [False, False, False]),  # no single value is between
        (Filter("t", np.array([np.nan])), [False, False, False]),
        (Filter("t"), [True, True, True]),
    ],
)
def test_of_several_values_any_may_satisfy_the_condition(condition, expected):
    values = np.array([[1, 2], [2, -1], [4, -1]], np.int16)
    assert matches(condition, values).tolist() == expected


def test_vectors_of_numbers_are_no_conditions(generation):
    vectors = {"static": np.zeros((world.N, 3), np.float32), "price": np.zeros(world.N, np.float16)}
    assert replace(generation, tables=generation.tables | vectors).filterable == ("genres", "year", "price")


def test_numbers_are_compared_in_the_tables_own_type():
    tenth = np.array([0.1], np.float32)
    assert matches(Filter("t", np.array([0.1])), tenth).tolist() == [True]
    assert matches(Filter("t", low=0.1, high=0.1), tenth).tolist() == [True]
    assert matches(Filter("t", np.array([2.5])), np.array([2], np.int16)).tolist() == [False]


def test_a_missing_number_satisfies_nothing_but_no_condition():
    missing = np.array([np.nan], np.float32)
    assert matches(Filter("t", low=-1e30), missing).tolist() == [False]
    assert matches(Filter("t", np.array([np.nan])), missing).tolist() == [False]
