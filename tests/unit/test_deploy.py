"""What can be known of the image and the compose file without a container engine."""

import json
import os
import re
import shlex
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import trustme
import yaml

from chains_stream.chain import Chain
from chains_stream.cli import chains
from chains_stream.settings import Settings, from_environment

ROOT = Path(__file__).parents[2]
COMPOSE: Any = yaml.safe_load((ROOT / "deploy/compose/compose.yaml").read_text(encoding="utf-8"))
SERVICES: dict[str, Any] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if service["image"].startswith("chains-stream")}
WORKERS = {name: service for name, service in OURS.items() if service["command"][0] == "worker"}
CHAIN = "chainlets/summarize.py"

# The ids have a prefix, lest the one named kafka count as a test against a real Kafka.
every_service = pytest.mark.parametrize("service", SERVICES.values(), ids=[f"service-{name}" for name in SERVICES])
every_service_of_ours = pytest.mark.parametrize("service", OURS.values(), ids=OURS)


def dockerfile() -> list[tuple[str, str]]:
    """The instructions with their arguments, comments and line ends taken out."""
    text = (ROOT / "deploy/docker/Dockerfile").read_text(encoding="utf-8")
    lines = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", "").splitlines()
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines if line.strip())]


def last_stage() -> dict[str, str]:
    """The last instruction of each kind in the stage that becomes the image."""
    instructions = dockerfile()
    start = max(index for index, (name, _) in enumerate(instructions) if name == "FROM")
    return dict(instructions[start:])


def problems(document: Any) -> list[str]:
    schema = json.loads((Path(__file__).parent / "data/compose-spec.json").read_text(encoding="utf-8"))
    return [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(document)]


def test_the_compose_file_meets_the_compose_specification() -> None:
    assert problems(COMPOSE) == []
    misspelled = COMPOSE | {"services": {"gateway": {"image": "chains-stream:local", "comand": ["gateway"]}}}
    assert any("comand" in problem for problem in problems(misspelled))


def test_each_chainlet_of_the_chain_has_a_worker_service() -> None:
    names = Chain.load(str(ROOT / CHAIN)).names()
    served = [service["command"][service["command"].index("--chainlet") + 1] for service in WORKERS.values()]
    assert sorted(served) == sorted(names)


@every_service_of_ours
def test_a_command_is_one_that_the_command_line_takes(service: Any) -> None:
    name, file, *options = service["command"]
    assert file == CHAIN
    chains.commands[name].make_context(name, [file, *options])


