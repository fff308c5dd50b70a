"""The claim-check store: a value that is too large for a record lies here, and the record says where.

An object is named `{namespace}/{hour}/{32 hex digits}`, under the store's URL. The hour, of Unix time, is that in which
it expires: so whole hours can be removed by whoever comes by, and nobody needs to know what became of a request.
"""

# ruff: noqa: PTH100, PTH102, PTH103, PTH112, PTH118, PTH123, PTH208
# Objects are reached through descriptors of their folders, which pathlib does not know, so that no link leads out.
import asyncio
import ipaddress
import os
import random
import re
import secrets
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import FileIO
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

from chains_stream.errors import (
    ChainsUsageError,
    RecordTooLargeError,
    StoredValueMissingError,
    StoreError,
)
from chains_stream.log import get_logger
from chains_stream.messages import DATAREF, Headers, now_ms
from chains_stream.settings import Settings

T = TypeVar("T")

HOUR_MS = 3_600_000
TRANSFER_SECONDS = 120.0  # for one value, there or back
SWEEP_SECONDS = 600.0  # between two looks for what has expired, on average
BATCH = 1000  # objects removed in one go
# Transfers at once. The name is that of the threads a command leaves behind when they are stuck: see `cli.process`.
THREADS, THREAD_NAME = 8, "chains-thread-store"

_HOUR = re.compile(r"[0-9]{6,9}", re.ASCII)  # hours since 1970: a folder ``2024`` is none of ours
_OBJECT = re.compile(r"[0-9a-f]{32}(\.part)?", re.ASCII)
_REFERENCE = re.compile(r"[0-9]{6,9}/[0-9a-f]{32}", re.ASCII)
_URL = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<rest>.*[^/].*)", re.ASCII)
_SHOWN = 200  # characters of a stranger's reference in a message

log = get_logger(__name__)


