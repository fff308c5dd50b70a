"""The claim-check store: what is kept, for how long, and what is never opened."""

import asyncio
import os
import re
import secrets
import tempfile
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from chains_stream.errors import ChainsUsageError, RecordTooLargeError, StoredValueMissingError, StoreError
from chains_stream.messages import DATAREF, now_ms
from chains_stream.settings import Settings
from chains_stream.store import HOUR_MS, Store, place_of, reference_in

Opened = Callable[..., Awaitable[Store]]

ELSEWHERE = "kafka://broker.example.com:9092"
HERE = "kafka://127.0.0.1:9092,localhost:9093,[::1]:9094"


class Drive(LocalFileSystem):  # type: ignore[misc] # fsspec ships no types
    """Stands for a file system of fsspec whose folders have to be made before they are written to."""

    protocol = "drive"

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(str(path).removeprefix("drive://"))


class Stuck(Drive):
    """Writes nothing until it is let go."""

    protocol = "stuck"
    go = threading.Event()

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(str(path).removeprefix("stuck://"))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        self.go.wait()
        super().pipe_file(path, value, mode, **options)


fsspec.register_implementation("drive", Drive, clobber=True)
fsspec.register_implementation("stuck", Stuck, clobber=True)


@pytest.fixture(params=["folder", "drive", "memory"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    """One of each kind, with nothing in it."""
    url = {
        "folder": str(tmp_path / "store"),
        "drive": f"drive://{tmp_path}/store",
        "memory": f"memory://{secrets.token_hex(8)}",
    }[request.param]
    (tmp_path / "store").mkdir()
    opened = Store(Settings.of(store=url, namespace="ours"))
    await opened.start()
    yield opened
    await opened.close()


def content(folder: Path) -> list[Path]:
    return list(folder.iterdir())


@pytest.fixture
async def opened() -> AsyncIterator[Opened]:
    """Opens stores for a test, and closes them after it."""
    stores: list[Store] = []

    async def open_one(**settings: Any) -> Store:
        stores.append(Store(Settings.of(**settings)))
        await stores[-1].start()
        return stores[-1]

    yield open_one
    for one in stores:
        await one.close()


async def test_a_value_comes_back(store: Store) -> None:
    value = os.urandom(5_000_000)
    assert await store.get(await store.put(value, 1000)) == value
    assert await store.get(await store.put(b"small", 1000)) == b"small"


async def test_whether_a_value_is_there(store: Store) -> None:
    reference = await store.put(b"value", 1)
    await store.require(reference)
    await store.sweep(now_ms() + 3 * HOUR_MS)
    with pytest.raises(StoredValueMissingError, match=re.escape(reference)):
        await store.require(reference)
    with pytest.raises(StoreError, match="is no value in this process's store"):
        await store.require("file:///etc/passwd")


async def test_many_at_once(store: Store) -> None:
    values = [os.urandom(10_000) for _ in range(100)]
    references = await asyncio.gather(*(store.put(value, HOUR_MS) for value in values))
    assert len(set(references)) == 100
    assert await asyncio.gather(*map(store.get, references)) == values


async def test_the_name_tells_when_it_expires(opened: Opened, tmp_path: Path) -> None:
    store = await opened(store=f"file://{tmp_path}/deep/down/", namespace="ours")
    before = (now_ms() + 5 * HOUR_MS) // HOUR_MS
    reference = await store.put(b"value", 5 * HOUR_MS)
    found = re.fullmatch(rf"file://{tmp_path}/deep/down/ours/([0-9]+)/([0-9a-f]{{32}})", reference)
    assert found, reference
    assert int(found[1]) in (before, before + 1)
    assert (tmp_path / "deep/down/ours" / found[1] / found[2]).read_bytes() == b"value"


@pytest.mark.parametrize(
    ("method", "hours"), [("put_arguments", 168), ("put_answer", 2)], ids=["of requests", "of replies"]
)
async def test_the_retention_is_that_of_the_topic(opened: Opened, tmp_path: Path, method: str, hours: int) -> None:
    store = await opened(store=str(tmp_path), reply_retention_ms=2 * HOUR_MS)
    headers = await getattr(store, method)(b"value")
    reference = reference_in(headers)
    assert reference is not None
    assert await store.get(reference) == b"value"
    assert int(reference.split("/")[-2]) - now_ms() // HOUR_MS in (hours - 1, hours)


async def test_what_expired_is_removed_and_nothing_else(store: Store) -> None:
    now = now_ms()
    short, long = await store.put(b"short", 1), await store.put(b"long", 5 * HOUR_MS)
    assert await store.sweep() == 0, "a value lives for an hour at least"
    assert await store.get(short) == b"short"
    assert await store.sweep(now + 3 * HOUR_MS) == 1
    assert await store.get(long) == b"long"
    with pytest.raises(StoredValueMissingError, match=re.escape(short)):
        await store.get(short)
    assert await store.sweep(now + 8 * HOUR_MS) == 1
    assert await store.sweep(now + 8 * HOUR_MS) == 0


async def test_sweepers_do_not_disturb_each_other(store: Store) -> None:
    now = now_ms()
    await asyncio.gather(*(store.put(b"%d" % number, 1) for number in range(300)))
    removed = await asyncio.gather(*(store.sweep(now + 3 * HOUR_MS) for _ in range(6)))
    assert sum(removed) >= 300
    assert await store.sweep(now + 3 * HOUR_MS) == 0
    assert await store.get(await store.put(b"next", 1)) == b"next"


async def test_a_sweep_leaves_what_others_keep_there(opened: Opened, tmp_path: Path) -> None:
    store = await opened(store=str(tmp_path), namespace="ours")
    await store.put(b"value", 1)
    kept = ["theirs/400000/" + "0" * 32, "ours/2024/" + "0" * 32, "ours/400000/report.txt", "ours/400001"]
    for name in kept:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    part = tmp_path / "ours/400000" / ("1" * 32 + ".part")  # of a writer that was killed
    part.touch()
    assert await store.sweep(now_ms() + 3 * HOUR_MS) >= 1
    assert not part.exists()
    assert all((tmp_path / name).exists() for name in kept)


async def test_what_can_t_be_removed_keeps_nothing_else(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A sweep tells of it once, however much there is."""
    monkeypatch.setattr("chains_stream.store.BATCH", 2)
    store = await opened(store=str(tmp_path), namespace="ours")
    hours = [tmp_path / f"ours/{400000 + number}" for number in range(9)]
    odd = [hour / ("0" * 32) for hour in hours[2:7]]
    for hour in hours:
        hour.mkdir(parents=True, exist_ok=True)
        for number in range(1, 6):
            (hour / f"{number:032x}").touch()
    for folder in odd:
        folder.mkdir()
    caplog.clear()
    with caplog.at_level("WARNING"):  # whatever a test of the command line has set
        await store.sweep()
    assert sorted(content(tmp_path / "ours")) == hours[2:7]
    assert [path for hour in hours[2:7] for path in content(hour)] == odd
    told = [record.getMessage() for record in caplog.records if "unswept" in record.getMessage()]
    assert 1 <= len(told) <= 2, "the store sweeps by itself too"
    assert "Is a directory" in told[0]


@pytest.mark.parametrize("configured", [True, False])
async def test_a_process_sweeps_what_others_left_when_it_starts(
    opened: Opened, temporary: Path, *, configured: bool
) -> None:
    root = temporary / ("store" if configured else f"chains-stream-{os.geteuid()}")
    old = root / "ours/400000" / ("0" * 32)
    root.mkdir(mode=0o700)
    old.parent.mkdir(parents=True)
    old.touch()
    await opened(store=str(root) if configured else None, namespace="ours")
    async with asyncio.timeout(10):
        while old.parent.exists():  # noqa: ASYNC110 - another process's files tell nobody that they went
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "/etc/passwd",
        "file:///etc/passwd",
        "{prefix}../../../etc/passwd",
        "{prefix}490000/../../secret",
        "{prefix}490000/" + "0" * 31 + "/",
        "{prefix}490000/" + "0" * 32 + "\n",
        "{prefix}490000/" + "A" * 32,
        "{prefix}٤٩٠٠٠٠/" + "0" * 32,
        "{prefix}{prefix}490000/" + "0" * 32,
        "{root}/theirs/490000/" + "0" * 32,
        "{root}490000/" + "0" * 32,
        "http://example.com/490000/" + "0" * 32,
        "490000/" + "0" * 32,
    ],
)
async def test_only_references_into_the_store_are_opened(opened: Opened, tmp_path: Path, wrong: str) -> None:
    store = await opened(store=str(tmp_path / "store"), namespace="ours")
    (tmp_path / "secret").write_bytes(b"secret")
    root = f"file://{tmp_path}/store"
    with pytest.raises(StoreError, match="is no value in this process's store") as caught:
        await store.get(wrong.format(root=root, prefix=f"{root}/ours/"))
    assert "\n" not in str(caught.value)
    assert type(caught.value) is StoreError


async def test_a_very_long_reference_is_not_repeated_in_full(opened: Opened, tmp_path: Path) -> None:
    store = await opened(store=str(tmp_path))
    with pytest.raises(StoreError) as caught:
        await store.get("x" * 100_000)
    assert len(str(caught.value)) < 1000


async def test_links_are_not_followed(opened: Opened, tmp_path: Path) -> None:
    secret, name = tmp_path / "secret", "0" * 32
    (secret / "490000").mkdir(parents=True)
    (secret / "490000" / name).write_bytes(b"secret")
    store = await opened(store=str(tmp_path / "store"), namespace="ours")
    prefix = f"file://{tmp_path}/store/ours"
    ours = tmp_path / "store" / "ours"

    ours.symlink_to(secret)
    with pytest.raises(StoreError, match="can't read from the store"):
        await store.get(f"{prefix}/490000/{name}")
    with pytest.raises(StoreError, match="can't write to the store"):
        await store.put(b"value", 1)
    await store.sweep(2**60)
    ours.unlink()

    ours.mkdir()
    (ours / "490000").symlink_to(secret / "490000")
    with pytest.raises(StoreError, match="can't read from the store"):
        await store.get(f"{prefix}/490000/{name}")
    await store.sweep(2**60)
    (ours / "490000").unlink()

    (ours / "490000").mkdir()
    (ours / "490000" / name).symlink_to(secret / "490000" / name)
    with pytest.raises(StoreError, match="can't read from the store"):
        await store.get(f"{prefix}/490000/{name}")
    assert (secret / "490000" / name).read_bytes() == b"secret"


async def test_a_pipe_in_the_store_makes_nobody_wait(opened: Opened, tmp_path: Path) -> None:
    store = await opened(store=str(tmp_path), namespace="ours")
    (tmp_path / "ours/490000").mkdir(parents=True)
    os.mkfifo(tmp_path / "ours/490000" / ("0" * 32))
    async with asyncio.timeout(10):
        with pytest.raises(StoreError, match="is no file"):
            await store.get(f"file://{tmp_path}/ours/490000/{'0' * 32}")


@pytest.mark.parametrize("scheme", ["file", "drive"])
async def test_sizes_are_limited_both_ways(opened: Opened, tmp_path: Path, scheme: str) -> None:
    url = f"{scheme}://{tmp_path}"
    with pytest.raises(RecordTooLargeError, match=r"101 bytes is over the limit of 100 \(CHAINS_MAX_VALUE_BYTES\)"):
        await (await opened(store=url, max_value_bytes=100)).put(bytes(101), 1)
    generous, strict = await opened(store=url), await opened(store=url, max_value_bytes=100)
    reference = await generous.put(bytes(101), 1)
    with pytest.raises(StoreError, match="over the limit of 100 bytes"):
        await strict.get(reference)


async def test_a_slow_store_holds_nothing_else_up(opened: Opened, tmp_path: Path) -> None:
    Stuck.go.clear()
    store = await opened(store=f"stuck://{tmp_path}")
    putting = asyncio.ensure_future(store.put(b"value", 1))
    assert await asyncio.wait([putting], timeout=0.1) == (set(), {putting})
    Stuck.go.set()
    assert await store.get(await putting) == b"value"


async def test_a_store_that_does_not_answer_is_an_error(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chains_stream.store.TRANSFER_SECONDS", 0.05)
    Stuck.go.clear()
    store = await opened(store=f"stuck://{tmp_path}")
    try:
        with pytest.raises(StoreError, match=r"no answer within 0\.05 s"):
            await store.put(b"value", 1)
    finally:
        Stuck.go.set()


async def test_a_closed_store_says_so(store: Store) -> None:
    reference = await store.put(b"value", 1)
    await store.close()
    with pytest.raises(StoreError, match="closed"):
        await store.get(reference)


@pytest.mark.parametrize("scheme", ["file", "drive"])
async def test_a_store_that_went_away_is_an_error_of_its_own(opened: Opened, tmp_path: Path, scheme: str) -> None:
    (tmp_path / "store").mkdir()
    store = await opened(store=f"{scheme}://{tmp_path}/store")
    (tmp_path / "store").rmdir()
    with pytest.raises(StoreError, match=rf"can't write to the store {scheme}://.*: No such file") as caught:
        await store.put(b"value", 1)
    assert type(caught.value) is StoreError


# --- which store


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for temporary files of the test's own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("broker", ["memory://", HERE])
async def test_by_default_a_folder_of_this_user_alone(opened: Opened, temporary: Path, broker: str) -> None:
    store = await opened(broker=broker)
    assert content(temporary) == [], "nothing is made before it is used"
    reference = await store.put(b"value", 1)
    assert await store.get(reference) == b"value"
    (root,) = content(temporary)
    assert root.stat().st_mode & 0o777 == 0o700


async def test_the_default_folder_is_swept_in_all_namespaces(opened: Opened, temporary: Path) -> None:
    gone, store = await opened(namespace="gone"), await opened(namespace="ours")
    await gone.put(b"value", 1)
    assert await store.sweep(now_ms() + 3 * HOUR_MS) == 1


async def test_a_default_folder_that_is_open_to_others_is_refused(opened: Opened, temporary: Path) -> None:
    (temporary / f"chains-stream-{os.geteuid()}").mkdir(mode=0o755)
    store = await opened()
    with pytest.raises(StoreError, match=r"not this user's alone \(mode 0700\).*CHAINS_STORE"):
        await store.put(b"value", 1)


async def test_a_default_folder_of_somebody_else_is_refused(
    opened: Opened, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (temporary / "chains-stream-54321").mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    store = await opened()
    with pytest.raises(StoreError, match="not this user's alone"):
        await store.put(b"value", 1)


async def test_a_default_folder_behind_a_link_is_refused(opened: Opened, temporary: Path) -> None:
    (temporary / "other").mkdir(mode=0o700)
    (temporary / f"chains-stream-{os.geteuid()}").symlink_to(temporary / "other")
    store = await opened()
    with pytest.raises(StoreError, match="can't write to the store"):
        await store.put(b"value", 1)


async def test_with_a_broker_elsewhere_there_is_no_store_by_default(opened: Opened) -> None:
    store = await opened(broker=f"{HERE},broker.example.com:9092", max_record_bytes=100)
    with pytest.raises(RecordTooLargeError, match=r"101 bytes is over the limit of 100 for a record.*CHAINS_STORE"):
        await store.put(bytes(101), 1)
    with pytest.raises(StoreError, match="CHAINS_STORE"):
        await store.get("file:///x/490000/" + "0" * 32)
    assert await store.sweep() == 0


@pytest.mark.parametrize(
    ("url", "broker", "message"),
    [
        ("/data/store", ELSEWHERE, "is a folder of this machine"),
        ("file:///data/store", ELSEWHERE, "is a folder of this machine"),
        ("local:///data/store", ELSEWHERE, "is a folder of this machine"),
        ("memory://store", HERE, "lives in one process"),
        ("", "memory://", "the store's URL is ``"),
        ("s3://", "memory://", "the store's URL is `s3://`"),
        ("simplecache::s3://bucket", "memory://", "the store's URL is"),
        ("sftp://me:secret@host/folder", ELSEWHERE, "credentials don't belong"),
    ],
)
def test_a_store_that_can_not_work_is_refused(url: str, broker: str, message: str) -> None:
    with pytest.raises(ChainsUsageError, match=re.escape(message)) as caught:
        place_of(Settings.of(store=url, broker=broker))
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("oss://bucket/folder", "pip install ossfs"),
        ("sftp://host/folder", "pip install paramiko"),
        ("s4://bucket/folder", "fsspec knows no s4://"),
        ("/proc/store", "can't be made"),
    ],
)
async def test_what_is_missing_is_named_at_the_start(opened: Opened, url: str, message: str) -> None:
    with pytest.raises(ChainsUsageError, match=re.escape(message)) as caught:
        await opened(store=url)
    assert "\n" not in str(caught.value)


def test_the_reference_in_the_headers() -> None:
    assert reference_in(()) is None
    assert reference_in(((DATAREF, b"x\xff"),)) == "x\ufffd"
