"""The table of what faults did, in Markdown."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from tests.chaos.checker import Account
from tests.chaos.driver import Outcome

HEAD = (
    "fault", "times", "sent", "answered", "failed, and said why", "lost", "shown twice", "wrong", "cut short",
    "run again", "lasted", "first answer", "as before", "delay p50", "delay max",
)  # fmt: skip


def table(accounts: Iterable[Account]) -> str:
    """Give a row for each fault, over all the times that it struck."""
    by_name = sorted(accounts, key=lambda each: each.fault.name)
    rows = [_row(list(same)) for _, same in groupby(by_name, key=lambda each: each.fault.name)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (HEAD, ["---"] * len(HEAD), *rows))


def summary(accounts: Sequence[Account]) -> str:
    outcomes = Counter(each.outcome for account in accounts for each in account.requests)
    told = ", ".join(f"{outcome.value} {outcomes[outcome]}" for outcome in Outcome)
    return f"{len(accounts)} faults, {outcomes.total()} requests: {told}"


def reasons(accounts: Iterable[Account]) -> Iterator[str]:
    """Say why the failures that came up tell the truth."""
    seen = {
        (failure, reason)
        for account in accounts
        for each in account.requests
        if (failure := each.failure) and (reason := account.fault.truthful.get((each.kind, failure)))
    }
    for failure, reason in sorted(seen):
        yield f"- {failure}: {reason}"


def _row(accounts: Sequence[Account]) -> list[str]:
    requests = [each for account in accounts for each in account.requests]
    outcomes = Counter(each.outcome for each in requests)
    failures = Counter(
        f"{each.kind}: {each.failure}"
        for each in requests
        if each.outcome in (Outcome.FAILED, Outcome.RESET, Outcome.REFUSED)
    )
    delays = sorted(delay for account in accounts for delay in account.delays())
    return [
        accounts[0].fault.name,
        str(len(accounts)),
        f"{len(requests):,}",
        f"{outcomes[Outcome.ANSWERED]:,}",
        ", ".join(f"{name} {count}" for name, count in sorted(failures.items())) or "0",
        str(outcomes[Outcome.LOST] + sum(len(account.open) for account in accounts)),
        str(outcomes[Outcome.TWICE]),
        str(outcomes[Outcome.WRONG]),
        str(outcomes[Outcome.TRUNCATED]),
        str(sum(account.run_again for account in accounts)),
        f"{max(account.mended - account.broken for account in accounts):.1f} s",
        f"{max(account.first_answer() for account in accounts):.1f} s",
        f"{max(account.settled() for account in accounts):.1f} s",
        f"{delays[len(delays) // 2] * 1000:,.0f} ms",
        f"{delays[-1]:.1f} s",
    ]
