"""OpenAI's API: the Chainlets that take its requests, for the clients that there are.

The routes exist only where a Chainlet takes what they take. Whether the client wants a stream is nothing to the
Chainlet: chunks are gathered into a whole answer, and a whole one is streamed in two chunks.
"""

import base64
import hashlib
import math
import struct
import time
from functools import partial
from http import HTTPStatus
from typing import Any, NamedTuple, Never

import msgspec
from starlette.routing import Route

from chains_stream import openai as api
from chains_stream.answers import Answer
from chains_stream.calls import Caller, RemoteTarget, remote_target
from chains_stream.chain import Chain
from chains_stream.codec import explain
from chains_stream.errors import InvalidArgumentError, InvalidResultError
from chains_stream.foreign import decode_json_hook
from chains_stream.gateway import openai_errors
from chains_stream.gateway.endpoint import JSON, Endpoint, Shared
from chains_stream.gateway.exchange import PIECE, Exchange
from chains_stream.gateway.limits import Place
from chains_stream.gateway.openai_answers import Chat, ChunkForm, Dialect, Stamp, Text, to_json, without_token_ids
from chains_stream.gateway.openai_offers import CHAT, COMPLETIONS, EMBEDDINGS, Offer, offers
from chains_stream.gateway.problems import Problem, Refusal
from chains_stream.settings import Settings

_IS_JSON = (b"content-type", JSON.encode())
_DIALECTS: dict[str, Dialect] = {CHAT: Chat(), COMPLETIONS: Text()}


async def routes(shared: Shared, chain: Chain, caller: Caller, settings: Settings) -> list[Route]:
    """Give the routes of OpenAI's API that the Chain has something for. Raises BrokerError."""
    models = [
        OfferedModel(offer, await remote_target(chain, offer.chainlet, caller, settings)) for offer in offers(chain)
    ]
    if not models:
        return []
    listed = ModelListing(shared, models, chain.name)
    made = [
        Route("/v1/models", listed, methods=["GET"]),
        Route("/v1/models/{id:path}", listed, methods=["GET"]),
    ]
    for path in (CHAT, COMPLETIONS, EMBEDDINGS):
        if found := [model for model in models if model.offer.path == path]:
            endpoint = Embeddings(shared, found) if path == EMBEDDINGS else Generation(shared, found, _DIALECTS[path])
            made.append(Route(path, endpoint, methods=["POST"]))
    return made


class OfferedModel:
    """A Chainlet that is offered, and the way to it."""

    def __init__(self, offer: Offer, target: RemoteTarget) -> None:
        self.offer = offer
        self.codec = offer.codec
        self.target = target
        self._decode = msgspec.json.Decoder(offer.request, dec_hook=decode_json_hook).decode

    def read(self, body: bytes) -> Any:
        """Read a request. Raises InvalidArgumentError."""
        try:
            return self._decode(body)
        except Exception as error:
            text, path = explain(error)
            raise InvalidArgumentError(text, path=path) from error


class _Named(msgspec.Struct):
    """What of a request says who is to take it."""

    model: str | None = None


class _ModelEndpoint(Endpoint):
    """An endpoint for requests that name a model: any of those that it has."""

    def __init__(self, shared: Shared, models: list[OfferedModel]) -> None:
        super().__init__(shared)
        self._models = models
        self._named = msgspec.json.Decoder(_Named).decode

    def write_problem(self, problem: Problem) -> bytes:
        return openai_errors.to_json(problem)

    def _choose(self, body: bytes) -> OfferedModel:
        """Choose who takes a request: by its `model`, if there are several. Raises Refusal."""
        if len(self._models) == 1 and not self._models[0].offer.strict:
            return self._models[0]
        try:
            named = self._named(body).model
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            return self._models[0]  # it reads the request too, and says what is wrong with it
        for model in self._models:
            if model.offer.is_called(named or "") or (not named and len(self._models) == 1):
                return model
        return _no_such_model(named or "", self._models)


