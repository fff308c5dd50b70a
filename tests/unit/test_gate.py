"""Keys, rates and origins, without a gateway."""

import hashlib
from pathlib import Path

import pytest

from chains_stream.errors import ChainsUsageError, OverloadedError
from chains_stream.gateway.auth import Keys, new_key
from chains_stream.gateway.cors import Cors
from chains_stream.gateway.limits import MAX_CALLERS, Limits, Rates, caller_of
from chains_stream.gateway.problems import Refusal
from chains_stream.settings import Settings

KEY, ENTRY = new_key("ada")
OTHER, OTHER_ENTRY = new_key("grace")


def keys(text: str) -> Keys:
    found = Keys.of(Settings.of(api_keys=text))
    assert found is not None
    return found


def test_a_new_key_is_random_and_its_entry_holds_nothing_of_it() -> None:
    assert KEY.startswith("ck_")
    assert len(KEY) == 3 + 43
    assert OTHER != KEY
    assert str(ENTRY) == f"ada:{hashlib.sha256(KEY.encode()).hexdigest()}"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("authorization", "Bearer {}"),
        ("authorization", "bearer   {}"),
        ("authorization", "Api-Key {}"),
        ("x-api-key", "{}"),
    ],
)
def test_a_key_is_known_in_each_way_that_clients_send_one(name: str, value: str) -> None:
    assert keys(f"{ENTRY}, {OTHER_ENTRY}").owner({name.encode(): value.format(KEY).encode()}) == "ada"


def test_a_key_of_ours_counts_beside_a_credential_for_somebody_else() -> None:
    headers = {b"authorization": b"Basic YTpi", b"x-api-key": KEY.encode()}
    assert keys(str(ENTRY)).owner(headers) == "ada"
    assert keys(str(ENTRY)).owner(headers | {b"authorization": b"Bearer sk-of-another-service"}) == "ada"


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({}, "asks for an API key"),
        ({b"authorization": b"Bearer"}, "asks for an API key"),
        ({b"authorization": b"Basic " + KEY.encode()}, "asks for an API key"),
        ({b"authorization": b"Bearer " + KEY.encode()[:-1]}, "is not one of"),
        ({b"authorization": b"Bearer " + ENTRY.digest.hex().encode()}, "is not one of"),
        ({b"x-api-key": b""}, "is not one of"),
        ({b"x-api-key": OTHER.encode()}, "is not one of"),
    ],
)
def test_without_a_key_of_ours_a_request_is_refused(headers: dict[bytes, bytes], said: str) -> None:
    with pytest.raises(Refusal, match=said) as caught:
        keys(str(ENTRY)).owner(headers)
    assert caught.value.status == 401
    assert caught.value.headers == {"www-authenticate": "Bearer"}
    assert "ck_" not in caught.value.detail


def test_keys_whose_hashes_begin_alike_are_told_apart() -> None:
    twin = ENTRY.digest[:8] + OTHER_ENTRY.digest[8:]
    several = keys(f"twin:{twin.hex()} {ENTRY}")
    assert several.owner({b"x-api-key": KEY.encode()}) == "ada"


def test_several_keys_may_have_one_name() -> None:
    newer, entry = new_key("ada")
    both = keys(f"{ENTRY}\n{entry}")
    assert {both.owner({b"x-api-key": key.encode()}) for key in (KEY, newer)} == {"ada"}


def test_keys_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# ours\n\n{ENTRY}  # since May\n  {OTHER_ENTRY}\n")
    assert keys(f"@{file}").owner({b"x-api-key": OTHER.encode()}) == "grace"


def test_none_configured_is_none() -> None:
    assert Keys.of(Settings()) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param(KEY, "entry 1 should be a name", id="key"),
        pytest.param(f"{ENTRY}, ada:{KEY}", "entry 2 should be a name", id="entry and key"),
        ("@/no/such/file", "can't read /no/such/file: No such file"),
        (" ", "entry 1 should be a name"),
    ],
)
def test_a_wrong_setting_is_one_line_without_what_may_be_a_key(text: str, said: str) -> None:
    with pytest.raises(ChainsUsageError, match=said) as caught:
        keys(text)
    assert KEY not in str(caught.value)
    assert "CHAINS_API_KEYS" in str(caught.value)


