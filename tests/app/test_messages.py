"""What crosses between service and workers: comes back as it was, and another format is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from app.flow import Candidates, Person
from app.workers.messages import (
    FORMAT,
    HEADER,
    Kind,
    Slice,
    frame,
    generation_number,
    read_arrays,
    read_header,
    read_shard,
    read_slice,
    write_arrays,
    write_shard,
    write_slice,
)
from app.workers.scoring import Shard

READS = 3  # items of the history
PERSON = {"user.age": ((1,), "f4"), "context.where": ((2,), "f4"), "query.code": ((1,), "i8")}
CANDIDATE = {"candidate.bid": ((1,), "f4"), "candidate.tags": ((3,), "i8")}


def arrays(shape: tuple[int, ...], dtype: str) -> st.SearchStrategy:
    return hnp.arrays(dtype, shape)


@st.composite
def shards(draw: st.DrawFn) -> Shard:
    n, d = draw(st.integers(0, 6)), draw(st.integers(1, 4))
    fields = {key: draw(arrays((1, *shape), dtype)) for key, (shape, dtype) in PERSON.items()}
    sent = draw(st.sets(st.sampled_from(sorted(CANDIDATE))))
    candidate_fields = {key: draw(arrays((n, *CANDIDATE[key][0]), CANDIDATE[key][1])) for key in sent}
    history = draw(hnp.arrays("i8", st.integers(0, 2 * READS), elements=st.integers(0, 99)))
    candidates = Candidates(
        draw(arrays((n,), "i8")), draw(arrays((n,), "f4")), np.zeros(n, np.uint32), draw(arrays((d,), "f4"))
    )
    return Shard(Person(history, fields), candidates, candidate_fields, until=0.0)


def equal(a, b) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


@given(shards())
def test_a_shard_comes_back_as_it_was(shard):
    read = read_shard(write_shard(shard, 0.0, READS), now=0.0)
    assert equal(read.candidates.rows, shard.candidates.rows)
    assert equal(read.candidates.retrieval_scores, shard.candidates.retrieval_scores)
    assert equal(read.candidates.user_embedding, shard.candidates.user_embedding)
    assert set(read.candidate_fields) == set(shard.candidate_fields)
    for key, value in shard.candidate_fields.items():
        assert equal(read.candidate_fields[key], value)
    for key, value in shard.person.fields.items():
        assert equal(read.person.fields[key], value)


@given(shards())
def test_only_the_last_items_of_the_history_that_the_model_reads_go_along(shard):
    read = read_shard(write_shard(shard, 0.0, READS), now=0.0)
    assert read.person.history.tolist() == shard.person.history.tolist()[-READS:]


@given(st.floats(0, 1e4), st.floats(0, 1e6))
def test_the_time_left_crosses_and_no_instant(remaining_s, now):
    person = Person(np.empty(0, np.int64), {k: np.zeros((1, *s), t) for k, (s, t) in PERSON.items()})
    none = Candidates(np.empty(0, "i8"), np.empty(0, "f4"), np.empty(0, "u4"), np.zeros(1, "f4"))
    read = read_shard(write_shard(Shard(person, none, {}, until=-1.0), remaining_s, READS), now)
    assert read.until == pytest.approx(now + remaining_s, abs=2e-6)  # whole microseconds


@given(st.floats(0, 100), st.integers(0, 10_000), hnp.arrays("f4", st.integers(0, 50)), st.booleans())
def test_a_slice_comes_back_as_it_was(seconds, start, scores, is_last):
    read = read_slice(write_slice(Slice(seconds, start, scores, is_last)))
    assert (read.seconds, read.start, read.is_last) == (seconds, start, is_last)
    assert equal(read.scores, scores)


@given(st.sampled_from(Kind), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.binary(max_size=40))
def test_a_header_says_what_follows_and_for_whom(kind, generation, job, payload):
    sent = frame(kind, generation, job, payload)
    read = read_header(sent[: HEADER.size])
    assert (read.kind, read.generation, read.job, read.length) == (kind, generation, job, len(payload))
    assert sent[HEADER.size :] == payload


def test_another_format_version_is_refused():
    sent = frame(Kind.READY, 1, 2)
    other = bytes([FORMAT + 1]) + sent[1:]
    with pytest.raises(ValueError, match=f"message format {FORMAT + 1}, expected {FORMAT}"):
        read_header(other[: HEADER.size])


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="99"):
        read_header(HEADER.pack(FORMAT, 99, 0, 0, 0, 0))


def test_records_are_little_endian_whatever_the_machine():
    assert frame(Kind.SCORES, 1, 2)[:2] == bytes([FORMAT, Kind.SCORES])
    assert HEADER.pack(FORMAT, Kind.READY, 0, 1, 2, 3)[4:8] == bytes([1, 0, 0, 0])
    assert write_slice(Slice(0.0, 0, np.array([1.0], ">f4"), True))[-4:] == np.array([1.0], "<f4").tobytes()
    assert write_arrays({"x": np.array([1.0], ">f4")}) == write_arrays({"x": np.array([1.0], "<f4")})


@given(st.dictionaries(st.text(max_size=5), arrays((2, 0, 3), "f4") | arrays((), "i8") | arrays((2, 1), "f4")))
def test_named_arrays_come_back_as_they_were_however_many(sent):
    read = read_arrays(b"before" + write_arrays(sent), offset=len(b"before"))
    assert list(read) == list(sent)
    assert all(equal(read[name], array) for name, array in sent.items())


def test_a_generation_is_the_first_64_bits_of_its_digest():
    assert generation_number("0123456789abcdef" + "f" * 48) == 0x0123456789ABCDEF
