"""What users configure on a Chainlet. Names, fields and defaults are those of Truss Chains."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import Field, PositiveInt

from chains_stream.errors import ChainsUsageError, MissingDependencyError

_Memory = Annotated[str, Field(pattern=r"^\d+(\.\d+)?([KMGT]i?)?$")]
_Gpu = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+(:\d+)?$")]


class _Options(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


class Compute(_Options):
    """The hardware of a Chainlet, and how many requests one worker process of it runs at once.

    `memory` is a Kubernetes quantity (``"2Gi"``). `gpu` is a name such as ``"H100"``. `predict_concurrency` is a number
    of requests, or ``"cpu_count"`` for as many as `cpu_count`.
    """

    cpu_count: PositiveInt = 1
    memory: _Memory = "2Gi"
    gpu: _Gpu | None = None
    gpu_count: PositiveInt = 1
    predict_concurrency: PositiveInt | Literal["cpu_count"] = 1
    instance_type: str | None = None

    @property
    def concurrency(self) -> int:
        """Requests that one worker process runs at once."""
        return self.cpu_count if self.predict_concurrency == "cpu_count" else self.predict_concurrency


class Batch(_Options):
    """How calls of one Chainlet are joined: see `ChainletBase.batch`.

    `max_size` bounds the items of a batch, `max_wait_ms` how many milliseconds the first of them waits for others.
    """

    max_size: PositiveInt = 32
    max_wait_ms: Annotated[float, Field(ge=0)] = 5.0


class CustomImage(_Options):
    """A base image of the user's own, with the Python interpreter in it to use."""

    image: str
    python_executable_path: str | None = None
    docker_auth: Mapping[str, str] | None = None


class BasetenImage(_Options):
    """A base image named by Python version, as Truss Chains names them."""

    python_version: Literal["py310", "py311", "py312", "py313", "py314"] = "py311"


class DockerImage(_Options):
    """What goes into the image that a Chainlet's worker runs in. Paths are relative to the Chain file."""

    base_image: BasetenImage | CustomImage = BasetenImage()
    pip_requirements: Sequence[str] = ()
    pip_requirements_file: str | Path | None = None
    requirements_file: str | Path | None = None
    apt_requirements: Sequence[str] = ()
    data_dir: str | Path | None = None
    external_package_dirs: Sequence[str | Path] = ()


class WeightsSource(_Options):
    """Model weights to have in place before the worker starts, as ``hf://…``, ``s3://…`` or another URL."""

    source: str
    mount_location: str
    auth_secret_name: str | None = None
    allow_patterns: Sequence[str] = ()
    ignore_patterns: Sequence[str] = ()


class Assets(_Options):
    """What a Chainlet needs beside its code. Secrets are named here, and never held."""

    cached: Sequence[Any] = ()
    secret_keys: Sequence[str] = ()
    external_data: Sequence[Any] = ()
    weights: Sequence[WeightsSource] = ()


class ChainletOptions(_Options):
    """Less common settings of a Chainlet. `streaming_read_timeout` is in seconds.

    `resumable` says of a stream that it can go on where another worker was lost: `current_request` then gives the
    chunks that were already sent, and ``run_remote`` yields those that come after them.
    """

    enable_b10_tracing: bool = False
    enable_debug_logs: bool = False
    env_variables: Mapping[str, str] = Field(default_factory=dict)
    health_checks: Mapping[str, Any] | None = None
    metadata: Mapping[str, Any] | None = None
    resumable: bool = False
    streaming_read_timeout: PositiveInt = 60
    transport: Any = None


class RemoteConfig(_Options):
    """How one Chainlet is deployed. `name` replaces the class's name in topics and on screens."""

    docker_image: DockerImage = DockerImage()
    compute: Compute = Compute()
    assets: Assets = Assets()
    name: str | None = None
    options: ChainletOptions = ChainletOptions()
    build_commands: Sequence[str] = ()


class RPCOptions(_Options):
    """How one Chainlet calls another: see `depends`.

    Attributes:
        retries: attempts in all, the first included.
        timeout_sec: seconds for one try; for a stream, until the first chunk and between two chunks.
        use_binary: accepted for Truss Chains; values always travel in binary here.
        concurrency_limit: calls in flight at once from one process; further ones wait their turn.
        colocated: call a dependency that is hosted in the same process directly, not over the broker.
    """

    retries: PositiveInt = 1
    timeout_sec: Annotated[float, Field(gt=0)] = 600.0
    use_binary: bool = False
    concurrency_limit: PositiveInt = 300
    colocated: bool = False


class DeployedServiceDescriptor(_Options):
    """Where a dependency is served."""

    name: str
    display_name: str
    options: RPCOptions = RPCOptions()
    predict_url: str | None = None


class Environment(_Options):
    """The name of the environment a Chain runs in, such as ``production``."""

    name: str


class DeploymentContext(_Options):
    """What a Chainlet may know of where it runs; asked for with `depends_context`."""

    chainlet_to_service: Mapping[str, DeployedServiceDescriptor] = Field(default_factory=dict)
    secrets: Mapping[str, str] = Field(default_factory=dict, repr=False)
    data_dir: Path | None = None
    environment: Environment | None = None

    def get_service_descriptor(self, chainlet_name: str) -> DeployedServiceDescriptor:
        """Give the descriptor of a dependency, or raise `MissingDependencyError`."""
        if chainlet_name not in self.chainlet_to_service:
            known = ", ".join(sorted(self.chainlet_to_service)) or "none"
            msg = f"No service is known for the Chainlet `{chainlet_name}`; known are: {known}."
            raise MissingDependencyError(msg)
        return self.chainlet_to_service[chainlet_name]

    @classmethod
    def from_environment(cls, secret_keys: Sequence[str], data_dir: Path | None = None) -> Self:
        """Read the named secrets: a file of that name under `CHAINS_SECRETS_DIR`, else an environment variable."""
        folder = os.environ.get("CHAINS_SECRETS_DIR")
        secrets = {key: value for key in secret_keys if (value := _secret(key, folder)) is not None}
        name = os.environ.get("CHAINS_ENVIRONMENT")
        return cls(secrets=secrets, data_dir=data_dir, environment=Environment(name=name) if name else None)


def _secret(key: str, folder: str | None) -> str | None:
    if folder and (path := Path(folder) / key).is_file():
        return path.read_text(encoding="utf-8").rstrip("\n")
    return os.environ.get(key)


def make_abs_path_here(file_path: str) -> Path:
    """Give the absolute path of a file named relative to the source file that calls this."""
    if Path(file_path).is_absolute():
        raise ChainsUsageError(f"{file_path} is absolute already; make_abs_path_here takes a relative path")
    return Path(sys._getframe(1).f_code.co_filename).resolve().parent / file_path  # noqa: SLF001 - the caller's file
