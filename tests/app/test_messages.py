"""What crosses between service and workers: comes back as it was, and another format is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from app.errors import FieldError, InvalidRequest
from app.flow import Sent
from app.workers.messages import FORMAT, HEADER, Asked, Frame, Kind, frame, generation_number, read_frames
from app.workers.scoring import Slice

NUMBERS = st.integers(0, 2**64 - 1)


def read_back(said):
    held = bytearray(frame(Kind.SCORES, 1, 2, said))
    ((_, found),) = read_frames(held)
    assert not held
    return found


@given(st.floats(0, 100), st.integers(0, 10_000), hnp.arrays("f4", st.integers(0, 50)), st.booleans())
def test_a_slice_comes_back_as_it_was(seconds, start, scores, is_last):
    read = read_back(Slice(seconds, start, scores, is_last))
    assert (read.seconds, read.start, read.is_last) == (seconds, start, is_last)
    np.testing.assert_array_equal(read.scores, scores)
    assert read.scores.dtype == np.float32


def test_what_is_wrong_with_a_request_comes_back_field_by_field():
    errors = (FieldError("k", 0, "1 or more"), FieldError("filters.0.in", None, "a number"))
    read = read_back(InvalidRequest(*errors))
    assert (type(read), read.errors, str(read)) == (InvalidRequest, errors, "k: 1 or more; filters.0.in: a number")


@given(st.floats(-1, 1e4), st.floats(1e-3, 10), st.floats(0, 1e6), st.integers(1, 1_000))
def test_the_time_left_crosses_and_no_instant_and_what_follows_is_taken_off(left_s, timeout_s, now, k):
    asked = read_back(Asked(Sent("r", b"{}", None), left_s, timeout_s, 1.0))
    deadline, way_back_s = asked.deadline(now, k), min(0.002 + 2e-6 * k, timeout_s / 10)
    assert deadline.timeout_s == pytest.approx(timeout_s - way_back_s)
    assert deadline.started_at + deadline.timeout_s == pytest.approx(now + left_s - way_back_s, abs=1e-6)


@given(st.sampled_from(Kind), NUMBERS, NUMBERS, st.none() | st.binary(max_size=40))
def test_a_header_says_what_follows_and_for_whom(kind, generation, job, said):
    sent = frame(kind, generation, job, said)
    assert list(read_frames(bytearray(sent))) == [(Frame(kind, generation, job), said)]
    assert (len(sent) == HEADER.size) == (said is None)


@given(st.lists(st.none() | st.text(max_size=20), max_size=5), st.integers(1, 60))
def test_frames_are_read_whole_however_they_arrive(said, at_once):
    sent = b"".join(frame(Kind.FAILED, 1, i, text) for i, text in enumerate(said))
    held, read = bytearray(), []
    for start in range(0, len(sent), at_once):
        held += sent[start : start + at_once]
        read += [(head.job, text) for head, text in read_frames(held)]
    assert read == list(enumerate(said))
    assert not held


def test_another_format_version_is_refused():
    sent = frame(Kind.READY, 1, 2)
    other = bytearray([FORMAT + 1]) + sent[1:]
    with pytest.raises(ValueError, match=f"message format {FORMAT + 1}, expected {FORMAT}"):
        list(read_frames(other))


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="99"):
        list(read_frames(bytearray(HEADER.pack(FORMAT, 99, 0, 0, 0, 0))))


def test_headers_are_little_endian_whatever_the_machine():
    assert frame(Kind.SCORES, 1, 2)[:2] == bytes([FORMAT, Kind.SCORES])
    assert HEADER.pack(FORMAT, Kind.READY, 0, 1, 2, 3)[4:8] == bytes([1, 0, 0, 0])


def test_a_generation_is_the_first_64_bits_of_its_digest():
    assert generation_number("0123456789abcdef" + "f" * 48) == 0x0123456789ABCDEF
