"""Out-of-order completion: what is committed is never beyond an unfinished record."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chains_stream.offsets import Ledger, Note


@given(st.lists(st.integers(0, 10_000), unique=True, min_size=1, max_size=60).map(sorted), st.data())
def test_position_is_the_first_unfinished_record(offsets: list[int], data: st.DataObject) -> None:
    ledger = Ledger()
    for offset in offsets:
        assert ledger.take(offset)
    order = data.draw(st.permutations(offsets))
    unfinished = set(offsets)
    for offset in order:
        ledger.finish(offset)
        unfinished.remove(offset)
        expected = min(unfinished) if unfinished else offsets[-1] + 1
        assert ledger.position == expected
    assert len(ledger) == 0


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 30)), max_size=200))
def test_records_that_come_again_are_taken_once(steps: list[tuple[bool, int]]) -> None:
    """Interleave taking and finishing with re-fetches from any earlier offset, as after a rebalance."""
    ledger = Ledger()
    highest = -1
    taken: list[int] = []
    for again, back in steps:
        if again:
            for offset in range(max(0, highest - back), highest + 1):
                assert not ledger.take(offset)
        else:
            highest += 1
            assert ledger.take(highest)
            taken.append(highest)
            if back % 2 and taken:
                ledger.finish(taken.pop(back % len(taken)))
    assert ledger.position == (min(taken) if taken else (highest + 1 if highest >= 0 else None))


@pytest.mark.parametrize("metadata", ["", "null", "a stranger's", "{}", '["x"]', "[-"])
def test_a_note_that_is_none_of_ours_counts_as_none(metadata: str) -> None:
    assert Note.read(metadata) == Note(0)


def test_a_note_is_read_as_it_was_written_and_by_later_versions_too() -> None:
    assert Note.read(Note(7).write()) == Note(7)
    assert Note.read('[7, "a field of the future"]') == Note(7)


def test_nothing_taken_commits_nothing() -> None:
    assert Ledger().position is None


def test_what_lies_before_the_start_is_done() -> None:
    ledger = Ledger(10)
    assert not ledger.take(9)
    assert ledger.position == 10
    assert ledger.take(10)
    assert ledger.position == 10
    ledger.finish(10)
    assert ledger.position == 11


def test_offsets_with_gaps_commit_past_the_gap() -> None:
    """Offsets of a Kafka partition have gaps where transactions ended or records were compacted away."""
    ledger = Ledger()
    ledger.take(3)
    ledger.take(7)
    ledger.finish(3)
    assert ledger.position == 7
    ledger.finish(7)
    assert ledger.position == 8
