"""How a Chainlet reaches a model on Triton: `TritonConfig`, checked once, frozen and passed down."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated
from urllib.parse import SplitResult, urlsplit

import pydantic
from pydantic import Field, PositiveFloat, PositiveInt, SecretStr

import chains_stream as chains

_SCHEMES = {"": False, "grpc": False, "http": False, "grpcs": True, "https": True}
_LOCAL = frozenset({"localhost", "127.0.0.1", "::1", "[::1]"})


class TritonConfig(pydantic.BaseModel):
    """A model on a Triton Inference Server, and how it is called; by hand, or with `chains.parameters(TritonConfig)`.

    Attributes:
        url: of Triton's gRPC port, ``grpc://host:8001``; ``grpcs://`` means TLS.
        model: its name in the model repository; `model_version` is a number, or empty for the server's choice.
        root_certificates: a file of certificates to trust over TLS; without one, those that gRPC brings.
        private_key: with `certificate_chain`, the files of a client's own certificate, where the server asks for one.
        headers: sent with every request. Triton tells of a stream's errors the text alone; with ``triton_grpc_error:
            true`` it tells their kind too, of which Triton 2.51 was seen to die.
        token: goes as ``authorization: Bearer …``; so does the content of `token_file`, read with each connection.
        timeout: seconds for one try of a unary call, and for a whole stream. The request's deadline bounds it too.
        start_timeout: seconds to wait, at start, for the server and the model to be ready.
        retries: tries in all of what Triton answers with UNAVAILABLE, the first included: a server that restarts, a
            model that is loaded anew. A stream is tried again only while nothing of it has come.
        backoff: seconds before the second try, about; doubled for each further one, up to 5.
        keepalive: seconds between pings on a connection that is in use; None for none. Triton breaks connections that
            ping more often than its ``--grpc-http2-min-recv-ping-interval-without-data`` allows, 300 by default.
        max_in_flight: requests that one worker has at Triton at once, and its `predict_concurrency` if the Chainlet
            sets none. Give Triton's dynamic batcher enough to fill its batches.
        shared_memory_bytes: tensors of numbers from this size on go through shared memory where the server is on this
            host; None for never.
        shared_memory_outputs: bytes to set aside for outputs whose dimensions the model leaves open, by name; those
            with fixed dimensions need no entry.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    url: str = "grpc://127.0.0.1:8001"
    model: Annotated[str, Field(min_length=1)] = "ensemble"
    model_version: Annotated[str, Field(pattern=r"^\d*$")] = ""
    root_certificates: Path | None = None
    private_key: Path | None = None
    certificate_chain: Path | None = None
    headers: Mapping[str, str] = Field(default_factory=dict)
    token: SecretStr | None = None
    token_file: Path | None = None
    timeout: PositiveFloat = 600.0
    start_timeout: PositiveFloat = 300.0
    retries: PositiveInt = 6
    backoff: PositiveFloat = 0.2
    keepalive: PositiveFloat | None = None
    max_in_flight: PositiveInt = 64
    shared_memory_bytes: PositiveInt | None = 1 << 20
    shared_memory_outputs: Mapping[str, PositiveInt] = Field(default_factory=dict)

    @pydantic.field_validator("url")
    @classmethod
    def _check_url(cls, url: str) -> str:
        if url.startswith("unix:"):
            return url
        parts = _split(url)
        try:
            known = parts.scheme in _SCHEMES and parts.hostname and parts.port
        except ValueError:  # the port is no number
            known = False
        if not known or parts.path not in ("", "/"):
            raise ValueError("write it as grpc://host:port, or grpcs://host:port for TLS")
        return url

    @pydantic.model_validator(mode="after")
    def _check_certificates(self) -> "TritonConfig":
        if (self.private_key is None) != (self.certificate_chain is None):
            raise ValueError("private_key and certificate_chain go together")
        if not self.tls and (self.root_certificates or self.private_key):
            raise ValueError("certificates are for TLS: begin the url with grpcs://")
        return self

    @property
    def target(self) -> str:
        """The server as gRPC names it: ``host:port``."""
        return self.url if self.url.startswith("unix:") else _split(self.url).netloc

    @property
    def tls(self) -> bool:
        return not self.url.startswith("unix:") and _SCHEMES[_split(self.url).scheme]

    @property
    def on_this_host(self) -> bool:
        """Whether the address is one of this host, so that shared memory may be, too."""
        return self.url.startswith("unix:") or _split(self.url).hostname in _LOCAL

    @property
    def shown(self) -> str:
        """The model and its server, for messages."""
        version = f" version {self.model_version}" if self.model_version else ""
        return f"model `{self.model}`{version} at {self.url}"

    def metadata(self) -> dict[str, str]:
        """Give the headers of a request, in gRPC's spelling. Raises ChainsUsageError for a token that can't be read."""
        found = {name.lower(): value for name, value in self.headers.items()}
        token = self.token.get_secret_value() if self.token else None
        if self.token_file is not None:
            token = read(self.token_file).decode().strip()
        if token:
            found["authorization"] = f"Bearer {token}"
        return found


def read(path: Path) -> bytes:
    """Give the content of a file that the configuration names. Raises ChainsUsageError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise chains.ChainsUsageError(f"can't read {path}: {error.strerror}") from None


def _split(url: str) -> SplitResult:
    return urlsplit(url if "://" in url else f"//{url}")