class Store:
    """Where large values are put and fetched. Started with the process's caller; sweeps what other processes left too.

    One that was not configured costs nothing until somebody on this machine uses it.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._place = place_of(settings)
        self._prefix = f"{self._place.url}/{settings.namespace}/" if self._place else ""
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix=THREAD_NAME)
        self._sweeper: asyncio.Task[None] | None = None
        self._closed = False

    async def start(self) -> None:
        """Check that a store which was configured can be used, and begin to sweep. Raises ChainsUsageError."""
        if self._place is not None and self._place.prepare():
            self._begin_to_sweep()

    async def close(self) -> None:
        """Stop; a transfer that is under way is given up."""
        self._closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def put_arguments(self, value: bytes) -> Headers:
        """Store the arguments of a request; give the header for its record. Raises what `put` does."""
        return ((DATAREF, (await self.put(value, self._settings.request_retention_ms)).encode()),)

    async def put_answer(self, value: bytes) -> Headers:
        """Store a result or a chunk; give the header for its record. Raises what `put` does."""
        return ((DATAREF, (await self.put(value, self._settings.reply_retention_ms)).encode()),)

    async def put(self, value: bytes, retention_ms: int) -> str:
        """Store a value for at least so long, and give the reference to it once it is safe.

        It is removed within two hours after that. Raises RecordTooLargeError, StoreError.
        """
        size, limit = len(value), self._settings.max_value_bytes
        if size > limit:
            raise RecordTooLargeError(f"a value of {size} bytes is over the limit of {limit} (CHAINS_MAX_VALUE_BYTES)")
        if self._place is None:
            raise RecordTooLargeError(
                f"a value of {size} bytes is over the limit of {self._settings.max_record_bytes} for a record, and "
                "there is no store for it: set CHAINS_STORE to a URL that all processes of the Chain reach"
            )
        # At least an hour: nobody removes a folder that is still written to.
        hour = (now_ms() + max(retention_ms, HOUR_MS)) // HOUR_MS
        name = secrets.token_hex(16)
        await self._run("write to", self._place.write, f"{self._settings.namespace}/{hour}", name, value)
        return f"{self._prefix}{hour}/{name}"

    async def get(self, reference: str) -> bytes:
        """Fetch a value. Raises StoredValueMissingError, or StoreError, also for a reference to anything else."""
        return await self._at(reference, lambda place: place.read)

    async def require(self, reference: str) -> None:
        """Look whether a value is there, without fetching it. Raises what `get` does."""
        await self._at(reference, lambda place: place.require)

    async def _at(self, reference: str, work: Callable[["Place"], Callable[[str, str, int], T]]) -> T:
        """Do something with the object that a reference names: its folder, its name, and the limit for its size."""
        shown = f"{reference[:_SHOWN]!r}"
        if self._place is None:
            raise StoreError(f"a value lies in a store, {shown}, and this process has none: set CHAINS_STORE")
        name = reference.removeprefix(self._prefix)
        if name == reference or _REFERENCE.fullmatch(name) is None:
            raise StoreError(f"{shown} is no value in this process's store, which is {self._prefix}")
        hour, _, name = name.partition("/")
        folder, limit = f"{self._settings.namespace}/{hour}", self._settings.max_value_bytes
        try:
            return await self._run("read from", work(self._place), folder, name, limit)
        except StoreError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise StoredValueMissingError(
                    f"a large value is not in the store (any more): {reference}; "
                    "it has expired, was removed, or was stored by a process that sees another store of that name"
                ) from None
            raise

    async def sweep(self, at_ms: int | None = None) -> int:
        """Remove what expired before the present hour, or that of `at_ms` (Unix time). Gives the number of objects.

        What can't be removed is logged, and left. Others may sweep at the same time. Raises StoreError.
        """
        if self._place is None:
            return 0
        present = (now_ms() if at_ms is None else at_ms) // HOUR_MS
        removed, failed = 0, list[str]()
        for namespace in await self._namespaces(self._place):
            for hour in await self._run("list", self._place.names, namespace):
                if _HOUR.fullmatch(hour) and int(hour) < present:
                    removed += await self._remove(self._place, f"{namespace}/{hour}", failed)
        if removed:
            log.info("store.swept", removed=removed, store=self._place.url)
        if failed:
            log.warning("store.unswept", reason=failed[0], failures=len(failed))
        return removed

    async def _namespaces(self, place: "Place") -> Sequence[str]:
        """Give the namespaces to sweep: all of them only where everything is ours."""
        return await self._run("list", place.names, "") if place.private else (self._settings.namespace,)

    async def _remove(self, place: "Place", folder: str, failed: list[str]) -> int:
        """Remove the objects of a folder, and it; note what failed, and go on."""
        removed = 0
        try:
            names = [name for name in await self._run("list", place.names, folder) if _OBJECT.fullmatch(name)]
        except StoreError as error:
            _note(failed, folder, error)
            return 0
        for batch in (names[start : start + BATCH] for start in range(0, len(names), BATCH)):
            try:
                await self._run("remove from", place.remove, folder, batch)
                removed += len(batch)
            except StoreError as error:
                _note(failed, folder, error)
        await self._run("remove from", place.remove_folder, folder)
        return removed

    async def _run(self, verb: str, work: Callable[..., T], *args: Any) -> T:
        """Do blocking work in a thread. Raises StoreError, with what it met as the cause."""
        if self._closed:
            raise StoreError("the store was closed")
        self._begin_to_sweep()
        limit = asyncio.timeout(TRANSFER_SECONDS)
        where = self._place.url if self._place else ""
        try:
            async with limit:
                return await asyncio.get_running_loop().run_in_executor(self._threads, work, *args)
        except StoreError:
            raise
        except Exception as error:  # a driver's errors are of any class
            said = f"no answer within {TRANSFER_SECONDS:g} s" if limit.expired() else _said(error)
            raise StoreError(f"can't {verb} the store {where}: {said}") from error

    def _begin_to_sweep(self) -> None:
        if self._sweeper is None:
            self._sweeper = asyncio.create_task(self._sweep_regularly(), name="sweep store")

    async def _sweep_regularly(self) -> None:
        while True:
            try:
                await self.sweep()
            except StoreError as error:
                log.warning("store.unswept", reason=str(error))
            # Processes that were started together need not sweep together.
            await asyncio.sleep(SWEEP_SECONDS * random.uniform(0.5, 1.5))  # noqa: S311 - spreads load, no secret


def _note(failed: list[str], folder: str, error: StoreError) -> None:
    if isinstance(error.__cause__, TimeoutError):
        raise error  # nor would it answer for the others, each of which would be waited for as long
    failed.append(f"{folder}: {error}")


def reference_in(headers: Headers) -> str | None:
    """Give the reference that a record carries instead of its value, as it was written."""
    for name, value in headers:
        if name == DATAREF and value is not None:
            return value.decode(errors="replace")
    return None


class Place(Protocol):
    """A tree of folders to keep objects in; `folder` is a path of names joined by ``/``. All methods block.

    Attributes:
        url: what references begin with.
        private: whether nobody else keeps anything there.
    """

    url: str
    private: bool

    def prepare(self) -> bool:
        """Check that it can be used, and tell whether it is there yet. Raises ChainsUsageError."""

    def write(self, folder: str, name: str, value: bytes) -> None:
        """Store an object, complete and for good."""

    def read(self, folder: str, name: str, limit: int) -> bytes:
        """Give an object's content. Raises FileNotFoundError, and StoreError for one larger than `limit`."""

    def require(self, folder: str, name: str, limit: int) -> None:
        """Raise what `read` would."""

    def names(self, folder: str) -> list[str]:
        """Give what is in a folder; nothing if it does not exist."""

    def remove(self, folder: str, names: Sequence[str]) -> None:
        """Remove objects, of which some may be gone. One that can't be removed must not keep the others there."""

    def remove_folder(self, folder: str) -> None:
        """Remove a folder, unless something is in it."""


