"""Request ids: where the answer lies in the log, sealed so that only whoever made the request can name it.

An id is 36 bytes in base64url: the kind of log, its partition, the offset before which no frame of the answer lies,
the correlation id, and a keyed hash of these and of the owner of the API key. Any gateway that has the same secret
reads the ids of the others, so that none of them holds what another needs.
"""

import base64
import binascii
import hashlib
import hmac
import re
import secrets
from typing import NamedTuple

from chains_stream.errors import ChainsUsageError
from chains_stream.settings import Settings

LENGTH = 48  # characters
PATTERN = re.compile(rf"[A-Za-z0-9_-]{{{LENGTH}}}")

_HASH_BYTES = 11  # an id that is made up is taken for one of ours once in 2**88 times
_KINDS = ("replies", "results")
_KIND_OF = {kind: bytes([number]) for number, kind in enumerate(_KINDS)}


class RequestId(NamedTuple):
    """What an id says: the topic `{namespace}.{kind}`, where to read in it, and for whose frames."""

    kind: str
    partition: int
    offset: int
    correlation_id: bytes


class Ids:
    """Makes and reads the ids of requests on one request topic."""

    def __init__(self, secret: bytes, topic: str) -> None:
        key = hashlib.sha256(b"request ids\0" + secret + b"\0" + topic.encode()).digest()
        self._keyed = hashlib.blake2b(key=key, digest_size=_HASH_BYTES)

    def mint(self, found: RequestId, owner: str) -> str:
        """Give the id of a request that the owner of a key, or nobody in particular, has made."""
        kind, partition, offset, correlation_id = found
        body = _KIND_OF[kind] + partition.to_bytes(2, "big") + offset.to_bytes(6, "big") + correlation_id
        return base64.urlsafe_b64encode(body + self._hash(body, owner)).decode()

    def read(self, text: str, owner: str) -> RequestId | None:
        """Read an id; None if it is none, or not one of this owner's."""
        if PATTERN.fullmatch(text) is None:
            return None
        try:
            data = base64.urlsafe_b64decode(text)
        except binascii.Error:
            return None
        body, given = data[:-_HASH_BYTES], data[-_HASH_BYTES:]
        if not hmac.compare_digest(given, self._hash(body, owner)):
            return None
        return RequestId(_KINDS[body[0]], int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:9], "big"), body[9:])

    def _hash(self, body: bytes, owner: str) -> bytes:
        keyed = self._keyed.copy()
        keyed.update(body + owner.encode())
        return keyed.digest()


def secret_of(settings: Settings) -> bytes:
    """Give the secret that the ids are sealed with. Raises ChainsUsageError where one has to be chosen."""
    if settings.secret is not None:
        return settings.secret.get_secret_value().encode()
    if settings.embedded:
        return secrets.token_bytes(32)  # the answers go with the process, and so may the ids
    if settings.api_keys is not None:
        raise ChainsUsageError(
            "CHAINS_SECRET is missing: gateways with API keys share a secret, which binds a request id to the key that "
            "made it (openssl rand -hex 32 makes one)"
        )
    # Without keys anybody may call, and read what has an id that can't be guessed: nothing is left to seal.
    return settings.namespace.encode()
