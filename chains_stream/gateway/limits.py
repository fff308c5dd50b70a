"""What a gateway takes on, at once and over time. What goes beyond is turned away with 429, before it is read."""

import hashlib
import ipaddress
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Literal, Never

from chains_stream import metrics
from chains_stream.errors import OverloadedError
from chains_stream.gateway.problems import RETRY_AFTER
from chains_stream.settings import Settings

CREDENTIALS = (b"authorization", b"x-api-key")  # headers that say whose a request is; the first one there counts

MAX_CALLERS = 10_000  # whose rates are remembered; of more, those that were away for longest begin anew

_Reason = Literal["requests", "key", "bytes", "rate"]
_SHED = {reason: metrics.SHED.labels(reason) for reason in ("requests", "key", "bytes", "rate")}


class Limits:
    """Requests in flight, in all and of one key, and the bytes of bodies and of results.

    Bodies count as far as they are here, until they are published; large results while they are written, until the
    client has taken them.

    A key is the name of an API key, where there are any. Without, it is the credential that a request presents, a good
    one or not; those without share one. As nothing checks it then, the limit of a key keeps honest clients from each
    other: whoever invents a credential for each request has a key for each.
    """

    def __init__(self, settings: Settings) -> None:
        self._max_requests = settings.max_requests
        self._max_per_key = settings.max_requests_per_key
        # At least one body of the size that is allowed: a smaller limit would turn it away for ever.
        self._max_bytes = max(settings.max_buffered_bytes, settings.max_body_bytes)
        self._requests = 0
        self._bytes = 0
        self._by_key: dict[bytes, int] = {}

    def enter(self, headers: Mapping[bytes, bytes], owner: str = "") -> "Place":
        """Give a request its place; whoever asked leaves it. `owner` names its API key. Raises OverloadedError."""
        if self._requests >= self._max_requests:
            _shed(
                "requests",
                f"the gateway has {self._requests} requests under way, as many as it takes (CHAINS_MAX_REQUESTS)",
            )
        key = None if self._max_per_key is None else owner.encode() or _key(headers)
        if key is not None:
            count = self._by_key.get(key, 0)
            if self._max_per_key is not None and count >= self._max_per_key:
                what = f"the API key {owner}" if owner else "the same credential"
                text = f"{count} requests with {what} are under way, as many as one may have"
                _shed("key", f"{text} (CHAINS_MAX_REQUESTS_PER_KEY)")
            self._by_key[key] = count + 1
        self._requests += 1
        return Place(self, key)

    def leave(self, key: bytes | None) -> None:
        """Take a request's place back."""
        self._requests -= 1
        if key is not None:
            self._by_key[key] -= 1
            if not self._by_key[key]:
                del self._by_key[key]

    def add_bytes(self, size: int, coming: int = 0, *, alone: bool = False) -> None:
        """Count bytes, or count them no more if negative. Raises OverloadedError.

        Those that are `coming` must fit too, and are not counted: who announces much and sends nothing holds nothing.
        `alone` lets any number pass when there are no others.
        """
        more = size + coming
        if more > 0 and self._bytes + more > self._max_bytes and not (alone and self._bytes == 0):
            text = (
                f"the gateway holds bodies and results of {self._bytes} bytes, and {more} more are more than it takes"
            )
            _shed("bytes", f"{text} (CHAINS_MAX_BUFFERED_BYTES)")
        self._bytes += size


class Place:
    """One request's share of the `Limits`."""

    def __init__(self, limits: Limits, key: bytes | None) -> None:
        self._limits = limits
        self._key = key
        self._bytes = 0

    def hold(self, size: int, coming: int = 0) -> None:
        """Count `size` bytes in all for this request's body; 0 once it is published. Raises OverloadedError.

        So it does where the bytes that are still `coming` would not fit, though they don't count.
        """
        self._limits.add_bytes(size - self._bytes, coming)
        self._bytes = size

    def hold_result(self, size: int) -> None:
        """Count a result of `size` bytes until the request leaves. Raises OverloadedError.

        One larger than all that may be held passes while nothing else is: it would be turned away for ever.
        """
        self.hold(0)
        self._limits.add_bytes(size, alone=True)
        self._bytes = size

    def leave(self) -> None:
        self.hold(0)
        self._limits.leave(self._key)


class Rates:
    """How often each caller may call, in this process: a bucket that fills at `rate`, and holds `burst` requests.

    Kept as one time a caller, when its bucket is full again (the generic cell rate algorithm, ITU-T I.371): one that is
    full by now is forgotten.
    """

    def __init__(self, rate: float, burst: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval = 1 / rate
        self._burst = max(1, math.ceil(rate)) if burst is None else burst
        self._holds = self._burst * self._interval  # seconds that an empty bucket takes to fill
        self._clock = clock
        self._full: OrderedDict[str, float] = OrderedDict()  # those that called last stand last
        # Structured fields of draft-ietf-httpapi-ratelimit-headers: the quota, and the seconds in which it comes back.
        self.policy = b'"requests";q=%d;w=%d' % (self._burst, math.ceil(self._holds))

    def take(self, caller: str) -> bytes:
        """Take one from the caller's bucket; give what is left, as a `RateLimit` field. Raises OverloadedError."""
        now, full = self._clock(), self._full
        for _ in range(2):  # more than come
            if full and (len(full) > MAX_CALLERS or full[next(iter(full))] <= now):
                full.popitem(last=False)
        filled = max(now, full.get(caller, now)) + self._interval - now
        # Some slack: the differences of large floats are not exact.
        if filled > self._holds * (1 + 1e-9) + 1e-6:
            text = f"more than {1 / self._interval:g} requests a second, and {self._burst} at once"
            _shed("rate", f"{text} (CHAINS_RATE_PER_KEY)", retry_after=filled - self._holds)
        full[caller] = now + filled
        full.move_to_end(caller)
        return self.field(filled)

    def refused(self, error: OverloadedError) -> bytes:
        """Give the `RateLimit` field of an answer that refuses: nothing is left until `retry_after` has passed."""
        return b'"requests";r=0;t=%d' % max(1, math.ceil(error.retry_after or 0.0))

    def field(self, filled: float) -> bytes:
        left = max(0, int((self._holds - filled) / self._interval + 1e-6))
        return b'"requests";r=%d;t=%d' % (left, math.ceil(filled))

    def __len__(self) -> int:
        return len(self._full)


def caller_of(address: str) -> str:
    """Name a caller by its address; by the network of an IPv6 address, of which one machine has as many as it likes."""
    if ":" not in address:
        return address
    try:
        return str(ipaddress.IPv6Network((address.partition("%")[0], 64), strict=False))
    except ValueError:
        return address


def _key(headers: Mapping[bytes, bytes]) -> bytes:
    """Give a hash of the credential: nothing here keeps what could be used to call."""
    for name in CREDENTIALS:
        if (value := headers.get(name)) is not None:
            return hashlib.sha256(value).digest()
    return b""


def _shed(reason: _Reason, text: str, retry_after: float = RETRY_AFTER) -> Never:
    _SHED[reason].inc()
    raise OverloadedError(text, retry_after=retry_after)
