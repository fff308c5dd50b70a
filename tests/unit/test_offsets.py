"""Out-of-order completion, takeovers, and who died of what: no record is lost, and no innocent one is put aside."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chains_stream.offsets import Ledger, Note

MAX_NOTE = 4_096  # bytes that Kafka stores beside an offset
LIMIT = 1_500  # the largest `max_uncommitted`
BATCH = 256  # records that a worker takes beyond it, at most


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
    assert ledger.position == (min(taken) if taken else highest + 1)


@pytest.mark.parametrize("metadata", ["", "null", "a stranger's", "{}", '["x"]', "[-"])
def test_a_note_that_is_none_of_ours_counts_as_none(metadata: str) -> None:
    assert Note.read(metadata) == Note(0)


def test_a_note_is_read_as_it_was_written_and_by_later_versions_too() -> None:
    note = Note(7, clean=True, runs=[1, 2], named=True, suspects=3, alone=0, deaths={0: 2})
    assert Note.read(note.write()) == note
    assert Note.read("[7]") == Note(7), "as the first version wrote it"
    assert Note.read(note.write()[:-1] + ', "a field of the future"]') == note


def test_what_lies_before_the_start_is_done() -> None:
    ledger = Ledger(10)
    assert ledger.position == 10
    assert not ledger.take(9)
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


@given(st.sets(st.integers(0, LIMIT + BATCH)), st.integers(0, 10**9), st.booleans())
@settings(max_examples=50)
def test_a_note_fits_whatever_is_open(opened: set[int], start: int, watched: bool) -> None:  # noqa: FBT001 - hypothesis'
    ledger = Ledger(start)
    if watched:
        ledger.watched_to = start + LIMIT
    for at in range(LIMIT + BATCH):
        ledger.take(start + at)
    for at in range(LIMIT + BATCH):
        if at not in opened:
            ledger.finish(start + at)
    assert len(ledger.note().write().encode()) <= MAX_NOTE


def test_the_worst_note_fits() -> None:
    ledger = Ledger(10**12, epoch=10**6)
    for at in range(LIMIT + BATCH):
        ledger.take(10**12 + at)
    for at in range(1, LIMIT + BATCH, 2):
        ledger.finish(10**12 + at)
    note = ledger.note()
    assert len(note.runs) == LIMIT + BATCH
    assert len(note.write().encode()) <= MAX_NOTE


def test_a_record_that_left_the_log_holds_nobody_up() -> None:
    """Its retention passed while it waited to be run again."""
    ledger = Ledger.take_over(5, Note(1, runs=[3, 2, 1]), 20)
    assert not ledger.take(4)
    assert ledger.take(7), "5 and 6 are gone"
    ledger.finish(7)
    assert ledger.position == 10
    assert not ledger.take(9)
    assert ledger.take(10)


def test_done_records_beyond_the_committed_one_are_not_run_again() -> None:
    first = Ledger()
    for offset in range(10):
        first.take(offset)
    for offset in (1, 2, 5, 9):
        first.finish(offset)
    again = Ledger.take_over(first.position, Note.read(first.note().write()), 10)
    assert [offset for offset in range(12) if again.take(offset)] == [0, 3, 4, 6, 7, 8, 10, 11]


def test_a_handover_in_order_makes_no_suspects() -> None:
    first = Ledger()
    for offset in range(4):
        first.take(offset)
    again = Ledger.take_over(0, first.note(clean=True), 4)
    assert not again.watched
    assert again.redelivered_to == 4
    assert not any(again.suspect(offset) for offset in range(4))


def test_a_first_death_makes_the_next_worker_watch_and_a_second_one_suspects() -> None:
    first = Ledger()
    for offset in range(3):
        first.take(offset)
    first.finish(1)
    watching = Ledger.take_over(0, first.note(), 5)
    assert watching.watched
    assert watching.redelivered_to == 5
    assert [offset for offset in range(5) if watching.take(offset)] == [0, 2, 3, 4]
    assert not watching.suspect(0)
    watching.finish(0)
    watching.finish(3)
    careful = Ledger.take_over(2, watching.note(), 9)
    assert [offset for offset in range(2, 9) if careful.take(offset) and careful.suspect(offset)] == [2, 4]
    assert careful.watched, "what lies behind has not been run since the first death"
    careful.alone = 4
    last = Ledger.take_over(2, careful.note(), 9)
    assert [last.deaths(offset) for offset in (2, 3, 4)] == [0, 0, 1]


def test_waiting_to_be_run_alone_is_no_evidence() -> None:
    """A suspect that waits does not run: whatever the worker dies of then, it is not this one."""
    waiting = Ledger.take_over(0, Note(2, runs=[2], named=True), 2)
    assert waiting.take(0)
    assert waiting.suspect(0)
    again = Ledger.take_over(0, waiting.note(), 2)
    assert again.deaths(0) == 0
    assert again.suspect(0)
    assert again.suspect(1)


# --- a model of workers that take, finish, hand over and die


@dataclass
class Log:
    """A partition with poison in it, and what a group has stored."""

    size: int
    poison: set[int]
    committed: int = 0
    note: str = ""
    runs: dict[int, int] = field(default_factory=dict)
    finished: set[int] = field(default_factory=set)
    dead_letters: set[int] = field(default_factory=set)
    deaths: int = 0
    kills: int = 0  # at random


class Worker:
    """What `worker` does with a ledger, one step at a time; dies of what is in the log's poison."""

    def __init__(self, log: Log, concurrency: int) -> None:
        self.log = log
        self.concurrency = concurrency
        self.ledger = Ledger.take_over(log.committed, Note.read(log.note), log.size)
        self.fetched = log.committed
        self.running: list[int] = []
        self.suspects: list[int] = []
        self.commit()

    def commit(self, *, clean: bool = False) -> None:
        self.log.committed, self.log.note = self.ledger.position, self.ledger.note(clean=clean).write()

    def do(self, step: str, which: int) -> "Worker":
        """Take one step; give the worker that is there after it."""
        match step:
            case "take":
                self.take()
                self.run_a_suspect()
            case "finish":
                if not self.finish(which):
                    self.log.deaths += 1
                    return Worker(self.log, self.concurrency)
            case "commit":
                self.commit()
            case "kill":
                self.log.kills += 1
                return Worker(self.log, self.concurrency)
            case _:
                self.commit(clean=True)
                return Worker(self.log, self.concurrency)
        return self

    def take(self) -> None:
        while self.fetched < self.log.size and len(self.running) < self.concurrency and not self.alone:
            offset, self.fetched = self.fetched, self.fetched + 1
            if not self.ledger.take(offset):
                continue
            if self.ledger.deaths(offset) >= 3:
                self.log.dead_letters.add(offset)
                self.ledger.finish(offset)
            elif self.ledger.suspect(offset):
                self.suspects.append(offset)
            else:
                if self.ledger.watched:
                    self.commit()
                self.begin(offset)

    @property
    def alone(self) -> bool:
        return self.ledger.alone is not None

    def begin(self, offset: int) -> None:
        self.running.append(offset)
        self.log.runs[offset] = self.log.runs.get(offset, 0) + 1

    def run_a_suspect(self) -> None:
        if self.suspects and not self.running:
            self.ledger.alone = self.suspects.pop(0)
            self.commit()
            self.begin(self.ledger.alone)

    def finish(self, which: int) -> bool:
        """Finish one that runs; False if the worker died of it."""
        if not self.running:
            return True
        offset = self.running.pop(which % len(self.running))
        if offset in self.log.poison:
            return False
        self.ledger.finish(offset)
        self.log.finished.add(offset)
        return True


@given(
    st.integers(1, 25),
    st.sets(st.integers(0, 24), max_size=3),
    st.integers(1, 6),
    st.lists(
        st.tuples(st.sampled_from(["take", "finish", "commit", "kill", "hand over"]), st.integers(0, 9)), max_size=60
    ),
)
@settings(max_examples=300, deadline=None)
def test_nothing_is_lost_and_only_poison_is_put_aside(
    size: int, poison: set[int], concurrency: int, steps: list[tuple[str, int]]
) -> None:
    log = Log(size, {offset for offset in poison if offset < size})
    worker = Worker(log, concurrency)
    for step, which in steps:
        worker = worker.do(step, which)
    for _ in range(1_000):  # then it is left to itself
        worker = worker.do("take", 0).do("finish", 0).do("commit", 0)
        if log.committed == size:
            break
    assert log.committed == size
    assert log.finished | log.dead_letters == set(range(size)), "nothing is lost"
    assert log.poison <= log.dead_letters, "no poison was run to its end"
    if log.kills < 3:
        assert log.dead_letters == log.poison, "no innocent record was alone each time"
    assert log.deaths <= 5 * len(log.poison) + log.kills + concurrency
