"""Who may call a server, as an operator sets it: loopback, keys, certificates; and how these are replaced."""

import re
import signal
import ssl
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme

from tests.acceptance.command import HERE, Commands, chains

HELLO = str(HERE.parents[1] / "chainlets" / "hello.py")
BODY = {"names": ["Ada"]}


def new_key(name: str) -> tuple[str, str]:
    done = chains("key", name)
    assert done.returncode == 0, done.stderr
    key, entry = done.stdout.splitlines()
    return key, entry


def ask(url: str, key: str) -> int:
    return httpx.post(
        f"{url}/run_remote", json=BODY, headers={"authorization": f"Bearer {key}"}, timeout=30
    ).status_code


def test_without_keys_it_listens_on_loopback_only(start: Commands) -> None:
    done = chains("run", HELLO, "--port", "0", "--host", "0.0.0.0")
    assert (done.returncode, done.stdout) == (2, "")
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    for mend in ("CHAINS_API_KEYS", "chains key NAME", "CHAINS_ALLOW_ANONYMOUS=true"):
        assert mend in line
    server = start("run", HELLO, "--port", "0")
    server.ready()
    assert "no API keys are set" in server.logged("gateway.no_keys")
    assert server.stop() == 0


def test_strangers_may_be_let_in(start: Commands) -> None:
    server = start("run", HELLO, "--port", "0", "--host", "0.0.0.0", variables={"CHAINS_ALLOW_ANONYMOUS": "true"})
    assert ask(server.ready(), "none") == 200
    assert "warning" in server.logged("gateway.no_keys")
    assert server.stop() == 0


def test_keys_of_a_file_are_replaced_while_it_runs(start: Commands, tmp_path: Path) -> None:
    old, old_entry = new_key("ada")
    new, new_entry = new_key("ada")
    file = tmp_path / "keys"
    file.write_text(f"# of Ada\n{old_entry}\n")
    server = start("run", HELLO, "--port", "0", "--host", "0.0.0.0", variables={"CHAINS_API_KEYS": f"@{file}"})
    url = server.ready()
    assert [ask(url, old), ask(url, new), ask(url, "none")] == [200, 401, 401]
    file.write_text("broken\n")
    server.send(signal.SIGHUP)
    assert "keys:1 should be" in server.logged("gateway.not_reloaded")
    assert [ask(url, old), ask(url, new)] == [200, 401]
    file.write_text(f"{new_entry}\n")
    server.send(signal.SIGHUP)
    server.logged("gateway.reloaded")
    assert [ask(url, old), ask(url, new)] == [401, 200]
    assert server.stop() == 0
    told = server.stderr.text()
    assert "owner=ada" in told
    assert old not in told
    assert new not in told
    assert "gateway.no_keys" not in told


@pytest.mark.parametrize("name", ["", "a b", "a:b"])
def test_a_name_that_can_name_no_key(name: str) -> None:
    done = chains("key", name)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.match("error: .+ can't name a key", done.stderr)


def test_a_certificate_is_replaced_while_a_connection_is_open(start: Commands, tmp_path: Path) -> None:
    authority = trustme.CA()
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    file = tmp_path / "tls.pem"
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(file))
    server = start("run", HELLO, "--port", "0", variables={"CHAINS_TLS_CERTFILE": str(file)})
    url = server.ready()
    assert url.startswith("https://127.0.0.1:")
    with httpx.Client(verify=trust, timeout=30) as http:
        before = certificate(http, url)
        authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(file))
        server.send(signal.SIGHUP)
        server.logged("gateway.reloaded")
        assert certificate(http, url) == before, "it is the connection that was open"
        assert http.post(f"{url}/run_remote", json=BODY).status_code == 200
        with httpx.Client(verify=trust, timeout=30) as another:
            assert certificate(another, url) != before
    assert server.stop() == 0


def certificate(http: httpx.Client, url: str) -> bytes:
    with http.stream("GET", f"{url}/healthz") as response:
        response.read()
        session: Any = response.extensions["network_stream"].get_extra_info("ssl_object")
        found: bytes = session.getpeercert(True)
    return found


def test_a_certificate_that_is_none_is_one_clear_line(tmp_path: Path) -> None:
    done = chains("run", HELLO, "--port", "0", variables={"CHAINS_TLS_CERTFILE": str(tmp_path / "none.pem")})
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: CHAINS_TLS_CERTFILE: can't read .+none\.pem: No such file or directory\n", done.stderr)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_keys_without_a_secret_are_one_clear_line(workers: str) -> None:
    _, entry = new_key("ada")
    options = ("--port", "0", "--broker", "kafka://127.0.0.1:1", "--workers", workers)
    done = chains("gateway", HELLO, *options, variables={"CHAINS_API_KEYS": entry})
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch("error: CHAINS_SECRET is missing: .+\n", done.stderr)
