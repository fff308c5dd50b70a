"""OpenAI's API in the OpenAPI document of a Chain: what of it there is."""

from typing import Any

import msgspec

from chains_stream import openai as api
from chains_stream.chain import Chain
from chains_stream.gateway.openai_offers import CHAT, COMPLETIONS, EMBEDDINGS, Offer, offers
from chains_stream.gateway.openapi_async import request_parameters
from chains_stream.gateway.openapi_parts import JSON, RETRY, Json, answer, stream_of
from chains_stream.gateway.streaming import EVENTS
from chains_stream.settings import Settings

_PREFIX = "openai."  # of our schemas' names: no class of a user's has a name with a dot
_REFERENCE = f"#/components/schemas/{_PREFIX}"
_MODELS = "/v1/models"
_MODEL = "/v1/models/{id}"
_ANSWERS: dict[str, tuple[str, str, type[Any], type[Any] | None]] = {
    CHAT: ("chat_completions", "Go on with a conversation", api.ChatCompletion, api.ChatCompletionChunk),
    COMPLETIONS: ("completions", "Go on with a text", api.Completion, api.Completion),
    EMBEDDINGS: ("embeddings", "Embed texts", api.EmbeddingResponse, None),
}
PATHS = frozenset({*_ANSWERS, _MODELS, _MODEL})
_FAILURES = {
    400: "The request is wrong; `param` names the field.",
    404: "There is no such model.",
    408: "The body did not arrive in time.",
    409: "The request with this idempotency key is still under way.",
    410: "The answer to the request with this idempotency key is not kept any more.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    422: "The idempotency key was used before, for another body.",
    429: "Too many requests, or bytes of them, are under way. Try again after `retry-after` seconds.",
    499: "The request was cancelled.",
    500: "The Chain failed.",
    502: "The stream broke off below.",
    503: "A worker or the broker is away; try again after `retry-after` seconds.",
    504: "The deadline of the request passed.",
}


def added(document: Json, chain: Chain, settings: Settings) -> Json:
    """Give the document of a Chain with the routes of OpenAI's API that it has."""
    found = offers(chain)
    if not found:
        return document
    by_path: dict[str, list[Offer]] = {}
    for offer in found:
        by_path.setdefault(offer.path, []).append(offer)
    kinds: list[Any] = [api.Model, api.ModelList, api.ErrorResponse]
    for path, here in by_path.items():
        kinds += [kind for kind in (*_requests(here), *_ANSWERS[path][2:]) if kind is not None]
    kinds = list(dict.fromkeys(kinds))
    references, schemas = msgspec.json.schema_components(
        kinds,
        schema_hook=lambda _: {},  # of a user's own fields: any value
        ref_template=f"{_REFERENCE}{{name}}",
    )
    of = dict(zip(kinds, references, strict=True))
    paths = {path: {"post": _generation(path, here, of, settings)} for path, here in by_path.items()}
    paths |= {_MODELS: {"get": _models(of)}, _MODEL: {"get": _model(of)}}
    components = document["components"]
    prefixed = {f"{_PREFIX}{name}": schema for name, schema in schemas.items()}
    return document | {
        "paths": document["paths"] | paths,
        "components": components | {"schemas": components["schemas"] | prefixed},
    }


def _requests(here: list[Offer]) -> list[type[Any]]:
    return list(dict.fromkeys(offer.request for offer in here))


def _generation(path: str, here: list[Offer], of: dict[Any, Json], settings: Settings) -> Json:
    name, summary, whole, chunk = _ANSWERS[path]
    requests = [of[kind] for kind in _requests(here)]
    content: Json = {JSON: {"schema": of[whole]}}
    if chunk is not None:
        text = "With `stream`: server-sent events, chunks as JSON and a last one of `[DONE]`; or an `error`."
        content[EVENTS] = stream_of(EVENTS, of[chunk], text)
    names = [f"`{name}`" for offer in here for name in offer.names]
    only = len(here) == 1 and not here[0].strict
    which = f"Any `model` is {names[0]}." if only else f"`model` is one of {', '.join(names)}."
    return {
        "operationId": f"openai_{name}",
        "summary": summary,
        "description": which,
        "parameters": request_parameters(settings),
        "requestBody": {
            "required": True,
            "content": {JSON: {"schema": requests[0] if len(requests) == 1 else {"anyOf": requests}}},
        },
        "responses": {"200": answer("The answer.", content)} | _failures(*_FAILURES),
    }


def _models(of: dict[Any, Json]) -> Json:
    return {
        "operationId": "openai_models",
        "summary": "Which models there are",
        "responses": {"200": answer("All of them.", {JSON: {"schema": of[api.ModelList]}})} | _failures(429),
    }


def _model(of: dict[Any, Json]) -> Json:
    return {
        "operationId": "openai_model",
        "summary": "What is known of a model",
        "parameters": [{"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}],
        "responses": {"200": answer("The model.", {JSON: {"schema": of[api.Model]}})} | _failures(404, 429),
    }


def failure(status: int, text: str) -> Json:
    """Describe an answer with an error."""
    described = answer(text, {JSON: {"schema": {"$ref": f"{_REFERENCE}{api.ErrorResponse.__name__}"}}})
    if status in RETRY:
        described["headers"]["retry-after"] = {"$ref": "#/components/headers/retry-after"}
    return described


def _failures(*statuses: int) -> Json:
    described = {str(status): failure(status, _FAILURES[status]) for status in statuses}
    return described | {"default": failure(0, "Another failure.")}
