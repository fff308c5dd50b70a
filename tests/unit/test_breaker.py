"""Whose fault a failure is: that of the event, or of something that its Chainlet depends on."""

import pytest

from chains_stream.breaker import of_others


class BadTicketError(Exception):
    """What a Chainlet makes of a ticket that it can't use."""


def _while_handling(first: Exception) -> Exception:
    try:
        try:
            raise first
        except OSError:
            raise BadTicketError  # noqa: B904 - it says of no cause, and has one by the way
    except BadTicketError as error:
        return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConnectionRefusedError(), True),
        (TimeoutError(), True),
        (OSError(5, "Input/output error"), True),
        (_while_handling(ConnectionResetError()), True),
        (FileNotFoundError(2, "No such file or directory"), False),
        (PermissionError(), False),
        (_while_handling(FileNotFoundError()), False),
        (ValueError(), False),
    ],
    ids=str,
)
def test_a_file_that_an_event_names_is_of_the_event(error: Exception, *, expected: bool) -> None:
    assert of_others(error) is expected
