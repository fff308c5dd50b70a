"""A Chain that talks: counts the words of a text while it is being written.

    chains run chainlets/websocket_count.py
    websocat ws://127.0.0.1:8000/websocket

Each message of text is added to what was sent before, and answered with JSON: how many words there are by now, and
which come most often. `?top=5` in the URL asks for five of them.
"""

import re
from collections import Counter

import chains_stream as chains

_WORD = re.compile(r"\w+")


class FindWords(chains.ChainletBase):
    """Takes a text, gives its words in lower case."""

    async def run_remote(self, text: str) -> list[str]:
        return _WORD.findall(text.lower())


@chains.mark_entrypoint
class CountWords(chains.ChainletBase):
    """Takes a WebSocket: texts come in, counts go out."""

    # Each open WebSocket takes one of these places, for as long as it is open.
    remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=64))

    def __init__(self, find_words: FindWords = chains.depends(FindWords, retries=3)) -> None:
        self._find_words = find_words

    async def run_remote(self, websocket: chains.WebSocketProtocol) -> None:
        try:
            top = int(websocket.query_params.get("top", "3"))
        except ValueError:
            await websocket.close(4400, "`top` should be a number")
            return
        counts: Counter[str] = Counter()
        async for text in websocket.iter_text():  # ends when the client leaves
            counts.update(await self._find_words.run_remote(text))
            await websocket.send_json({"words": counts.total(), "most": dict(counts.most_common(top))})
