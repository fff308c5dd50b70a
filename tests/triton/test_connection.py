"""The way to a server: one that starts late, restarts, is full, fails, asks for certificates or for a header."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trustme
from tritonclient.grpc.aio import InferenceServerClient

import chains_stream as chains
from chainlets.triton_engine import (
    Sampling,
    TritonConfig,
    TritonError,
    TritonRefusedError,
    TritonTextConfig,
    TritonUnavailableError,
)
from tests.triton.chainlets import Double, Fail, Generate, Scale
from tests.triton.server import Notes, Server, server, until

pytestmark = pytest.mark.usefixtures("notes_folder")

ONES = np.ones((1024, 1024), np.float32)


# --- a server that fails


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize(
    ("how", "kind", "said"),
    [
        ("INVALID_ARG", chains.InvalidArgumentError, "told to be INVALID_ARG"),
        ("INTERNAL", TritonError, "told to be INTERNAL"),
        ("NOT_FOUND", TritonRefusedError, "told to be NOT_FOUND"),
        ("UNSUPPORTED", TritonRefusedError, "told to be UNSUPPORTED"),
        ("CANCELLED", TritonError, "told to be CANCELLED"),
        ("raise", TritonError, "the weights are gone"),
    ],
)
async def test_an_error_of_the_model_is_typed_and_has_its_words(
    how: str, kind: type[chains.ChainsError], said: str
) -> None:
    async with chains.run_chain(Fail) as chain:
        with pytest.raises(kind, match=rf"model `failing` at grpc://[^:]*:\d+: (?s:.*){said}") as caught:
            await chain.run_remote(how)
    assert type(caught.value) is kind


@pytest.mark.usefixtures("triton")
async def test_a_model_that_says_unavailable_is_asked_again() -> None:
    class Few(Fail):
        config = Fail.config.model_copy(update={"retries": 3, "backoff": 0.1})

    async with Few() as model:
        began = time.monotonic()
        with pytest.raises(TritonUnavailableError, match="told to be UNAVAILABLE"):
            await model.infer({"how": "UNAVAILABLE"})
        assert time.monotonic() - began > 0.05 + 0.1  # two waits, of half the time at least


# --- a server that is not there


async def test_a_server_that_never_comes_is_an_error_that_says_so(unused: Server) -> None:
    class Absent(Double):
        config = TritonConfig(url=unused.url, model="doubling", start_timeout=0.5)

    with pytest.raises(TritonUnavailableError, match=r"model `doubling` at .*(?s:.*)\(waited 0.5 s\)"):
        async with Absent():
            pass


@pytest.fixture
def unused(installed: None) -> Server:
    return Server("model-control-mode=explicit", "load-model=doubling")


async def test_a_chainlet_waits_for_its_server_and_outlives_a_restart(unused: Server) -> None:
    class Here(Double):
        config = TritonConfig(url=unused.url, model="doubling", retries=20)

    model = Here()
    entering = asyncio.create_task(model.__aenter__())
    try:
        await asyncio.to_thread(unused.start)
        async with asyncio.timeout(20):
            await entering
        assert (await model.infer({"x": ONES}))["y"].max() == 2
        assert await model.is_healthy()
        unused.kill()
        assert not await model.is_healthy()
        waiting = asyncio.create_task(model.infer({"x": ONES}))
        await asyncio.to_thread(unused.start)
        assert (await waiting)["y"].max() == 2
        await until(model.is_healthy)
        # Its shared memory is new, too: the server knew nothing of what was registered before.
        assert (await model.infer({"x": ONES}))["y"].max() == 2
    finally:
        entering.cancel()
        await model.__aexit__(None, None, None)
        unused.clean()


async def test_a_stream_is_tried_again_only_while_nothing_has_come(notes_folder: None, key: str) -> None:
    own = Server("model-control-mode=explicit", "load-model=tensorrt_llm_bls")

    class Here(Generate):
        config = TritonTextConfig(url=own.url, model="tensorrt_llm_bls", retries=20)

    own.start()
    try:
        async with Here() as model:
            prompt = f"slowly endless key={key}"
            stream = model.run_remote(prompt, Sampling(max_tokens=10_000))
            assert await anext(stream) == " slowly"
            own.kill()
            with pytest.raises(chains.StreamInterruptedError) as caught:
                async for _ in stream:
                    pass
            assert caught.value.chunks is not None
            assert caught.value.chunks >= 1
            waiting = asyncio.create_task(_collected(model.run_remote("one two")))
            await asyncio.to_thread(own.start)
            assert await waiting == [" one", " two"]
            assert Notes(key).lines.count("ended") == 0
    finally:
        own.clean()


async def _collected(stream: AsyncIterator[str]) -> list[str]:
    return [piece async for piece in stream]


async def test_health_is_that_of_the_model_too(notes_folder: None) -> None:
    with server("doubling") as own:

        class Here(Double):
            config = TritonConfig(url=own.url, model="doubling")

        async with Here() as model, InferenceServerClient(own.url.partition("//")[2]) as client:
            assert await model.is_healthy()
            await client.unload_model("doubling")

            async def is_red() -> bool:
                return not await model.is_healthy()

            await until(is_red)
            await client.load_model("doubling")
            await until(model.is_healthy)


# --- a server that asks who we are


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Make the certificates of a server and of a client, and those of somebody else."""
    folder = tmp_path_factory.mktemp("certificates")
    ours, theirs = trustme.CA(), trustme.CA()
    ours.cert_pem.write_to_path(folder / "roots.pem")
    theirs.cert_pem.write_to_path(folder / "others.pem")
    for name in ("server", "client"):
        made = ours.issue_cert("127.0.0.1" if name == "server" else "client@chains.test")
        made.private_key_pem.write_to_path(folder / f"{name}.key")
        for blob in made.cert_chain_pems:
            blob.write_to_path(folder / f"{name}.pem", append=True)
    return folder