class _Wanted(NamedTuple):
    """What a request for text says of its answer: the model's name, and what it is to hold besides."""

    model: str
    usage: bool
    token_ids: bool

    @classmethod
    def of(cls, request: api.GenerationRequest, offer: Offer) -> "_Wanted":
        options = request.stream_options
        usage = options is not None and bool(options.include_usage)
        return cls(request.model or offer.name, usage, bool(request.return_token_ids))


class Generation(_ModelEndpoint):
    """The endpoint of chat completions, or of completions."""

    def __init__(self, shared: Shared, models: list[OfferedModel], dialect: Dialect) -> None:
        super().__init__(shared, models)
        self._dialect = dialect

    async def handle(self, exchange: Exchange, place: Place) -> None:
        scope = exchange.begin(self.settings.deadline)
        with exchange.wanted(scope):
            body = await self.body(exchange, place) or b"{}"
            model = self._choose(body)
            request = model.read(body)
            arguments = model.codec.encode_arguments((request,), {})
            wanted = _Wanted.of(request, model.offer)
            if scope.affinity is None and request.prompt_cache_key:
                scope.affinity = hashlib.sha256(request.prompt_cache_key.encode()).digest()
            if request.stream:
                answer = partial(self._stream if model.offer.streaming else self._split, exchange, model, wanted)
            else:
                answer = partial(self._whole, exchange, place, model, wanted)
            del request
            body = body if exchange.keyed else b""  # let go of, but for the comparison with an earlier one
            await self.run_once(exchange, place, model.target, body, arguments, scope=scope, answer=answer)

    async def _stream(self, exchange: Exchange, model: OfferedModel, wanted: "_Wanted", call: Answer) -> None:
        await self.stream(exchange, self._form(exchange, model, wanted), call)

    async def _split(self, exchange: Exchange, model: OfferedModel, wanted: "_Wanted", call: Answer) -> None:
        """Stream what is given as a whole."""
        given = model.codec.decode_result(await call.result())
        said, end = self._dialect.split(self._dialect.of_text(given) if isinstance(given, str) else given)
        form = self._form(exchange, model, wanted)
        data = form.write(said) + form.write(end) + form.end(2)
        exchange.tell = form.failure
        await exchange.start(HTTPStatus.OK, *form.headers)
        await exchange.finish(data)

    async def _whole(
        self, exchange: Exchange, place: Place, model: OfferedModel, wanted: "_Wanted", call: Answer
    ) -> None:
        if model.offer.streaming:
            whole = await self._gather(place, model, call)
        else:
            given = model.codec.decode_result(await call.result())
            whole = self._dialect.of_text(given) if isinstance(given, str) else given
        if not wanted.token_ids:
            without_token_ids(whole)
        await _answer(exchange, place, to_json(self._stamp(exchange, wanted.model).put_on(whole)))

    def _form(self, exchange: Exchange, model: OfferedModel, wanted: "_Wanted") -> ChunkForm:
        stamp = self._stamp(exchange, wanted.model)
        return ChunkForm(self._dialect, model.codec, stamp, usage=wanted.usage, token_ids=wanted.token_ids)

    def _stamp(self, exchange: Exchange, name: str) -> Stamp:
        """Stamp an answer with the id of its request, which is another's once that is known to have run before."""
        return Stamp(self._dialect.prefix + exchange.request_id, int(time.time()), name)

    async def _gather(self, place: Place, model: OfferedModel, call: Answer) -> Any:
        """Take a stream whole; it counts as bytes that the gateway holds. Raises OverloadedError."""
        gatherer, held, size = self._dialect.gatherer(), 0, 0
        decode = model.codec.decode_result
        while (chunks := await call.next()) is not None:
            for chunk in chunks:
                size += len(memoryview(chunk))
                given = decode(chunk)
                gatherer.add(self._dialect.piece(given) if isinstance(given, str) else given)
            if size - held >= PIECE:
                place.hold(size)
                held = size
        return gatherer.whole()


