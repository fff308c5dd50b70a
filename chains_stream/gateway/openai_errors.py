"""Failures as OpenAI's API tells them, which its clients turn into their exceptions."""

from http import HTTPStatus

import msgspec

from chains_stream import openai as api
from chains_stream.gateway import problems
from chains_stream.gateway.endpoint import JSON, Endpoint
from chains_stream.gateway.exchange import Exchange
from chains_stream.gateway.problems import Problem

MODEL_NOT_FOUND = "model-not-found"

_TYPES: dict[int, str] = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.FORBIDDEN: "permission_error",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
}
_PARAMS = {MODEL_NOT_FOUND: "model"}  # of problems that have no path


class OpenAIEndpoint(Endpoint):
    """An endpoint that tells of failures as OpenAI's API does."""

    async def refuse(self, exchange: Exchange, problem: Problem, headers: dict[str, str] | None) -> None:
        exchange.error = problem.code
        body = self.write_problem(problem)
        given = {"content-type": JSON, "content-length": str(len(body)), **_advice(problem), **(headers or {})}
        await exchange.start(problem.status, *((name.encode(), value.encode()) for name, value in given.items()))
        await exchange.send({"type": "http.response.body", "body": body, "more_body": False})
        await exchange.settle()

    def write_problem(self, problem: Problem) -> bytes:
        return msgspec.json.encode(api.ErrorResponse(of_problem(problem)))


def of_problem(problem: Problem) -> api.ErrorBody:
    """Describe a problem: codes are ours, spelled as the API spells its own."""
    kind = "invalid_request_error" if problem.status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"
    path = (problem.path or "").removeprefix("$").removeprefix(".")
    return api.ErrorBody(
        message=problem.detail,
        type=_TYPES.get(problem.status, kind),
        param=path or _PARAMS.get(problem.code),
        code=problem.code.replace("-", "_"),
    )


def _advice(problem: Problem) -> dict[str, str]:
    """Say when to try again, and whether: a client would try a few times by itself."""
    advice = problems.retry_headers(problem)
    if problem.error is not None and not problem.error.retryable:
        advice["x-should-retry"] = "false"
    return advice
