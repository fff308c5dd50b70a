"""API keys: who may call, and under which name.

A gateway knows the SHA-256 of each key and nothing more. A slow hash would add nothing: keys are 32 random bytes, which
nobody finds by trying, and it would cost every request milliseconds.
"""

import base64
import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import NamedTuple, Self

from chains_stream.errors import ChainsUsageError
from chains_stream.gateway.problems import Refusal
from chains_stream.settings import Settings

PREFIX = "ck_"  # of a key, so that whoever finds one knows what it is
BYTES = 32  # of a key that are random

_FOUND_BY = 8  # bytes of a digest: an attacker who times the look-up learns at most these of a hash, and no key
_ENTRY = re.compile(r"(?P<name>[A-Za-z0-9._-]{1,64}):(?P<digest>[0-9A-Fa-f]{64})")
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_SCHEMES = (b"bearer", b"api-key")
_CHALLENGE = {"www-authenticate": "Bearer"}
_HOW = "as `authorization: Bearer KEY` or `x-api-key: KEY`"


class Entry(NamedTuple):
    """What a gateway knows of one key."""

    name: str
    digest: bytes

    def __str__(self) -> str:
        return f"{self.name}:{self.digest.hex()}"


class Keys:
    """The keys of a gateway. Several may have one name: so a new one is valid before the old one is taken away."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self._by_prefix: dict[bytes, list[Entry]] = {}
        for entry in entries:
            self._by_prefix.setdefault(entry.digest[:_FOUND_BY], []).append(entry)

    @classmethod
    def of(cls, settings: Settings) -> Self | None:
        """Give the keys that are configured, or None if none are. Raises ChainsUsageError."""
        if settings.api_keys is None:
            return None
        given = settings.api_keys.get_secret_value().strip()
        if given.startswith("@"):
            return cls(_entries_of_file(Path(given[1:])))
        entries = [
            _entry(text, f"entry {place}") for place, text in enumerate(re.split(r"[\s,]+", given.strip(", ")), 1)
        ]
        return cls(entries)

    def owner(self, headers: Mapping[bytes, bytes]) -> str:
        """Give the name of the key that a request presents. Raises Refusal."""
        presented = _presented(headers)
        for key in presented:
            digest = hashlib.sha256(key).digest()
            for entry in self._by_prefix.get(digest[:_FOUND_BY], ()):
                if hmac.compare_digest(entry.digest, digest):
                    return entry.name
        text = "the API key is not one of this gateway's" if presented else "this gateway asks for an API key"
        raise Refusal(HTTPStatus.UNAUTHORIZED, "unauthorized", f"{text}; send it {_HOW}", headers=_CHALLENGE)


def new_key(name: str) -> tuple[str, Entry]:
    """Make a key, and the entry by which a gateway knows it. Raises ChainsUsageError for a name that can't be one."""
    if not _NAME.fullmatch(name):
        raise ChainsUsageError(f"{name!r} can't name a key: 1 to 64 of A-Z, a-z, 0-9, `.`, `_` and `-` can")
    key = PREFIX + base64.urlsafe_b64encode(secrets.token_bytes(BYTES)).rstrip(b"=").decode()
    return key, Entry(name, hashlib.sha256(key.encode()).digest())


def _presented(headers: Mapping[bytes, bytes]) -> list[bytes]:
    """Give the keys in a request: clients of OpenAI's kind send one in `authorization` whether it is for us or not."""
    keys = []
    scheme, _, credential = headers.get(b"authorization", b"").partition(b" ")
    if credential and scheme.lower() in _SCHEMES:
        keys.append(credential.strip(b" "))
    if (key := headers.get(b"x-api-key")) is not None:
        keys.append(key)
    return keys


def _entries_of_file(path: Path) -> list[Entry]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ChainsUsageError(f"CHAINS_API_KEYS: can't read {path}: {reason}") from error
    numbered = [(number, line.partition("#")[0].strip()) for number, line in enumerate(lines, 1)]
    entries = [_entry(text, f"{path}:{number}") for number, text in numbered if text]
    if not entries:
        raise ChainsUsageError(f"CHAINS_API_KEYS: there is no key in {path} (`chains key NAME` makes one)")
    return entries


def _entry(text: str, where: str) -> Entry:
    found = _ENTRY.fullmatch(text)
    if found is None:  # what it is stays out of the message: it may be a key that was put in place of its hash
        raise ChainsUsageError(
            f"CHAINS_API_KEYS: {where} should be a name, a colon and a SHA-256 in hex (`chains key NAME` prints one)"
        )
    return Entry(found["name"], bytes.fromhex(found["digest"]))