class Embeddings(_ModelEndpoint):
    """The endpoint of embeddings."""

    async def handle(self, exchange: Exchange, place: Place) -> None:
        scope = exchange.begin(self.settings.deadline)
        with exchange.wanted(scope):
            body = await self.body(exchange, place) or b"{}"
            model = self._choose(body)
            request = model.read(body)
            arguments = model.codec.encode_arguments((request,), {})
            in_base64 = request.encoding_format == "base64"
            answer = partial(self._answer, exchange, place, model, asked=request.model, in_base64=in_base64)
            del request
            body = body if exchange.keyed else b""  # let go of, but for the comparison with an earlier one
            await self.run_once(exchange, place, model.target, body, arguments, scope=scope, answer=answer)

    async def _answer(
        self, exchange: Exchange, place: Place, model: OfferedModel, call: Answer, *, asked: str, in_base64: bool
    ) -> None:
        given = model.codec.decode_result(await call.result())
        response = given if isinstance(given, api.EmbeddingResponse) else _of_vectors(given)
        response.model = response.model or asked or model.offer.name
        for embedding in response.data:
            write = _in_base64 if in_base64 else _in_floats
            embedding.embedding = write(embedding.embedding)
        await _answer(exchange, place, to_json(response))


class ModelListing(Endpoint):
    """The endpoint of models: all of them, or one."""

    def __init__(self, shared: Shared, models: list[OfferedModel], owner: str) -> None:
        super().__init__(shared)
        self._offered = models
        created = int(time.time())
        names = dict.fromkeys(name for model in models for name in model.offer.names)
        self._models = [api.Model(id=name, created=created, owned_by=owner) for name in names]

    async def handle(self, exchange: Exchange, place: Place) -> None:
        name = exchange.path_parameters.get("id")
        if name is None:
            data = to_json(api.ModelList(data=self._models))
        else:
            found = next((model for model in self._models if model.id == name), None)
            data = to_json(found if found is not None else _no_such_model(name, self._offered))
        await _answer(exchange, place, data)


async def _answer(exchange: Exchange, place: Place, data: bytes) -> None:
    if len(data) > PIECE:
        place.hold_result(len(data))
    await exchange.start(HTTPStatus.OK, _IS_JSON, (b"content-length", b"%d" % len(data)))
    await exchange.finish(data)


def _no_such_model(name: str, models: list[OfferedModel]) -> Never:
    names = ", ".join(f"`{name}`" for name in dict.fromkeys(name for model in models for name in model.offer.names))
    raise Refusal(HTTPStatus.NOT_FOUND, openai_errors.MODEL_NOT_FOUND, f"there is no model `{name}`; there are {names}")


def _of_vectors(given: Any) -> api.EmbeddingResponse:
    """Make a response of plain vectors: a list of lists, or an array of two dimensions."""
    if not isinstance(given, list):
        if given.ndim != 2:  # noqa: PLR2004 - texts and their vectors
            raise InvalidResultError(f"embeddings are an array of 2 dimensions, not {given.ndim}")
        given = given.tolist()
    return api.EmbeddingResponse.of(given)


def _in_base64(vector: list[float] | str) -> str:
    if isinstance(vector, str):
        return vector
    try:
        return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
    except (OverflowError, struct.error) as error:
        raise InvalidResultError(f"an embedding does not fit 32-bit floats: {error}") from error


def _in_floats(vector: list[float] | str) -> list[float]:
    if isinstance(vector, str):
        try:
            data = base64.b64decode(vector, validate=True)
            vector = list(struct.unpack(f"<{len(data) // 4}f", data))
        except (ValueError, struct.error) as error:
            raise InvalidResultError(f"an embedding is no base64 of 32-bit floats: {error}") from error
    if not all(map(math.isfinite, vector)):
        raise InvalidResultError("an embedding has a value that JSON can't hold: not finite")
    return vector
