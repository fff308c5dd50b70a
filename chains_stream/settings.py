"""What operators configure on a process. Read once, checked, frozen, and passed down from there.

`Settings` is plain data, so that a script can write one; `from_environment` is for the command line alone.
"""

import base64
import binascii
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import Field, PositiveFloat, PositiveInt

from chains_stream.errors import ChainsUsageError

ENVIRONMENT_PREFIX = "CHAINS_"

_Namespace = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,60}$")]
_Millis = PositiveInt
_HOUR_MS = 3_600_000
_SECRET_PREFIX, _SECRET_BYTES = "whsec_", range(24, 65)


class KafkaSettings(pydantic.BaseModel):
    """How to reach a Kafka cluster; the names are those of Kafka's own clients."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] | None = None
    sasl_username: str | None = None
    sasl_password: pydantic.SecretStr | None = None
    ssl_cafile: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    ssl_password: pydantic.SecretStr | None = None
    connect_timeout: PositiveFloat = 20.0  # seconds until a broker that does not answer is an error
    session_timeout_ms: _Millis = 10_000


class RegistrySettings(pydantic.BaseModel):
    """How to reach a schema registry with Confluent's API. Files are PEM; a `url` may be several, with commas."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    url: Annotated[str, Field(pattern=r"^https?://[^@]+$")] | None = None  # credentials have fields of their own
    username: str | None = None
    password: pydantic.SecretStr | None = None
    token: pydantic.SecretStr | None = None  # a bearer token, instead of a name and password
    cluster: str | None = None  # the logical cluster that Confluent Cloud wants named beside a token
    cafile: str | None = None
    certfile: str | None = None
    keyfile: str | None = None
    key_password: pydantic.SecretStr | None = None
    timeout: PositiveFloat = 10.0  # seconds, of one try

    @pydantic.model_validator(mode="after")
    def _one_way_in(self) -> Self:
        if self.token is not None and self.username is not None:
            raise ValueError("should have a token or a username, not both")
        if (self.username is None) != (self.password is None):
            raise ValueError("should have a username and a password, or neither")
        return self


