"""Each named feature and each model input against arithmetic by hand."""

import numpy as np
import pytest

from app.features import HISTORY_READ, FeatureSchema, Inputs, ModelInput, item_inputs, named_features, request_inputs
from app.flow import Candidates, Person

TABLES = {
    "embedding": np.array([[1, 0], [0, 2], [3, 4], [0, 0]], np.float16),
    "year": np.array([1990, 2000, 2010, 2020], np.float32),
    "tags": np.array([[1, 2], [2, -1], [3, 4], [-1, -1]], np.int16),
    "kind": np.array([7, 7, 8, -1], np.int8),
    "stock": np.array([5, 6, 7, 8], np.int32),
}
NOBODY = np.empty(0, np.int64)


def given(rows, history=(), fields=None, candidate_fields=None) -> Inputs:
    rows = np.array(rows, np.int64)
    scores = np.array([0.5 + row for row in rows], np.float32)
    candidates = Candidates(rows, scores, np.zeros(len(rows), np.uint32), np.array([3, 5], np.float32))
    person = Person(np.array(history, np.int64), fields or {})
    return Inputs(TABLES, person, candidates, candidate_fields or {})


@pytest.mark.parametrize(
    ("name", "history", "expected"),  # of the candidates 0, 1, 2
    [
        ("retrieval_score", (), [0.5, 1.5, 2.5]),
        ("item.year", (), [1990, 2000, 2010]),
        ("item.tags.1", (), [2, -1, 4]),
        ("history_log_count", (), [0, 0, 0]),
        ("history_log_count", (1, 1, 2), [np.log(1 + 3)] * 3),
        # inner products with item 1: 0, 4, 8; with item 2: 3, 8, 25
        ("history_max.embedding", (1, 2), [3, 8, 25]),
        ("history_max.embedding", (1,), [0, 4, 8]),
        ("history_mean.embedding", (1, 2), [(0 + 3) / 2, (4 + 8) / 2, (8 + 25) / 2]),
        ("history_last.embedding", (1, 2), [3, 8, 25]),
        ("history_last.embedding", (2, 1), [0, 4, 8]),
        # of the candidate's tags {1, 2}, {2}, {3, 4}: shares in item 0 {1, 2} and item 1 {2}, averaged
        ("history_overlap.tags", (0, 1), [(2 / 2 + 1 / 2) / 2, (1 + 1) / 2, 0]),
        ("history_overlap.tags", (3,), [0, 0, 0]),
        ("history_overlap.kind", (0, 2), [1 / 2, 1 / 2, 1 / 2]),
        ("history_gap.year", (0, 3), [abs(1990 - 2005), abs(2000 - 2005), abs(2010 - 2005)]),
        ("history_max.embedding", (), [0, 0, 0]),
        ("history_mean.embedding", (), [0, 0, 0]),
        ("history_last.embedding", (), [0, 0, 0]),
        ("history_overlap.tags", (), [0, 0, 0]),
        ("history_gap.year", (), [0, 0, 0]),
    ],
)
def test_a_named_feature_is_what_its_definition_says(name, history, expected):
    np.testing.assert_allclose(named_features([name], given([0, 1, 2], history))[:, 0], expected, rtol=1e-6)


def test_request_fields_are_the_same_for_every_candidate():
    fields = {"user.age": np.array([[30.0]]), "context.hour": np.array([[7.0]]), "query.length": np.array([[2.0]])}
    matrix = named_features(["user.age", "context.hour", "query.length"], given([0, 1], fields=fields))
    assert matrix.tolist() == [[30, 7, 2], [30, 7, 2]]


def test_a_candidate_feature_is_the_callers_and_zero_when_not_sent():
    sent = {"candidate.bid": np.array([[1.5], [2.5]], np.float32)}
    assert named_features(["candidate.bid"], given([0, 1], candidate_fields=sent))[:, 0].tolist() == [1.5, 2.5]
    assert named_features(["candidate.bid"], given([0, 1]))[:, 0].tolist() == [0, 0]


def test_features_stand_in_the_order_of_their_names_in_float32():
    matrix = named_features(["item.year", "retrieval_score"], given([2, 0]))
    assert matrix.dtype == np.float32
    assert matrix.tolist() == [[2010, 2.5], [1990, 0.5]]


def test_no_candidates_give_no_rows():
    names = ["retrieval_score", "item.year", "history_max.embedding", "history_overlap.tags", "history_gap.year"]
    assert named_features(names, given([], history=[0])).shape == (0, len(names))


def test_an_unknown_feature_is_a_key_error():
    with pytest.raises(KeyError, match="history_min"):
        named_features(["history_min.embedding"], given([0]))


def test_history_features_look_at_the_last_items_only():
    old, recent = [2] * 5, [1] * HISTORY_READ
    assert named_features(["history_max.embedding"], given([0], [*old, *recent]))[0, 0] == 0
    assert named_features(["history_max.embedding"], given([0], [*recent, *old]))[0, 0] == 3


# -------------------------------------------------------------------------------------- model inputs


def history_input(table: str, length: int) -> ModelInput:
    return ModelInput(name="history", source="history", table=table, length=length, mask="mask")


