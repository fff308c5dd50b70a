"""Failures as HTTP tells them: problem details (RFC 9457), with members of our own."""

import math
from http import HTTPStatus

import msgspec
from starlette.responses import Response

from chains_stream.errors import ChainsError, RemoteErrorDetail, http_status, remote_detail, to_detail

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER = 1  # seconds, where nobody knows better

CLIENT_CLOSED_REQUEST = 499  # nginx's for a client that left, and google.rpc's for a request that was cancelled
_RETRY_LATER = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)


class Problem(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What went wrong with one request.

    `code` is a stable word for programs, `detail` a sentence for people. `path` names the wrong field of the arguments,
    ``$.names[1]`` say; `offered` are the media types that can be had; `missing` is what a gateway that is not ready
    waits for; `retry_after` is in seconds. `error` is a Chain's own error with its way through the Chainlets, whole
    enough for a Python client to raise it again.
    """

    title: str
    status: int
    detail: str
    code: str
    request_id: str
    path: str | None = None
    offered: list[str] | None = None
    missing: list[str] | None = None
    retry_after: float | None = None
    error: RemoteErrorDetail | None = None


class Refusal(Exception):  # noqa: N818 - it says what we do, and no error of the Chain's
    """The gateway itself turns a request down. `close` ends the connection, where the client may still be sending."""

    def __init__(
        self,
        status: HTTPStatus,
        code: str,
        detail: str,
        *,
        offered: list[str] | None = None,
        missing: list[str] | None = None,
        headers: dict[str, str] | None = None,
        close: bool = False,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail
        self.offered = offered
        self.missing = missing
        self.headers = (headers or {}) | ({"connection": "close"} if close else {})


def of_refusal(refusal: Refusal, request_id: str) -> Problem:
    return Problem(
        title=title(refusal.status),
        status=refusal.status,
        detail=refusal.detail,
        code=refusal.code,
        request_id=request_id,
        offered=refusal.offered,
        missing=refusal.missing,
        retry_after=RETRY_AFTER if refusal.status in _RETRY_LATER else None,
    )


def of_error(error: Exception, request_id: str) -> Problem:
    """Describe an error of the Chain, or of the way to it."""
    detail = to_detail(error)
    status = http_status(error)
    wait = getattr(error, "retry_after", None)
    return Problem(
        title=title(status),
        status=status,
        detail=detail.exception_message,
        code=detail.code,
        request_id=request_id,
        path=getattr(error, "path", None) if isinstance(error, ChainsError) else None,
        retry_after=(wait if isinstance(wait, int | float) else RETRY_AFTER) if status in _RETRY_LATER else None,
        error=detail,
    )


def of_defect(request_id: str) -> Problem:
    """Describe a mistake in the gateway: what it is stands in the log."""
    return Problem(
        title=title(500),
        status=500,
        detail="the gateway failed; its log has more under the request id",
        code="internal",
        request_id=request_id,
    )


def is_known(error: Exception) -> bool:
    """Tell whether an error is the Chain's or this library's, and no mistake in the gateway's own code."""
    return isinstance(error, ChainsError) or remote_detail(error) is not None


def respond(problem: Problem, headers: dict[str, str] | None = None) -> Response:
    headers = retry_headers(problem) | (headers or {})
    return Response(msgspec.json.encode(problem), problem.status, headers, MEDIA_TYPE)


def retry_headers(problem: Problem) -> dict[str, str]:
    """Say when to try again, if that can be said."""
    if problem.retry_after is None:
        return {}
    return {"retry-after": str(max(1, math.ceil(problem.retry_after)))}


def title(status: int) -> str:
    if status == CLIENT_CLOSED_REQUEST:
        return "Request Cancelled"
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Error"
