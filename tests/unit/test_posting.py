"""Where webhooks may go: the addresses and URLs that are refused."""

import pytest

from chains_stream.errors import InvalidArgumentError
from chains_stream.posting import check_url, host_of, is_public


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0",
        "0.1.2.3",
        "10.0.0.1",
        "100.64.0.1",
        "127.0.0.1",
        "127.255.255.254",
        "169.254.169.254",
        "172.16.0.1",
        "172.31.255.255",
        "192.0.0.8",
        "192.0.2.1",
        "192.88.99.1",
        "192.168.1.1",
        "198.18.0.1",
        "198.51.100.1",
        "203.0.113.1",
        "224.0.0.1",
        "239.255.255.255",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::127.0.0.1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "::ffff:a9fe:a9fe",
        "64:ff9b::10.0.0.1",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b:1::8.8.8.8",
        "100::1",
        "2001::1",
        "2001:db8::1",
        "2002:7f00:1::",
        "2002:808:808::1",
        "3fff::1",
        "5f00::1",
        "fc00::1",
        "fd12:3456::1",
        "fe80::1",
        "fe80::1%1",
        "fec0::1",
        "ff02::1",
    ],
)
def test_addresses_that_are_not_of_the_public_internet(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "1.1.1.1",
        "8.8.8.8",
        "172.15.255.255",
        "172.32.0.1",
        "192.0.1.1",
        "223.255.255.255",
        "2606:4700:4700::1111",
        "2a00:1450:4001::200e",
        "64:ff9b::8.8.8.8",
        "::ffff:8.8.8.8",
    ],
)
def test_addresses_of_the_public_internet(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/hook",
        "http://127.1/hook",
        "http://2130706433/",
        "http://0x7f000001/",
        "http://0/",
        "https://10.1.2.3:8443/hook",
        "http://[::1]/",
        "http://[::ffff:127.0.0.1]:80/",
        "http://169.254.169.254/latest/meta-data",
        "http://localhost:8000/hook",
        "http://LOCALHOST./",
        "http://api.localhost/",
    ],
)
def test_a_url_into_the_own_network_is_refused_unless_it_is_allowed(url: str) -> None:
    with pytest.raises(InvalidArgumentError, match="public internet") as caught:
        check_url(url)
    assert caught.value.status == 400
    check_url(url, allow_private=True)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", "http:// or https://"),
        ("example.com/hook", "http:// or https://"),
        ("ftp://example.com/", "http:// or https://"),
        ("file:///etc/passwd", "http:// or https://"),
        ("http:///hook", "http:// or https://"),
        ("http://ada:hunter2@example.com/", "credentials"),
        ("http://hunter2@example.com/", "credentials"),
        ("http://example.com:port/?hunter2", "can be read"),
        ("http://example.com:0/?hunter2", "port"),
        ("http://example.com:65536/?hunter2", "port"),
        ("http://[::1/?hunter2", "can be read"),
        ("http://exa mple.com/?hunter2", "can be read"),
        ("http://0177.0.0.1/?hunter2", "can be read"),
        ("http://[fe80::1%25eth0]/?hunter2", "can be read"),
        ("http://example.com/\r\nx-hunter2: 1", "can be read"),
        ("http://example.com/?" + "hunter2" * 400, "2048 characters"),
    ],
)
@pytest.mark.parametrize("allow_private", [True, False])
def test_a_url_that_cannot_be_posted_to_is_refused_and_not_shown(url: str, said: str, allow_private: bool) -> None:  # noqa: FBT001 - a case
    with pytest.raises(InvalidArgumentError, match=said) as caught:
        check_url(url, allow_private=allow_private)
    assert caught.value.status == 400
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/hook?token=1",
        "http://example.com:8080",
        "HTTPS://EXAMPLE.COM/",
        "https://bücher.example/",
        "https://8.8.8.8/",
        "https://[2606:4700:4700::1111]/",
        "https://localhost.example.com/",
    ],
)
def test_a_url_of_the_public_internet_is_taken(url: str) -> None:
    check_url(url)


def test_nothing_but_the_host_is_shown() -> None:
    assert host_of("https://hooks.example.com:8443/hunter2?hunter2#hunter2") == "hooks.example.com"
    assert host_of("http://a:b") == "?"
