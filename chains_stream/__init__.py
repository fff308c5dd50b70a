"""Serve multi-step inference as a stream: typed Chainlets over Kafka, or in one process with no service at all.

Everything a Chain file, a script or a test needs is here; see the README for a first program.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chains_stream.chain_parameters import parameter_values, parameters
    from chains_stream.chainlet import ChainletBase, depends, depends_context, mark_entrypoint
    from chains_stream.client import Connection, Handle, connect, run_chain
    from chains_stream.errors import (
        BrokerAuthorizationError,
        BrokerError,
        CallCancelledError,
        CallTimeoutError,
        ChainsDeploymentError,
        ChainsError,
        ChainsRuntimeError,
        ChainsUsageError,
        DeadLetteredError,
        DeadlineExceededError,
        FencedError,
        GatewayError,
        GenericRemoteException,
        IncompatibleSchemaError,
        InvalidArgumentError,
        InvalidChainError,
        InvalidResultError,
        MissingDependencyError,
        OffsetExpiredError,
        OverloadedError,
        RecordTooLargeError,
        RemoteErrorDetail,
        SchemaRegistryAuthorizationError,
        SchemaRegistryError,
        StackFrame,
        StoredValueMissingError,
        StoreError,
        StreamInterruptedError,
        UnknownSchemaError,
        WebSocketClosedError,
        WorkerLostError,
    )
    from chains_stream.events import Event, Output, Sink, Source
    from chains_stream.formats import Avro, CloudEvents, Format, Json, JsonSchema, Msgpack
    from chains_stream.local import run_local
    from chains_stream.options import (
        Assets,
        BasetenImage,
        Batch,
        ChainletOptions,
        Compute,
        CustomImage,
        DeployedServiceDescriptor,
        DeploymentContext,
        DockerImage,
        Environment,
        RemoteConfig,
        RPCOptions,
        WeightsSource,
        make_abs_path_here,
    )
    from chains_stream.policy import CurrentRequest, affinity, current_request
    from chains_stream.websocket import WebSocketProtocol

__version__ = "0.1.0"

__all__ = [
    "Assets",
    "Avro",
    "BasetenImage",
    "Batch",
    "BrokerAuthorizationError",
    "BrokerError",
    "CallCancelledError",
    "CallTimeoutError",
    "ChainletBase",
    "ChainletOptions",
    "ChainsDeploymentError",
    "ChainsError",
    "ChainsRuntimeError",
    "ChainsUsageError",
    "CloudEvents",
    "Compute",
    "Connection",
    "CurrentRequest",
    "CustomImage",
    "DeadLetteredError",
    "DeadlineExceededError",
    "DeployedServiceDescriptor",
    "DeploymentContext",
    "DockerImage",
    "Environment",
    "Event",
    "FencedError",
    "Format",
    "GatewayError",
    "GenericRemoteException",
    "Handle",
    "IncompatibleSchemaError",
    "InvalidArgumentError",
    "InvalidChainError",
    "InvalidResultError",
    "Json",
    "JsonSchema",
    "MissingDependencyError",
    "Msgpack",
    "OffsetExpiredError",
    "Output",
    "OverloadedError",
    "RPCOptions",
    "RecordTooLargeError",
    "RemoteConfig",
    "RemoteErrorDetail",
    "SchemaRegistryAuthorizationError",
    "SchemaRegistryError",
    "Sink",
    "Source",
    "StackFrame",
    "StoreError",
    "StoredValueMissingError",
    "StreamInterruptedError",
    "UnknownSchemaError",
    "WebSocketClosedError",
    "WebSocketProtocol",
    "WeightsSource",
    "WorkerLostError",
    "affinity",
    "connect",
    "current_request",
    "depends",
    "depends_context",
    "make_abs_path_here",
    "mark_entrypoint",
    "parameter_values",
    "parameters",
    "run_chain",
    "run_local",
]

# Where the names above live: imported when first asked for, in this order. A Chain file gets by without `client`, which
# brings HTTP and the brokers with it, and `chains --help` without any of them.
_HOMES = (
    "errors",
    "options",
    "chain_parameters",
    "policy",
    "websocket",
    "chainlet",
    "local",
    "formats",
    "events",
    "client",
)


def __getattr__(name: str) -> Any:
    if name in __all__:
        for home in _HOMES:
            found = getattr(import_module(f"{__name__}.{home}"), name, None)
            if found is not None:
                globals()[name] = found  # the next time it is here
                return found
    raise AttributeError(f"module `{__name__}` has no attribute `{name}`")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