@every_service_of_ours
def test_variables_are_settings(service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {name: value for name, value in service["environment"].items() if "$" not in value}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert {name.removeprefix("CHAINS_").lower() for name in service["environment"]} <= set(Settings.model_fields)
    settings = from_environment()
    assert settings.broker == "kafka://kafka:9092"
    assert settings.log_format == "json"
    assert seconds(service["stop_grace_period"]) > settings.grace_period
    assert (settings.health_port == 8081) == (service["command"][0] == "worker")


def test_the_gateway_takes_strangers_only_as_its_port_is_published_on_loopback() -> None:
    gateway = SERVICES["gateway"]
    assert gateway["environment"]["CHAINS_ALLOW_ANONYMOUS"] == "true"
    assert all(port.startswith("127.0.0.1:") for port in gateway["ports"])
    assert all("CHAINS_ALLOW_ANONYMOUS" not in service["environment"] for service in WORKERS.values())


@every_service
def test_a_service_is_bounded_and_has_no_privileges(service: Any) -> None:
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["restart"] == "unless-stopped"
    assert service["stop_grace_period"]
    assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory", "pids"}
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


@every_service_of_ours
def test_a_service_of_ours_waits_for_kafka_and_writes_only_to_tmpfs(service: Any) -> None:
    assert service["depends_on"] == {"kafka": {"condition": "service_healthy"}}
    assert "healthcheck" in SERVICES["kafka"]
    assert service["read_only"] is True
    assert service["tmpfs"] == ["/tmp"]
    assert (ROOT / "deploy/compose" / service["build"]["context"]).resolve() == ROOT
    assert (ROOT / service["build"]["dockerfile"]).is_file()


def test_images_are_pinned() -> None:
    arguments = [rest for name, rest in dockerfile() if name == "ARG"]
    base = next(rest.partition("=")[2] for rest in arguments if rest.startswith("PYTHON="))
    assert {rest.split()[0] for name, rest in dockerfile() if name == "FROM"} == {"${PYTHON}"}
    for image in [base, *(service["image"] for service in SERVICES.values())]:
        tag = image.rpartition(":")[2]
        assert "/" not in tag
        assert tag not in {"", "latest", image}
    assert re.fullmatch(r"python:\d+\.\d+\.\d+-slim-\w+", base)


def test_the_kafka_of_compose_is_the_kafka_of_the_tests() -> None:
    pom = (ROOT / "deploy/kafka/pom.xml").read_text(encoding="utf-8")
    [version] = re.findall(r"<kafka\.version>(.+)</kafka\.version>", pom)
    assert SERVICES["kafka"]["image"] == f"apache/kafka:{version}"


def test_the_image_runs_the_command_directly_and_not_as_root() -> None:
    image = last_stage()
    user, _, group = image["USER"].partition(":")
    # Numbers: Kubernetes can't tell from a name that it is not root's.
    assert int(user) > 0
    assert int(group) > 0
    # Without a shell in between, which would keep SIGTERM to itself.
    assert json.loads(image["ENTRYPOINT"]) == ["chains"]
    assert image["STOPSIGNAL"] == "SIGTERM"


def test_the_image_holds_runtime_dependencies_alone() -> None:
    installs = [rest for name, rest in dockerfile() if name == "RUN" and "pip" in rest]
    [into_image] = re.findall(r"install --no-deps --requirement (\S+)", " ".join(installs))
    assert into_image == "requirements-runtime.lock"
    runtime = set((ROOT / into_image).read_text(encoding="utf-8").split("\n"))
    everything = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert all(pin in everything for pin in runtime)
    assert not any(pin.startswith(("pytest", "mypy", "ruff")) for pin in runtime)
    assert any("PIP_NO_CACHE_DIR=1" in rest for name, rest in dockerfile() if name == "ENV")


def test_what_is_copied_into_the_image_reaches_the_build() -> None:
    ignored, *kept = (
        line
        for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    )
    assert ignored == "*"
    for name, rest in dockerfile():
        if name == "COPY" and "--from" not in rest:
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists()
                assert f"!{source}" in kept


@contextmanager
def answering(status: int, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """A server that answers /healthz with a status; gives its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/healthz" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield str(server.server_port)
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("variable", ["CHAINS_HEALTH_PORT", "CHAINS_PORT"])
@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False), (404, False)])
def test_the_health_check_asks_the_server_without_a_proxy(variable: str, status: int, *, healthy: bool) -> None:
    with answering(status) as port:
        assert health({variable: port, "http_proxy": "http://127.0.0.1:9"}) == healthy


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_the_health_check_speaks_tls_to_a_gateway_with_a_certificate(status: int, *, healthy: bool) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("gateway.example.org").configure_cert(context)
    with answering(status, context) as port:
        assert health({"CHAINS_PORT": port, "CHAINS_TLS_CERTFILE": "/run/secrets/tls.pem"}) == healthy
    with answering(status) as port:  # the probes of a worker have none
        assert health({"CHAINS_HEALTH_PORT": port, "CHAINS_TLS_CERTFILE": "/run/secrets/tls.pem"}) == healthy


def test_the_health_check_of_a_server_that_is_down_fails() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        assert not health({"CHAINS_PORT": str(closed.getsockname()[1])})


def health(variables: dict[str, str]) -> bool:
    flags, _, command = last_stage()["HEALTHCHECK"].partition("CMD ")
    assert "--interval=" in flags
    python, *arguments = json.loads(command)
    assert python == "python"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("CHAINS_")}
    done = subprocess.run(
        [sys.executable, *arguments], env=inherited | variables, capture_output=True, check=False, timeout=30
    )
    return done.returncode == 0


def seconds(duration: str) -> float:
    [number] = re.findall(r"^(\d+)s$", duration)
    return float(number)


def test_shell_commands_of_the_build_fail_as_a_whole() -> None:
    for name, rest in dockerfile():
        if name == "RUN":
            assert not {";", "|", "||"} & set(shlex.split(rest))
