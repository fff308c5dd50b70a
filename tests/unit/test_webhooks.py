"""Webhooks: what is signed and how, the secrets, and when a delivery is tried again."""

import base64
import hashlib
import hmac
from typing import Any

import pytest

from chains_stream.chainlet import signature
from chains_stream.codec import codec_of
from chains_stream.delays import CLASSES, Delays
from chains_stream.deliveries import Delivery
from chains_stream.errors import ChainsUsageError
from chains_stream.posting import Answer
from chains_stream.settings import Settings, from_environment
from chains_stream.webhooks import MOST_PUT_OFF, SCHEDULE, DeliverWebhook, PuttingOff, retry_after, sign

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
NOW = 1_445_412_400.0  # Wed, 21 Oct 2015 07:26:40 GMT


def test_the_signature_is_that_of_the_specification() -> None:
    """The vector of its reference implementations."""
    keys = Settings.of(webhook_secrets=SECRET).webhook_keys
    signed = sign(keys, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert signed == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_each_secret_gives_a_signature() -> None:
    secrets = [b"o" * 24, b"n" * 64]
    text = ", ".join(f"whsec_{base64.b64encode(secret).decode()}" for secret in secrets)
    keys = Settings.of(webhook_secrets=text).webhook_keys
    expected = (base64.b64encode(hmac.new(secret, b"id.7.body", hashlib.sha256).digest()) for secret in secrets)
    assert sign(keys, "id", 7, b"body") == " ".join(f"v1,{digest.decode()}" for digest in expected)


@pytest.mark.parametrize(
    "wrong",
    [
        SECRET.removeprefix("whsec_"),
        "whsec_",
        "whsec_" + base64.b64encode(b"x" * 23).decode(),
        "whsec_" + base64.b64encode(b"x" * 65).decode(),
        "whsec_not base64 at all, hunter2",
        SECRET[:-1],
    ],
)
def test_a_wrong_secret_is_told_in_one_line_and_not_shown(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHAINS_WEBHOOK_SECRETS", f"{SECRET},{wrong}")
    with pytest.raises(ChainsUsageError) as caught:
        from_environment()
    text = str(caught.value)
    assert text == (
        "CHAINS_WEBHOOK_SECRETS: should be secrets separated by commas, each `whsec_` and the base64 of 24 to 64 "
        "bytes; number 2 is not"
    )
    assert caught.value.__suppress_context__


def test_secrets_are_not_shown_with_the_settings() -> None:
    settings = Settings.of(webhook_secrets=SECRET)
    assert SECRET.removeprefix("whsec_") not in repr(settings) + str(settings)
    assert Settings().webhook_keys == ()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (None, 0),
        ("", 0),
        ("0", 0),
        ("120", 120),
        (" 7 ", 7),
        ("-5", 0),
        ("1.5", 0),
        ("٣", 0),
        ("9" * 400, 0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 80),
        ("Wed, 21 Oct 2015 07:28:00 -0000", 80),
        ("Wednesday, 21-Oct-15 07:28:00 GMT", 80),
        ("Wed, 21 Oct 2015 07:00:00 GMT", 0),
        ("Wed, 99 Oct 2015 07:28:00 GMT", 0),
        ("soon", 0),
    ],
)
def test_retry_after_is_seconds_or_a_date(text: str | None, seconds: float) -> None:
    assert retry_after(text, NOW) == seconds


class Nowhere:
    """No broker: nothing is sent."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(name)


@pytest.fixture
def putting_off() -> PuttingOff:
    delays = Delays(Nowhere(), Settings())
    return PuttingOff(delays, "topic", codec_of(signature(DeliverWebhook)), SCHEDULE)


def delivery(attempt: int) -> Delivery:
    return Delivery(
        url="https://example.com/",
        request_id="id",
        correlation_id=b"c" * 16,
        topic="results",
        partition=0,
        begin=0,
        end=0,
        status="SUCCEEDED",
        attempt=attempt,
    )


def test_a_delivery_is_tried_for_a_day(putting_off: PuttingOff) -> None:
    failed = Answer(500, "500 Internal Server Error")
    delays = [putting_off.delay(delivery(attempt), failed) for attempt in range(1, len(SCHEDULE) + 1)]
    assert delays == list(SCHEDULE)
    assert sum(SCHEDULE) > 24 * 3600
    assert set(SCHEDULE) <= set(CLASSES)
    assert putting_off.delay(delivery(len(SCHEDULE) + 1), failed) is None


@pytest.mark.parametrize(
    ("answer", "delay"),
    [
        (Answer(None, "no answer"), 300.0),
        (Answer(302, "302 Found"), 300.0),
        (Answer(404, "404 Not Found"), 300.0),
        (Answer(410, "410 Gone"), None),
        (Answer(429, "429", "1000"), 1000.0),
        (Answer(503, "503", "1"), 300.0),
        (Answer(503, "503", "9999999"), MOST_PUT_OFF),
        (Answer(503, "503"), 300.0),
        (Answer(500, "500", "1000"), 300.0),
    ],
)
def test_the_answer_says_when_to_try_again(putting_off: PuttingOff, answer: Answer, delay: float | None) -> None:
    assert putting_off.delay(delivery(2), answer) == delay
