"""What operators configure on a process. Read once, checked, frozen, and passed down from there.

`Settings` is plain data, so that a script can write one; `from_environment` is for the command line alone.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import pydantic
import pydantic_settings
from pydantic import Field, PositiveFloat, PositiveInt

from chains_stream.errors import ChainsUsageError

ENVIRONMENT_PREFIX = "CHAINS_"

_Namespace = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,60}$")]
_Millis = PositiveInt
_HOUR_MS = 3_600_000


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
    deadline: PositiveFloat = 600.0  # of a request that names none
    grace_period: PositiveFloat = 30.0  # for running work, after SIGTERM
    stream_window: PositiveInt = 1024  # chunks of one stream that may be on their way to its reader
    stream_window_bytes: PositiveInt = 4 << 20
    max_record_bytes: PositiveInt = 1_000_000  # of a value in one record; the cluster must take some more, for headers
    max_body_bytes: PositiveInt = 16 << 20  # of an HTTP request
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535)] = 8000  # of the gateway; 0 picks a free one
    health_port: Annotated[int, Field(ge=0, le=65_535)] | None = None  # of a worker's /healthz and /readyz
    log_format: Literal["console", "json"] = "console"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    kafka: KafkaSettings = KafkaSettings()

    @classmethod
    def of(cls, **values: Any) -> Self:
        """Build settings from keywords, with a `ChainsUsageError` of one line for each wrong one."""
        try:
            return cls(**values)
        except pydantic.ValidationError as error:
            raise ChainsUsageError(_explain(error, source="")) from None


class _Environment(pydantic_settings.BaseSettings, Settings):
    model_config = pydantic_settings.SettingsConfigDict(
        frozen=True, extra="ignore", env_prefix=ENVIRONMENT_PREFIX, env_nested_delimiter="_", env_nested_max_split=1
    )


def from_environment(**flags: Any) -> Settings:
    """Read `Settings` from the variables ``CHAINS_…``; a flag that is not None wins over its variable."""
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        return Settings.model_validate(_Environment(**given).model_dump())
    except pydantic.ValidationError as error:
        raise ChainsUsageError(_explain(error, source=ENVIRONMENT_PREFIX, flags=given)) from None


def _explain(error: pydantic.ValidationError, *, source: str, flags: Mapping[str, Any] | None = None) -> str:
    lines = []
    for problem in error.errors():
        name = "_".join(str(part) for part in problem["loc"])
        shown = (
            f"--{name.replace('_', '-')}" if flags and name in flags else f"{source}{name.upper() if source else name}"
        )
        said = re.sub(r"^Input should", "should", problem["msg"])
        value = "" if "password" in name else f" (got {problem['input']!r})"
        lines.append(f"{shown}: {said}{value}")
    return "; ".join(lines)