@pytest.fixture(scope="module")
def guarded(notes_folder: None, authority: Path) -> Iterator[str]:
    """Run a server that takes clients with a certificate alone, and inferences with a header alone."""
    config = [
        "grpc-use-ssl-mutual=true",
        f"grpc-server-cert={authority / 'server.pem'}",
        f"grpc-server-key={authority / 'server.key'}",
        f"grpc-root-cert={authority / 'roots.pem'}",
        "grpc-restricted-protocol=inference:team-key=open sesame",
    ]
    with server("batched", *config) as started:
        yield started.url.replace("grpc:", "grpcs:")


def secured(url: str, folder: Path, **changes: Any) -> type[Scale]:
    given = {
        "url": url,
        "model": "batched",
        "root_certificates": folder / "roots.pem",
        "private_key": folder / "client.key",
        "certificate_chain": folder / "client.pem",
        "headers": {"triton-grpc-protocol-team-key": "open sesame"},
        "start_timeout": 1.0,
    }

    class Secured(Scale):
        config = TritonConfig.model_validate(given | changes)

    return Secured


CERTIFICATES = ("root_certificates", "private_key", "certificate_chain")
VALUES = {"VALUES": [1.0, 2.0, 3.0], "FACTOR": 2.0}


async def test_tls_with_certificates_on_both_sides(guarded: str, authority: Path) -> None:
    async with secured(guarded, authority)() as model:
        assert (await model.infer(VALUES))["SCALED"].tolist() == [2, 4, 6]


@pytest.mark.parametrize(
    "changes",
    [
        {"root_certificates": "others.pem"},
        {"private_key": None, "certificate_chain": None},
        dict.fromkeys(CERTIFICATES),
    ],
    ids=["a server that is not trusted", "no certificate of one's own", "no TLS"],
)
async def test_without_the_certificates_there_is_no_connection(
    guarded: str, authority: Path, changes: dict[str, Any]
) -> None:
    url = guarded if "root_certificates" not in changes or changes["root_certificates"] else guarded.replace("s:", ":")
    given = {name: authority / value if isinstance(value, str) else value for name, value in changes.items()}
    with pytest.raises(TritonUnavailableError, match=r"\(waited 1 s\)"):
        async with secured(url, authority, **given)():
            pass


async def test_a_missing_header_is_no_reason_to_try_again(guarded: str, authority: Path) -> None:
    async with secured(guarded, authority, headers={})() as model:
        with pytest.raises(TritonRefusedError, match="protocol is restricted"):
            await model.infer(VALUES)


async def test_files_that_are_not_there_are_named(authority: Path) -> None:
    wrong = secured("grpcs://127.0.0.1:1", authority, root_certificates="/no/such.pem")
    with pytest.raises(chains.ChainsUsageError, match=r"can't read /no/such\.pem: No such file"):
        async with wrong():
            pass
    with pytest.raises(chains.ChainsUsageError, match=r"can't read /no/such\.token: No such file"):
        async with secured("grpcs://127.0.0.1:1", authority, token_file="/no/such.token")():
            pass


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"url": "localhost"}, "grpc://host:port"),
        ({"url": "ftp://localhost:8001"}, "grpc://host:port"),
        ({"url": "grpc://localhost:8001/path"}, "grpc://host:port"),
        ({"root_certificates": "x"}, "begin the url with grpcs://"),
        ({"private_key": "x", "url": "grpcs://h:1"}, "private_key and certificate_chain go together"),
        ({"model_version": "latest"}, "model_version"),
        ({"modle": "x"}, "modle"),
    ],
)
def test_a_wrong_setting_is_told(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TritonConfig.model_validate(fields)