def place_of(settings: Settings) -> Place | None:
    """Choose where large values go; None if there is no place that all processes reach. Raises ChainsUsageError."""
    url = settings.store
    if url is None:
        return _own_folder() if _is_here(settings.broker) else None
    found = _URL.fullmatch(url)
    scheme = found["scheme"] if found else ""
    if not url or "::" in url or ("://" in url and found is None):
        raise ChainsUsageError(f"the store's URL is `{url}`: write scheme://place, or the path of a folder")
    if found is None or scheme in ("file", "local"):
        if not _is_here(settings.broker):
            raise ChainsUsageError(
                f"the store {url} is a folder of this machine, and the broker {settings.broker} is not on it: "
                "set CHAINS_STORE to a URL that all processes of the Chain reach, such as s3://bucket/folder"
            )
        # Not resolved: it is part of references, and where a link leads may change.
        return _Folder(os.path.abspath(found["rest"] if found else url), private=False)
    if urlsplit(url).password is not None:
        raise ChainsUsageError(
            "credentials don't belong in the store's URL, which goes into records: "
            "set them as its fsspec driver reads them, such as AWS_ACCESS_KEY_ID or FSSPEC_S3_KEY"
        )
    if scheme == "memory" and not settings.embedded:
        raise ChainsUsageError(f"the store {url} lives in one process, and the broker {settings.broker} does not")
    return _Remote(scheme, url.rstrip("/"))


def _is_here(broker: str) -> bool:
    """Tell whether a broker, and so all that use it, are on this machine."""
    scheme, _, servers = broker.partition("://")
    return scheme == "memory" or all(_is_loopback(server) for server in servers.rstrip("/").split(","))


def _is_loopback(server: str) -> bool:
    host = urlsplit(f"//{server}").hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _own_folder() -> "_Folder":
    path = os.path.join(tempfile.gettempdir(), f"chains-stream-{os.geteuid()}")
    return _Folder(os.path.abspath(path), private=True)


class _Folder:
    """A folder of this machine. No link is followed below it; a private one has to be this user's alone."""

    def __init__(self, path: str, *, private: bool) -> None:
        self.url = f"file://{path}"
        self.private = private
        self._path = path

    def prepare(self) -> bool:
        if self.private:
            return os.path.isdir(self._path)  # made when it is first used
        try:
            os.makedirs(self._path, exist_ok=True)
        except OSError as error:
            raise ChainsUsageError(f"the store {self._path} can't be made: {_said(error)}") from None
        return True

    def write(self, folder: str, name: str, value: bytes) -> None:
        part = f"{name}.part"
        with self._entered(folder, create=True) as inside:
            descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666, dir_fd=inside)
            try:
                with open(descriptor, "wb") as file:
                    file.write(value)
                    file.flush()
                    os.fsync(descriptor)
                os.rename(part, name, src_dir_fd=inside, dst_dir_fd=inside)
            except BaseException:
                with suppress(OSError):
                    os.unlink(part, dir_fd=inside)
                raise
            os.fsync(inside)

    def read(self, folder: str, name: str, limit: int) -> bytes:
        with self._opened(folder, name, limit) as file:
            return file.readall()

    def require(self, folder: str, name: str, limit: int) -> None:
        with self._opened(folder, name, limit):
            pass

    def names(self, folder: str) -> list[str]:
        try:
            with self._entered(folder) as inside:
                return os.listdir(inside)
        except (FileNotFoundError, NotADirectoryError):
            return []

    def remove(self, folder: str, names: Sequence[str]) -> None:
        failed: OSError | None = None
        with suppress(FileNotFoundError), self._entered(folder) as inside:
            for name in names:
                try:
                    os.unlink(name, dir_fd=inside)
                except FileNotFoundError:
                    continue
                except OSError as error:
                    failed = error
        if failed is not None:
            raise failed

    def remove_folder(self, folder: str) -> None:
        above, _, name = folder.rpartition("/")
        # What another sweeper removed, and what somebody else keeps something in.
        with suppress(OSError), self._entered(above) as inside:
            os.rmdir(name, dir_fd=inside)

    @contextmanager
    def _opened(self, folder: str, name: str, limit: int) -> Iterator[FileIO]:
        with self._entered(folder) as inside:
            # Without waiting: for the writer of a pipe, which somebody may have put there.
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=inside)
            with open(descriptor, "rb", buffering=0) as file:
                found = os.fstat(descriptor)
                if not stat.S_ISREG(found.st_mode):
                    raise StoreError(f"{self.url}/{folder}/{name} is no file")
                if found.st_size > limit:
                    raise _oversized(f"{self.url}/{folder}/{name}", limit)
                yield file

    @contextmanager
    def _entered(self, folder: str, *, create: bool = False) -> Iterator[int]:
        """Open a folder, and give its descriptor."""
        inside = self._enter_root(create=create)
        try:
            for name in filter(None, folder.split("/")):
                if create:
                    _make(name, inside)
                below = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=inside)
                os.close(inside)
                inside = below
            yield inside
        finally:
            os.close(inside)

    def _enter_root(self, *, create: bool) -> int:
        if create and self.private:
            with suppress(FileExistsError):
                os.mkdir(self._path, 0o700)
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | (os.O_NOFOLLOW if self.private else 0)
        root = os.open(self._path, flags)
        found = os.fstat(root)
        if self.private and (found.st_uid != os.geteuid() or found.st_mode & 0o077):
            os.close(root)
            raise StoreError(
                f"{self._path} is not this user's alone (mode 0700), so no large value is kept there: "
                "remove it, or set CHAINS_STORE"
            )
        return root