def test_a_wrong_line_of_a_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{ENTRY}\nada\n")
    with pytest.raises(ChainsUsageError, match="keys:2 should be"):
        keys(f"@{file}")
    file.write_text("# none\n")
    with pytest.raises(ChainsUsageError, match="there is no key in"):
        keys(f"@{file}")


def test_settings_do_not_show_the_entries() -> None:
    assert "ada" not in repr(Settings.of(api_keys=str(ENTRY)))


class Clock:
    """Time that a test lets pass."""

    def __init__(self) -> None:
        self.now = 1e6

    def __call__(self) -> float:
        return self.now


def test_a_bucket_gives_its_burst_and_then_its_rate() -> None:
    clock = Clock()
    rates = Rates(10.0, 3, clock)
    assert [rates.take("ada") for _ in range(3)] == [
        b'"requests";r=2;t=1',
        b'"requests";r=1;t=1',
        b'"requests";r=0;t=1',
    ]
    with pytest.raises(OverloadedError, match="CHAINS_RATE_PER_KEY") as caught:
        rates.take("ada")
    assert caught.value.retry_after == pytest.approx(0.1)
    rates.take("grace")  # has a bucket of her own
    taken = 0
    for _ in range(1000):
        clock.now += 0.01
        try:
            rates.take("ada")
        except OverloadedError:
            continue
        taken += 1
    assert taken == pytest.approx(100, abs=1)


def test_a_bucket_is_full_again_after_a_while_and_holds_no_more() -> None:
    clock = Clock()
    rates = Rates(0.5, None, clock)
    assert rates.policy == b'"requests";q=1;w=2'
    rates.take("ada")
    clock.now += 3600
    rates.take("ada")
    with pytest.raises(OverloadedError) as caught:
        rates.take("ada")
    assert caught.value.retry_after == pytest.approx(2.0)


def test_callers_that_were_away_are_forgotten_and_no_number_of_them_is_too_many() -> None:
    clock = Clock()
    rates = Rates(100.0, 100, clock)
    for number in range(3 * MAX_CALLERS):
        rates.take(str(number))
    assert len(rates) <= MAX_CALLERS + 1
    clock.now += 60
    for _ in range(MAX_CALLERS):
        rates.take("ada")
        clock.now += 1
    assert len(rates) == 1


def test_an_ipv6_caller_is_its_network() -> None:
    assert caller_of("2001:db8::1") == caller_of("2001:db8::ffff:1") != caller_of("2001:db8:0:1::1")
    assert caller_of("fe80::1%eth0") == "fe80::/64"
    assert caller_of("192.0.2.1") == "192.0.2.1"


def test_limits_count_by_the_name_of_the_key() -> None:
    limits = Limits(Settings(max_requests_per_key=1))
    place = limits.enter({b"x-api-key": b"one"}, "ada")
    with pytest.raises(OverloadedError, match="1 requests with the API key ada"):
        limits.enter({b"x-api-key": b"another"}, "ada")
    limits.enter({b"x-api-key": b"one"}, "grace").leave()
    place.leave()


@pytest.mark.parametrize("origins", ["example.org", "https://example.org/", "https://a.example, *.example.org", "null"])
def test_an_origin_that_is_none_is_one_clear_line(origins: str) -> None:
    with pytest.raises(ChainsUsageError, match="CHAINS_CORS_ORIGINS: an origin should be"):
        Cors.of(Settings.of(cors_origins=origins))


def test_pages_without_an_origin_and_of_those_named_may_call() -> None:
    cors = Cors.of(Settings.of(cors_origins="https://a.example, http://b.example:3000"))
    assert cors is not None
    assert cors.allows(None)
    assert cors.allows(b"http://b.example:3000")
    assert not cors.allows(b"https://b.example:3000")
