"""Failures as OpenAI's API tells them, which its clients turn into their exceptions."""

from http import HTTPStatus

import msgspec
from starlette.responses import Response

from chains_stream import openai as api
from chains_stream.gateway import problems
from chains_stream.gateway.problems import Problem

PREFIX = "/v1/"  # of the paths whose failures are told so
MODEL_NOT_FOUND = "model-not-found"

_TYPES: dict[int, str] = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.FORBIDDEN: "permission_error",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
}
_PARAMS = {MODEL_NOT_FOUND: "model"}  # of problems that have no path


def respond(problem: Problem, headers: dict[str, str] | None = None) -> Response:
    """Answer with a problem; say when to try again, and whether: a client would try a few times by itself."""
    headers = problems.retry_headers(problem) | (headers or {})
    if problem.error is not None and not problem.error.retryable:
        headers["x-should-retry"] = "false"
    return Response(to_json(problem), problem.status, headers, "application/json")


def to_json(problem: Problem) -> bytes:
    """Write a problem. Its codes are ours, spelled as the API spells its own."""
    kind = "invalid_request_error" if problem.status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"
    path = (problem.path or "").removeprefix("$").removeprefix(".")
    body = api.ErrorBody(
        message=problem.detail,
        type=_TYPES.get(problem.status, kind),
        param=path or _PARAMS.get(problem.code),
        code=problem.code.replace("-", "_"),
    )
    return msgspec.json.encode(api.ErrorResponse(body))
