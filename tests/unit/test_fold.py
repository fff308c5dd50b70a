"""What a reader makes of the frames of one call, in the order of the log."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chains_stream.errors import RemoteErrorDetail
from chains_stream.fold import Fold, Step
from chains_stream.messages import Cancelled, Chunk, Done, Failed, Frame, Started
from chains_stream.readback import Answered

ID = b"i" * 16
ERROR = RemoteErrorDetail("ValueError", None, "no")


def chunk(attempt: int, sequence: int) -> Chunk:
    return Chunk(ID, attempt, sequence, msgspec.Raw(bytes([sequence])))


def done(attempt: int, chunks: int) -> Done:
    return Done(ID, attempt, chunks)


def steps(*frames: Frame) -> list[Step]:
    fold = Fold()
    return [fold.take(frame) for frame in frames]


def test_a_stream_in_order() -> None:
    assert steps(chunk(1, 0), chunk(1, 1), done(1, 2)) == [Step.CHUNK, Step.CHUNK, Step.END]


def test_a_repeated_chunk_is_dropped_and_a_missing_one_is_told() -> None:
    assert steps(chunk(1, 0), chunk(1, 0), chunk(1, 2)) == [Step.CHUNK, Step.DROP, Step.GAP]


@pytest.mark.parametrize("count", [1, 3])
def test_an_end_that_counts_wrongly_is_no_end(count: int) -> None:
    assert steps(chunk(1, 0), chunk(1, 1), done(1, count))[-1] is Step.GAP


@pytest.mark.parametrize("frame", [chunk(1, 1), done(1, 1), Failed(ID, 1, ERROR), Cancelled(ID, 1), Started(ID, 1)])
def test_a_worker_that_was_overtaken_is_not_heard(frame: Frame) -> None:
    """It was paused, or cut off, and writes on: another one has said that it runs the request now."""
    assert steps(chunk(1, 0), Started(ID, 2), frame, chunk(2, 1))[2:] == [Step.DROP, Step.CHUNK]


def test_a_run_that_does_not_resume_begins_the_stream_anew() -> None:
    fold = Fold()
    assert fold.take(chunk(1, 0)) is Step.CHUNK
    assert fold.take(Started(ID, 2, resumes=False)) is Step.DROP
    assert fold.take(chunk(1, 1)) is Step.DROP, "its worker was overtaken"
    assert fold.begins_again(chunk(2, 0))
    assert fold.take(chunk(2, 0)) is Step.CHUNK
    assert fold.chunks == 1


def test_another_run_goes_on_or_begins_again() -> None:
    fold = Fold()
    assert fold.take(chunk(1, 0)) is Step.CHUNK
    assert fold.take(Started(ID, 2)) is Step.DROP
    assert not fold.begins_again(chunk(2, 1))
    assert fold.take(chunk(2, 1)) is Step.CHUNK
    assert fold.begins_again(chunk(3, 0))
    assert fold.take(chunk(3, 0)) is Step.CHUNK
    assert fold.chunks == 1
    assert not fold.begins_again(chunk(3, 0)), "of the same run it is a repeated one"
    assert fold.begins_again(done(4, 0)), "a run without any"
    assert fold.take(done(4, 0)) is Step.END


@pytest.mark.parametrize("second", [chunk(2, 1), chunk(2, 2), done(2, 2)])
def test_two_runs_are_not_mixed_when_the_first_chunks_of_the_second_got_lost(second: Frame) -> None:
    assert steps(chunk(1, 0), chunk(1, 1), second)[-1] is Step.GAP


def test_another_run_that_has_only_the_end_left() -> None:
    assert steps(chunk(1, 0), Started(ID, 2), done(2, 1)) == [Step.CHUNK, Step.DROP, Step.END]


def test_what_was_answered_is_read_back() -> None:
    frames: list[tuple[Frame, str | None]] = [
        (chunk(1, 0), None),
        (chunk(1, 1), "file:///large"),
        (Started(ID, 2), None),
        (chunk(1, 2), None),
    ]
    answered = Answered.of(frames)
    assert answered == Answered([msgspec.Raw(b"\x00"), "file:///large"], ended=False)
    assert Answered.of([*frames, (done(2, 2), None), (chunk(3, 2), None)]) == Answered(answered.chunks, ended=True)
    assert Answered.of([(chunk(1, 1), None)]) is None


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 5)), max_size=40))
def test_a_reader_never_gets_a_chunk_twice_or_out_of_order(pairs: list[tuple[int, int]]) -> None:
    """Whatever several workers write, in whatever order: between two beginnings the sequence is 0, 1, 2, …"""
    fold = Fold()
    shown: list[int] = []
    for attempt, sequence in pairs:
        frame = chunk(attempt, sequence)
        if fold.begins_again(frame):
            shown.clear()
        if fold.take(frame) is Step.CHUNK:
            shown.append(sequence)
        assert shown == list(range(len(shown)))
        assert fold.chunks == len(shown)
