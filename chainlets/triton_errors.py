"""What Triton answers when it does not do what it is asked to, as errors with the model's own message."""

import chains_stream as chains

INSTALL = "pip install 'chains-stream[triton]'"


class TritonError(chains.ChainsRuntimeError):
    """Triton, or the model on it, failed; the message holds what it said. `reason` is gRPC's word for the kind."""

    code = "triton"
    status = 502
    retryable = True
    fields = ("reason",)
    reason: str | None


class TritonRefusedError(TritonError):
    """Triton refused, and would again: it does not know the model, or us. Mend the configuration."""

    retryable = False


class TritonUnavailableError(TritonError):
    """Triton can't be reached, or the model is not ready. Start it, or wait until it is."""

    status = 503


class TritonMismatchError(chains.ChainsUsageError):
    """A Chainlet and its model don't fit: the message has a line for each input and output that differs."""


_REFUSED = frozenset({"NOT_FOUND", "UNAUTHENTICATED", "PERMISSION_DENIED", "UNIMPLEMENTED", "ALREADY_EXISTS"})
_FULL = "maximum queue size"  # what a dynamic batcher says, with UNAVAILABLE, whose queue takes no more
_RESTRICTED = "protocol is restricted"  # and a server, with UNAVAILABLE, that was not given the header it asks for


def error_of(status: str, said: str, shown: str) -> chains.ChainsRuntimeError:
    """Give the error for gRPC's `status`, ``INVALID_ARGUMENT`` say, with what was `said`; `shown` names the model."""
    message = f"{shown}: {said or status}"
    if _FULL in said or status == "RESOURCE_EXHAUSTED":
        return chains.OverloadedError(message)
    if _RESTRICTED in said or status in _REFUSED:
        return TritonRefusedError(message, reason=status)
    if status in ("INVALID_ARGUMENT", "OUT_OF_RANGE"):
        return chains.InvalidArgumentError(message)
    if status == "DEADLINE_EXCEEDED":
        return chains.CallTimeoutError(f"{shown}: no answer in time")
    if status == "UNAVAILABLE":
        return TritonUnavailableError(message, reason=status)
    return TritonError(message, reason=status)
