"""What the command line logs: one line an event, whoever logs it, in both formats."""

import io
import json
import logging
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import aiokafka.errors
import pytest
import structlog

from chains_stream import policy, telemetry
from chains_stream.log import get_logger, log_plain

Configure = Callable[..., io.StringIO]


@pytest.fixture
def configure() -> Iterator[Configure]:
    """Configure logging as the command line does, into a buffer; and leave it as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    # `basicConfig` would close them.
    root.handlers = []

    def to_buffer(log_format: telemetry.Format, level: str = "info") -> io.StringIO:
        stream = io.StringIO()
        telemetry.configure(log_format, level, stream)
        return stream

    yield to_buffer
    structlog.contextvars.clear_contextvars()
    structlog.reset_defaults()
    logging.captureWarnings(False)
    root.handlers, root.level = handlers, level


def events(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def fail() -> None:
    raise ValueError("out of\nluck")


def log_failure(log: Callable[..., Any]) -> None:
    try:
        fail()
    except ValueError:
        log("it failed")


def test_an_event_is_one_line_of_json(configure: Configure) -> None:
    stream = configure("json")
    structlog.contextvars.bind_contextvars(request_id="r1", correlation_id="c1")
    get_logger("chains_stream.worker").info("worker.started", chainlet="Leaf", text="two\nlines")
    (event,) = events(stream)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", event.pop("timestamp"))
    assert event == {
        "level": "info",
        "event": "worker.started",
        "chainlet": "Leaf",
        "text": "two\nlines",
        "request_id": "r1",
        "correlation_id": "c1",
        "logger": "chains_stream.worker",
    }


def test_an_event_is_one_line_on_the_console(configure: Configure) -> None:
    stream = configure("console")
    structlog.contextvars.bind_contextvars(request_id="r1")
    get_logger("chains_stream.worker").info("worker.started", text="two\nlines\x1b[31m\u2028", more=["a\nb"])
    (line,) = stream.getvalue().splitlines()
    assert re.match(r"\d{4}-\d\d-\d\dT\S+Z \[info +\] worker\.started +\[chains_stream\.worker\] ", line)
    assert "request_id=r1" in line
    assert "\x1b" not in line


@pytest.mark.parametrize("log_format", ["json", "console"])
@pytest.mark.parametrize("error", [None, "not-found", "two words", "a\nb\x1b[31m", "Zoë", "", 'quoted "x"'])
def test_what_is_logged_with_every_request_looks_like_all_else(
    configure: Configure, log_format: telemetry.Format, error: str | None
) -> None:
    stream = configure(log_format)
    fields = {"method": "POST", "route": "/run_remote", "status": 200, "duration_ms": 1.5, "request_id": "x-_9"}
    if error is not None:
        fields["error"] = error
    get_logger("chains_stream.x").info("request", **fields)
    log_plain(logging.getLogger("chains_stream.x"), {"event": "request", **fields})
    usual, plain = stream.getvalue().splitlines()
    time, _, rest = plain.partition("Z")
    assert re.fullmatch(r'(\{"timestamp":")?\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}', time)
    if log_format == "console":
        assert rest == usual.partition("Z")[2]
    else:
        assert [{**json.loads(line), "timestamp": ""} for line in (plain,)] == [{**json.loads(usual), "timestamp": ""}]


@pytest.mark.parametrize("get", [structlog.get_logger, get_logger, logging.getLogger])
def test_what_run_remote_logs_names_its_request(configure: Configure, get: Callable[[str], Any]) -> None:
    stream = configure("json")
    token = policy.current.set(policy.Scope("tickets/3/17", 0))
    get("pipeline").warning("it is said")
    policy.current.reset(token)
    get("pipeline").warning("nothing is served")
    during, after = events(stream)
    assert during["request_id"] == "tickets/3/17"
    assert "request_id" not in after


def test_what_is_logged_with_every_request_obeys_the_level(configure: Configure) -> None:
    stream = configure("json", "warning")
    log_plain(logging.getLogger("chains_stream.x"), {"event": "request"})
    assert not stream.getvalue()


def test_the_standard_library_s_loggers_pass_through_the_same_renderer(configure: Configure) -> None:
    stream = configure("json")
    structlog.contextvars.bind_contextvars(request_id="r1")
    logging.getLogger("uvicorn.error").warning("%s of %d", "part", 2)
    logging.getLogger("chain_file").info("from a Chainlet")
    structlog.get_logger("chain_file").info("from %s", "another", by="structlog")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        logging.captureWarnings(True)
        warnings.warn("deprecated", UserWarning, stacklevel=1)
    found = events(stream)
    assert [event["event"] for event in found[:3]] == ["part of 2", "from a Chainlet", "from another"]
    assert "UserWarning: deprecated" in found[3]["event"]
    assert [event["logger"] for event in found] == ["uvicorn.error", "chain_file", "chain_file", "py.warnings"]
    assert [event["level"] for event in found] == ["warning", "info", "info", "warning"]
    assert all(event["request_id"] == "r1" for event in found)


def test_what_aiokafka_tries_again_at_once_is_for_debug_alone(configure: Configure) -> None:
    log = logging.getLogger("aiokafka.consumer.group_coordinator")
    stream = configure("json")
    log.error("Group Coordinator Request failed: %s", aiokafka.errors.CoordinatorNotAvailableError())
    log.error("Group Coordinator Request failed: %s", aiokafka.errors.GroupAuthorizationFailedError())
    (event,) = events(stream)
    assert "GroupAuthorizationFailedError" in event["event"]
    stream = configure("json", "debug")
    log.error("Group Coordinator Request failed: %s", aiokafka.errors.CoordinatorNotAvailableError())
    assert len(events(stream)) == 1


def test_a_library_that_repeats_itself_is_heard_once_in_a_while(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = configure("json")
    for _ in range(100):
        logging.getLogger("aiokafka").error("Unable to connect to %s", "there")
        logging.getLogger("aiokafka").error("Unable to connect to %s", "elsewhere")
        logging.getLogger("chain_file").info("mine")
    names = Counter(event["event"] for event in events(stream))
    assert names == {"Unable to connect to there": 1, "Unable to connect to elsewhere": 1, "mine": 100}
    monkeypatch.setattr(telemetry, "REPEAT_EVERY", 0)
    logging.getLogger("aiokafka").error("Unable to connect to %s", "there")
    assert events(stream)[-1]["repeated"] == 99


@pytest.mark.parametrize("level", ["info", "debug"])
def test_libraries_are_heard_from_warning_on(configure: Configure, level: str) -> None:
    stream = configure("json", level)
    for name in ("aiokafka.consumer.group_coordinator", "kafka", "asyncio", "httpx"):
        logging.getLogger(name).info("daily work")
        logging.getLogger(name).warning("look")
    assert [event["event"] for event in events(stream)] == ["look"] * 4


def test_the_level_is_obeyed(configure: Configure) -> None:
    stream = configure("json", "warning")
    log = get_logger("chains_stream.x")
    log.info("no")
    log.warning("yes")
    logging.getLogger("chain_file").info("no")
    assert [event["event"] for event in events(stream)] == ["yes"]


def test_an_exception_in_json_is_a_traceback_on_one_line(configure: Configure) -> None:
    stream = configure("json")
    log_failure(get_logger("chains_stream.x").exception)
    log_failure(logging.getLogger("chain_file").exception)
    found = events(stream)
    assert len(found) == 2
    for event in found:
        assert event["exception"].startswith("Traceback (most recent call last):\n")
        assert event["exception"].endswith("ValueError: out of\nluck")


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_library_s_exception_is_brief_but_at_debug(configure: Configure, log_format: telemetry.Format) -> None:
    stream = configure(log_format)
    log_failure(logging.getLogger("aiokafka.producer").exception)
    (line,) = stream.getvalue().splitlines()
    assert "ValueError: out of" in line
    assert "test_telemetry.py:" in line
    assert "Traceback" not in line
    stream = configure(log_format, "debug")
    log_failure(logging.getLogger("aiokafka.producer").exception)
    assert "Traceback" in stream.getvalue()


def test_an_exception_on_the_console_is_brief_but_at_debug(configure: Configure) -> None:
    stream = configure("console")
    log_failure(get_logger("chains_stream.x").exception)
    (line,) = stream.getvalue().splitlines()
    assert "raised='ValueError: out of luck'" in line
    stream = configure("console", "debug")
    log_failure(get_logger("chains_stream.x").exception)
    assert stream.getvalue().count("ValueError: out of\nluck") == 1


def test_an_exception_without_a_traceback(configure: Configure) -> None:
    stream = configure("console")
    get_logger("chains_stream.x").error("it failed", exc_info=ValueError("made"))
    logging.getLogger("chain_file").error("all is well", exc_info=True)  # noqa: LOG014 - the mistake under test
    first, second = stream.getvalue().splitlines()
    assert "raised='ValueError: made'" in first
    assert "raised" not in second


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_secrets_are_masked(configure: Configure, log_format: telemetry.Format) -> None:
    stream = configure(log_format, "debug")
    fields = dict.fromkeys(("sasl_password", "api_key", "authorization", "auth_token", "client_secret"), "hunter2")
    get_logger("chains_stream.x").info("connecting", **fields, max_tokens=64)
    assert "hunter2" not in stream.getvalue()
    assert "64" in stream.getvalue()


def test_configured_again_it_replaces_what_was(configure: Configure) -> None:
    first, second = configure("json"), configure("json")
    get_logger("chains_stream.x").info("once")
    assert first.getvalue() == ""
    assert len(events(second)) == 1


def test_colours_are_for_terminals(configure: Configure) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    configure("console")  # so that the fixture undoes it
    terminal = Terminal()
    telemetry.configure("console", "info", terminal)
    get_logger("chains_stream.x").info("bright")
    assert "\x1b[" in terminal.getvalue()
