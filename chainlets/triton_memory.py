"""Shared memory in which large tensors pass to a Triton on the same host and back, without going through its socket.

Regions are POSIX shared memory, registered with the server by name, and used again by later requests. A region is
locked by the process that made it for as long as that lives, so that whoever starts later can tell what a killed one
has left behind, and removes it. Where the server can't open our regions (another user, another container), tensors go
with the requests; one line in the log says so.
"""

import asyncio
import fcntl
import logging
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from chainlets.triton_tensors import Array, from_bytes

FOLDER = Path("/dev/shm")  # noqa: S108 - where Linux has POSIX shared memory
PREFIX = "chains-triton-"
SMALLEST = 1 << 16  # bytes; sizes are powers of two, so that a region fits later requests too
MAX_FREE_BYTES = 256 << 20  # in regions that wait for requests; more are given back
UNREGISTER_SECONDS = 60.0  # for a request that was given up to let go of its regions
CLOSE_SECONDS = 5.0

log = logging.getLogger(__name__)


class Region:
    """Shared memory of this process's own, under a name that the server is told."""

    def __init__(self, size: int) -> None:
        self.name = f"{PREFIX}{os.getpid()}-{uuid4().hex[:12]}"
        self.size = size
        self._path = FOLDER / self.name
        hidden = FOLDER / f".{self.name}"  # until it is locked: others take what isn't for a dead process's
        self._file = os.open(hidden, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            os.posix_fallocate(self._file, 0, size)  # or the process would die of writing where there is no room
            self._map = mmap.mmap(self._file, size)
            hidden.rename(self._path)
        except BaseException:
            os.close(self._file)
            hidden.unlink(missing_ok=True)
            raise

    def write(self, array: Array) -> None:
        self._map[: array.nbytes] = array.reshape(-1).view("u1").data

    def read(self, size: int, datatype: str, shape: tuple[int, ...]) -> Array:
        """Give a copy of the tensor in it."""
        return from_bytes(self._map[:size], datatype, shape)

    def unlink(self) -> None:
        """Give it up: the memory is free once the server has let go of it, too."""
        self._path.unlink(missing_ok=True)
        self._map.close()
        os.close(self._file)


class SharedMemory:
    """The regions of one connection to a server; `client` is tritonclient's."""

    def __init__(self, client: Any, headers: dict[str, str]) -> None:
        self._client = client
        self._headers = headers
        self._free: dict[int, list[Region]] = {}
        self._free_bytes = 0
        self._leaving: set[asyncio.Task[None]] = set()
        self._has_complained = False
        self.usable = False

    async def start(self, shown: str) -> None:
        """Find out whether the server can open our regions, and remove what killed processes have left."""
        if not FOLDER.is_dir():  # noqa: ASYNC240 - memory, as are its files
            log.info("no shared memory for %s: there is no %s; tensors go with the requests", shown, FOLDER)
            return
        stale = set(sweep())
        try:
            self.release([await self._made(SMALLEST)])
        except Exception as error:  # noqa: BLE001 - whatever the reason is, there is another way
            log.warning("no shared memory for %s: %s; tensors go with the requests", shown, error)
            return
        self.usable = True
        known = await self._client.get_system_shared_memory_status(headers=self._headers)
        for name in known.regions:
            if name in stale or (name.startswith(PREFIX) and not (FOLDER / name).exists()):
                await self._unregister(name)

    async def lease(self, size: int) -> Region | None:
        """Give a region of at least `size` bytes, for one request; None if there is no room for it.

        Raises what the server says.
        """
        rounded = max(SMALLEST, 1 << (size - 1).bit_length())
        if free := self._free.get(rounded):
            self._free_bytes -= rounded
            return free.pop()
        try:
            return await self._made(rounded)
        except OSError as error:
            if not self._has_complained:
                self._has_complained = True
                log.warning("no shared memory of %d bytes: %s; such tensors go with the requests", rounded, error)
            return None

    @contextmanager
    def held(self) -> Iterator[list[Region]]:
        """Hold the regions put into the list until the request is over.

        Ended in any way but well, the server may still write into them: then they are given up.
        """
        regions: list[Region] = []
        try:
            yield regions
        except BaseException:
            self._retire(regions)
            raise
        self.release(regions)

    def release(self, regions: list[Region]) -> None:
        for region in regions:
            if self._free_bytes + region.size <= MAX_FREE_BYTES:
                self._free_bytes += region.size
                self._free.setdefault(region.size, []).append(region)
            else:
                self._retire([region])

    def forget(self) -> None:
        """Give up the regions that wait: a server that was away may not know them any more."""
        free, self._free, self._free_bytes = self._free, {}, 0
        for regions in free.values():
            self._retire(regions)

    async def close(self) -> None:
        self.forget()
        if self._leaving:
            _, late = await asyncio.wait(self._leaving, timeout=CLOSE_SECONDS)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    async def _made(self, size: int) -> Region:
        region = Region(size)
        try:
            await self._client.register_system_shared_memory(
                region.name, f"/{region.name}", size, headers=self._headers, client_timeout=UNREGISTER_SECONDS
            )
        except BaseException:
            self._retire([region])  # it may be registered all the same
            raise
        return region

    def _retire(self, regions: list[Region]) -> None:
        for region in regions:
            region.unlink()
            task = asyncio.create_task(self._unregister(region.name), name=f"unregister {region.name}")
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)

    async def _unregister(self, name: str) -> None:
        """Have the server let go of a region; it refuses for as long as a request uses it."""
        delay, deadline = 0.02, asyncio.get_running_loop().time() + UNREGISTER_SECONDS
        while True:
            try:
                await self._client.unregister_system_shared_memory(
                    name, headers=self._headers, client_timeout=UNREGISTER_SECONDS
                )
            except Exception as error:  # noqa: BLE001 - logged, if it matters
                if "in use" not in str(error) or asyncio.get_running_loop().time() > deadline:
                    log.debug("the region %s is not unregistered: %s", name, error)
                    return
            else:
                return
            await asyncio.sleep(delay)
            delay = min(1.0, 2 * delay)


def sweep() -> Iterator[str]:
    """Remove the regions of processes that are gone, and give their names."""
    for path in [*FOLDER.glob(f"{PREFIX}*"), *FOLDER.glob(f".{PREFIX}*")]:
        with suppress(OSError):  # another one is at it too; or it is another user's
            file = os.open(path, os.O_RDWR)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                yield path.name
            finally:
                os.close(file)