def test_a_model_reads_the_history_newest_first_and_padded_with_a_mask():
    arrays = request_inputs([history_input("embedding", 3)], TABLES, Person(np.array([0, 1]), {}))
    assert arrays["history"].tolist() == [[[0, 2], [1, 0], [0, 0]]]
    assert arrays["history"].dtype == np.float32  # f16 on disk
    assert arrays["mask"].tolist() == [[1, 1, 0]]
    assert arrays["mask"].dtype == np.float32


def test_a_long_history_is_cut_to_the_newest():
    arrays = request_inputs([history_input("stock", 2)], TABLES, Person(np.array([0, 1, 2]), {}))
    assert arrays["history"].tolist() == [[7, 6]]
    assert arrays["history"].dtype == np.int64  # i32 on disk
    assert arrays["mask"].tolist() == [[1, 1]]


def test_an_empty_history_is_all_padding():
    arrays = request_inputs([history_input("row", 2)], TABLES, Person(NOBODY, {}))
    assert arrays["history"].tolist() == [[0, 0]]
    assert arrays["mask"].tolist() == [[0, 0]]


def test_the_pseudo_table_row_gives_row_numbers():
    arrays = request_inputs([history_input("row", 2)], TABLES, Person(np.array([3, 1]), {}))
    assert arrays["history"].tolist() == [[1, 3]]


def test_the_user_embedding_is_one_row_and_there_once_the_tower_has_made_it():
    inputs = [ModelInput(name="user", source="user_embedding")]
    assert request_inputs(inputs, TABLES, Person(NOBODY, {})) == {}
    arrays = request_inputs(inputs, TABLES, Person(NOBODY, {}), np.array([3, 5], np.float32))
    assert arrays["user"].tolist() == [[3, 5]]


def test_item_inputs_have_a_row_for_each_candidate():
    inputs = [
        ModelInput(name="year", source="item_table", table="year"),
        ModelInput(name="row", source="item_table", table="row"),
        ModelInput(name="tags", source="item_table", table="tags"),
        ModelInput(name="item", source="item_embedding"),
        ModelInput(name="score", source="retrieval_score"),
        ModelInput(name="bid", source="candidate", field="bid", default=9.0),
        ModelInput(name="slots", source="candidate", field="slots", dtype="int64", shape=(2,)),
    ]
    sent = {"candidate.slots": np.array([[1, 2], [3, 4]])}
    arrays = item_inputs(inputs, given([2, 0], candidate_fields=sent))
    assert arrays["year"].tolist() == [2010, 1990]
    assert arrays["row"].tolist() == [2, 0]
    assert arrays["tags"].tolist() == [[3, 4], [1, 2]]
    assert arrays["tags"].dtype == np.int64
    assert arrays["item"].tolist() == [[3, 4], [1, 0]]
    assert arrays["score"].tolist() == [2.5, 0.5]
    assert arrays["bid"].tolist() == [[9], [9]]
    assert arrays["slots"].tolist() == [[1, 2], [3, 4]]


# ------------------------------------------------------------------------------------------- schema


@pytest.mark.parametrize(
    ("binding", "why"),
    [
        ({"source": "history", "length": 3}, "`table` goes with"),
        ({"source": "history", "table": "year"}, "`length`"),
        ({"source": "item_table"}, "`table` goes with"),
        ({"source": "context"}, "`field` goes with"),
        ({"source": "user_embedding", "field": "age"}, "`field` goes with"),
        ({"source": "retrieval_score", "length": 1}, "`length`"),
        ({"source": "text"}, "source"),
        ({"source": "item_embedding", "tabel": "x"}, "tabel"),
        ({"source": "candidate", "field": "bid", "shape": [2, 0]}, "shape"),
        ({"source": "candidate", "field": "bid", "shape": [-1]}, "shape"),
        ({"source": "context", "field": "hour", "default": "NaN"}, "finite"),
        ({"source": "context", "field": "hour", "default": "-Infinity"}, "finite"),
        ({"source": "context", "field": "hour", "default": 1e39}, "`default` 1e\\+39 is no float32"),
        ({"source": "context", "field": "hour", "dtype": "int64", "default": 0.5}, "`default` 0.5 is no int64"),
        ({"source": "context", "field": "hour", "dtype": "int64", "default": 2e16}, "`default` 2e\\+16 is no int64"),
    ],
)
def test_a_binding_without_what_its_source_needs_is_refused(binding, why):
    with pytest.raises(ValueError, match=why):
        ModelInput.model_validate({"name": "x"} | binding)


def test_the_schema_lists_every_field_once_with_its_form():
    schema = FeatureSchema.model_validate(
        {
            "user_tower": [{"name": "a", "source": "user_table", "field": "age", "default": 5}],
            "re_ranker": [
                {"name": "b", "source": "user_table", "field": "age", "default": 5},
                {"name": "c", "source": "candidate", "field": "bid", "shape": [2]},
            ],
            "pre_ranker": ["context.hour", "user.age", "item.year"],
        }
    )
    assert set(schema.fields) == {"user.age", "candidate.bid", "context.hour"}
    assert schema.fields["user.age"].filled().tolist() == [[5]]
    assert schema.fields["candidate.bid"].filled(3).shape == (3, 2)
    assert schema.fields["context.hour"].filled().tolist() == [[0]]
