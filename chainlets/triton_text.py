"""Text as it comes from a model, piece by piece: bytes made whole characters, pieces made new text, ended at a stop."""

import codecs
from collections.abc import Sequence


class Text:
    """What has come of an answer.

    `accumulated` says that each piece holds all that came before. `stops` end the answer, and are not part of it unless
    they are `included`: so what could be the beginning of one is held back until it is known.
    """

    def __init__(self, stops: Sequence[str] = (), *, accumulated: bool = False, included: bool = False) -> None:
        self.stopped = False
        self._stops = [stop for stop in stops if stop]
        self._accumulated = accumulated
        self._included = included
        # A character may come in parts, as a token is not always a whole one.
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._taken = 0  # bytes, of what is accumulated
        self._held = ""

    def take(self, piece: bytes) -> str:
        """Take the next piece; give what can be handed on."""
        if self._accumulated:
            piece, self._taken = piece[self._taken :], len(piece)
        return self._cut(self._held + self._characters.decode(piece))

    def end(self) -> str:
        """Give what was held back, now that no more comes."""
        if self.stopped:
            return ""
        rest = self._cut(self._held + self._characters.decode(b"", final=True))
        held, self._held = self._held, ""
        return rest + held

    def _cut(self, text: str) -> str:
        found = [(at, len(stop)) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            at, size = min(found)
            self.stopped, self._held = True, ""
            return text[: at + size] if self._included else text[:at]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Count the characters at the end of a text with which the stop begins."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
