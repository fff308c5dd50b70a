"""What `chains call` prints on stdout."""

import sys

# JSON may hold these, and some readers of lines take them for the end of one; within JSON only strings have them.
_LINE_ENDS = (("\x85", r"\u0085"), ("\u2028", r"\u2028"), ("\u2029", r"\u2029"))


class Output:
    """Prints an answer as it comes, past whatever takes the place of `sys.stdout` later.

    Values are printed as JSON, a line each; text as it is if `raw`, and on a terminal where it is a chunk of a stream.
    """

    def __init__(self, *, raw: bool) -> None:
        self._to = sys.stdout.buffer
        self._raw = raw
        self._terminal = sys.stdout.isatty()
        self._line_is_open = False

    def result(self, json: bytes, value: object) -> None:
        """Print a result, given as JSON and, for text and bytes, as it is."""
        self._write(json, value if self._raw else None)

    def chunk(self, json: bytes, value: object) -> None:
        """Print a chunk of a stream, and have it seen at once."""
        self._write(json, value if self._raw or (self._terminal and isinstance(value, str)) else None)

    def end(self) -> None:
        """End the line that text left open on a terminal."""
        if self._terminal and self._line_is_open:
            self._put(b"\n")

    def _write(self, json: bytes, plain: object) -> None:
        match plain:
            case str():
                self._put(plain.encode())
            case bytes():
                self._put(plain)
            case _:
                self._put(one_line(json) + b"\n")

    def _put(self, data: bytes) -> None:
        if data:
            self._to.write(data)
            self._to.flush()
            self._line_is_open = not data.endswith(b"\n")


def one_line(json: bytes) -> bytes:
    if not json.isascii():
        for end, escaped in _LINE_ENDS:
            json = json.replace(end.encode(), escaped.encode())
    return json