def _make(name: str, inside: int) -> None:
    """Make a folder, for good, if there is none."""
    try:
        os.mkdir(name, dir_fd=inside)
    except FileExistsError:
        return
    os.fsync(inside)


class _Remote:
    """A place that fsspec reaches."""

    def __init__(self, scheme: str, url: str) -> None:
        self.url = url
        self.private = False
        self._scheme = scheme
        self._root = ""
        self._system: Any = None
        self._lock = threading.RLock()

    def prepare(self) -> bool:
        import fsspec  # only here and below: most processes have no store of this kind

        try:
            fsspec.get_filesystem_class(self._scheme)
        except ImportError as error:
            missing = getattr(error.__cause__ or error, "name", None)
            install = f"pip install {missing.partition('.')[0]}" if missing else _said(error)
            raise ChainsUsageError(f"the store {self.url} needs a driver of fsspec: {install}") from None
        except ValueError:
            raise ChainsUsageError(f"the store's URL is `{self.url}`: fsspec knows no {self._scheme}://") from None
        return True

    def write(self, folder: str, name: str, value: bytes) -> None:
        with self._opened() as system:
            path = f"{self._root}/{folder}/{name}"
            try:
                system.pipe_file(path, value)
            except FileNotFoundError:
                # There are folders, and they have to be made; but the store itself, a bucket above all, never is.
                if not system.exists(self._root):
                    raise
                system.makedirs(f"{self._root}/{folder}", exist_ok=True)
                system.pipe_file(path, value)

    def read(self, folder: str, name: str, limit: int) -> bytes:
        with self._opened() as system:
            # Asked for first: not every store takes a range that ends beyond the object.
            self.require(folder, name, limit)
            return bytes(system.cat_file(f"{self._root}/{folder}/{name}"))

    def require(self, folder: str, name: str, limit: int) -> None:
        with self._opened() as system:
            if (system.size(f"{self._root}/{folder}/{name}") or 0) > limit:
                raise _oversized(f"{self.url}/{folder}/{name}", limit)

    def names(self, folder: str) -> list[str]:
        with self._opened() as system:
            system.invalidate_cache()
            try:
                found = system.ls(f"{self._root}/{folder}", detail=False)
            except FileNotFoundError:
                return []
            return [str(path).rstrip("/").rpartition("/")[2] for path in found]

    def remove(self, folder: str, names: Sequence[str]) -> None:
        paths = [f"{self._root}/{folder}/{name}" for name in names]
        with self._opened() as system:
            try:
                system.rm(paths)
            except FileNotFoundError:  # another sweeper was faster with one of them
                for path in paths:
                    with suppress(FileNotFoundError):
                        system.rm_file(path)

    def remove_folder(self, folder: str) -> None:
        with self._opened() as system, suppress(OSError, NotImplementedError):
            system.rmdir(f"{self._root}/{folder}")  # an object store has no folders

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        """Give the file system; one at a time where the driver is not made for threads."""
        with self._lock:
            if self._system is None:
                import fsspec.core

                self._system, root = fsspec.core.url_to_fs(self.url)
                self._root = str(root).rstrip("/")
            if not self._system.async_impl:
                yield self._system
                return
        yield self._system


def _oversized(reference: str, limit: int) -> StoreError:
    return StoreError(f"{reference} is over the limit of {limit} bytes (CHAINS_MAX_VALUE_BYTES)")


def _said(error: BaseException) -> str:
    """Give an error's message on one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__
