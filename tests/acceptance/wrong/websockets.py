# mypy: ignore-errors
# Wrong on purpose: a comment `# ! KIND Class.method` marks each line that a mistake is to be found at.
from collections.abc import AsyncIterator

import chains_stream as chains


class Below(chains.ChainletBase):
    async def run_remote(self, websocket: chains.WebSocketProtocol) -> None: ...


class Beside(chains.ChainletBase):
    async def run_remote(
        self,
        websocket: chains.WebSocketProtocol,
        name: str,  # ! WEBSOCKET Beside.run_remote
    ) -> None: ...


class Gives(chains.ChainletBase):
    async def run_remote(self, websocket: chains.WebSocketProtocol) -> str: ...  # ! WEBSOCKET Gives.run_remote


class Yields(chains.ChainletBase):
    async def run_remote(  # ! WEBSOCKET Yields.run_remote
        self, websocket: chains.WebSocketProtocol
    ) -> AsyncIterator[str]:  # ! WEBSOCKET Yields.run_remote
        yield await websocket.receive_text()


class Sync(chains.ChainletBase):
    def run_remote(self, websocket: chains.WebSocketProtocol) -> None: ...  # ! WEBSOCKET Sync.run_remote


class Maybe(chains.ChainletBase):
    async def run_remote(
        self,
        websocket: chains.WebSocketProtocol | None,  # ! UNSUPPORTED_TYPE Maybe.run_remote
    ) -> None: ...


class Default(chains.ChainletBase):
    async def run_remote(
        self,
        websocket: chains.WebSocketProtocol = None,  # ! WEBSOCKET Default.run_remote
    ) -> None: ...


@chains.mark_entrypoint
class Entrypoint(chains.ChainletBase):
    def __init__(self, below: Below = chains.depends(Below)) -> None:  # ! WEBSOCKET Entrypoint.__init__
        self._below = below

    async def run_remote(self, websocket: chains.WebSocketProtocol) -> None: ...