class Settings(pydantic.BaseModel):
    """The settings of a process; each is a keyword of `connect` and, in capitals, a variable ``CHAINS_…``.

    Times are in seconds unless the name says ms.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    broker: str = "memory://"
    namespace: _Namespace = "chains"
    partitions: PositiveInt = 16  # of each request topic
    replication_factor: PositiveInt = 1
    reply_partitions: PositiveInt = 16
    request_retention_ms: _Millis = 7 * 24 * _HOUR_MS
    reply_retention_ms: _Millis = _HOUR_MS
    results_retention_ms: _Millis = 48 * _HOUR_MS  # of asynchronous requests
    deadline: PositiveFloat = 600.0  # of a request that names none
    websocket_deadline: PositiveFloat = 3600.0  # of a WebSocket, from its handshake to its end
    grace_period: PositiveFloat = 30.0  # for running work, after SIGTERM
    stream_window: PositiveInt = 1024  # chunks of one stream that may be on their way to its reader
    stream_window_bytes: PositiveInt = 4 << 20
    max_record_bytes: PositiveInt = 1_000_000  # of a value in one record; the cluster must take some more, for headers
    max_value_bytes: PositiveInt = 256 << 20  # of a value that goes through the store
    store: str | None = (
        None  # a URL of fsspec for values over max_record_bytes; a folder of this machine if none is named
    )
    secret: Annotated[pydantic.SecretStr, Field(min_length=16)] | None = (
        None  # that gateways share: it seals request ids
    )
    instance_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,100}$")] | None = None  # for static membership
    max_uncommitted: Annotated[int, Field(ge=1, le=1_500)] = (
        1_000  # records of a partition taken beyond the first open one
    )
    max_deliveries: PositiveInt = 3  # of a request that was alone each time its worker died
    max_requests: PositiveInt = 10_000  # under way in a gateway
    max_requests_per_key: PositiveInt | None = None  # of one API key
    rate_per_key: Annotated[float, Field(gt=0, le=1e6)] | None = None  # requests a second, in each gateway process
    rate_burst: Annotated[int, Field(ge=1, le=1_000_000)] | None = None  # at once; those of a second if not given
    max_body_bytes: PositiveInt = 16 << 20  # of an HTTP request
    max_buffered_bytes: PositiveInt = 256 << 20  # of bodies that a gateway holds; and as much for streams under way
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535)] = 8000  # of the gateway; 0 picks a free one
    health_port: Annotated[int, Field(ge=0, le=65_535)] | None = None  # of a worker's /healthz, /readyz and /metrics
    workers: Annotated[int, Field(ge=1, le=256)] = 1  # processes of one `chains gateway`
    api_keys: pydantic.SecretStr | None = None  # entries NAME:SHA256, or @ and a file with one a line
    api_key: pydantic.SecretStr | None = None  # that this process, as a client, presents to a gateway
    allow_anonymous: bool = False  # a gateway without keys may listen where others reach it
    cors_origins: str | None = None  # of pages that may call a gateway, separated by commas; * for all
    tls_certfile: str | None = None  # PEM, the certificate first, then those that it depends on
    tls_keyfile: str | None = None  # PEM; in the same file as the certificate if not given
    tls_key_password: pydantic.SecretStr | None = None
    webhook_secrets: pydantic.SecretStr | None = None  # that sign webhooks: `whsec_…`, separated by commas
    webhook_allow_private: bool = False  # whether webhooks may go to private addresses
    log_format: Literal["console", "json"] = "console"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    kafka: KafkaSettings = KafkaSettings()
    registry: RegistrySettings = RegistrySettings()

    @pydantic.field_validator("webhook_secrets")
    @classmethod
    def _checked(cls, value: pydantic.SecretStr | None) -> pydantic.SecretStr | None:
        if value is not None:
            _webhook_keys(value.get_secret_value())
        return value

    @property
    def embedded(self) -> bool:
        """Whether the broker lives in this process, and no other reaches it."""
        return self.broker.startswith("memory:")

    @property
    def webhook_keys(self) -> tuple[bytes, ...]:
        """The keys that webhooks are signed with, each of which gives a signature: so that they can be replaced."""
        return _webhook_keys(self.webhook_secrets.get_secret_value()) if self.webhook_secrets is not None else ()

    @classmethod
    def of(cls, **values: Any) -> Self:
        """Build settings from keywords, with a `ChainsUsageError` of one line for each wrong one."""
        try:
            return cls(**values)
        except pydantic.ValidationError as error:
            raise ChainsUsageError(_explain(error, source="")) from None


def from_environment(**flags: Any) -> Settings:
    """Read `Settings` from the variables ``CHAINS_…``; a flag that is not None wins over its variable.

    `model_fields_set` names those that were given. An empty variable counts as none.
    """
    import pydantic_settings  # the command line alone reads the environment

    class Environment(pydantic_settings.BaseSettings, Settings):
        model_config = pydantic_settings.SettingsConfigDict(
            frozen=True,
            extra="ignore",
            env_prefix=ENVIRONMENT_PREFIX,
            env_ignore_empty=True,
            env_nested_delimiter="_",
            env_nested_max_split=1,
        )

    given = {name: value for name, value in flags.items() if value is not None}
    try:
        return Settings.model_validate(Environment(**given).model_dump(exclude_unset=True))
    except pydantic.ValidationError as error:
        raise ChainsUsageError(_explain(error, source=ENVIRONMENT_PREFIX, flags=given)) from None
    except pydantic_settings.SettingsError as error:
        # It keeps the field's name in its text alone, and the value, which may be secret, out of it.
        field = re.search(r'field "(\w+)"', str(error))
        raise ChainsUsageError(f"{_variable(field[1]) if field else ENVIRONMENT_PREFIX}: should be JSON") from None


def misspelled(variables: Iterable[str]) -> dict[str, str]:
    """Give those of the `variables` that look like a setting and are none, each with the one that may be meant."""
    known = [_variable(name) for name in (*Settings.model_fields, *_nested_names())]
    others = sorted(name for name in variables if name.startswith(ENVIRONMENT_PREFIX) and name not in known)
    near = {name: get_close_matches(name, known, n=1, cutoff=0.9) for name in others}
    return {name: found[0] for name, found in near.items() if found}


def _explain(error: pydantic.ValidationError, *, source: str, flags: Mapping[str, Any] | None = None) -> str:
    """Say what is wrong with each setting, where it came from, and what is allowed; a secret's value is not shown."""
    lines = []
    for problem in error.errors(include_url=False):
        name = "_".join(str(part) for part in problem["loc"])
        shown = name
        if source:
            shown = f"--{name.replace('_', '-')}" if flags and name in flags else _variable(name)
        if problem["type"] == "extra_forbidden":
            near = get_close_matches(name, [*Settings.model_fields, *_nested_names()], n=1)
            hint = f"; did you mean {_variable(near[0]) if source else near[0]}?" if near else ""
            lines.append(f"{shown}: there is no such setting{hint}")
            continue
        said = re.sub(r"^(Input |String |Value error, )should", "should", problem["msg"]).partition(
            ", unable to parse"
        )[0]
        said = re.sub(r"^Value should have at least (\d+) items .*", r"should have at least \1 characters", said)
        plain = name in _PLAIN and isinstance(problem["input"], str | int | float)
        lines.append(f"{shown}: {said}" + (f" (got {problem['input']!r})" if plain else ""))
    return "; ".join(lines)


def _webhook_keys(text: str) -> tuple[bytes, ...]:
    """Read secrets as the Standard Webhooks specification writes them. Raises ValueError, which does not show them."""
    keys = []
    for number, secret in enumerate(text.split(","), 1):
        try:
            key = base64.b64decode(secret.strip().removeprefix(_SECRET_PREFIX), validate=True)
        except (binascii.Error, ValueError):
            key = b""
        if not secret.strip().startswith(_SECRET_PREFIX) or len(key) not in _SECRET_BYTES:
            msg = (
                f"should be secrets separated by commas, each `{_SECRET_PREFIX}` and the base64 of {_SECRET_BYTES[0]} "
                f"to {_SECRET_BYTES[-1]} bytes; number {number} is not"
            )
            raise ValueError(msg)
        keys.append(key)
    return tuple(keys)


def _variable(name: str) -> str:
    return f"{ENVIRONMENT_PREFIX}{name.upper()}"


def _nested_names() -> list[str]:
    return [
        *(f"kafka_{name}" for name in KafkaSettings.model_fields),
        *(f"registry_{name}" for name in RegistrySettings.model_fields),
    ]


_PLAIN = frozenset(
    name for name in (*Settings.model_fields, *_nested_names()) if not re.search("password|secret|api_key|token", name)
)
