"""``POST /run_remote``: arguments as a JSON object in, the result or the stream of the Chain's entrypoint out."""

from collections.abc import Awaitable, Callable
from functools import partial
from http import HTTPStatus

from chains_stream.answers import Answer
from chains_stream.calls import RemoteTarget
from chains_stream.codec import Codec
from chains_stream.errors import ChainsError, is_retryable
from chains_stream.gateway.endpoint import JSON, Endpoint, Shared
from chains_stream.gateway.exchange import PIECE, Exchange
from chains_stream.gateway.limits import Place
from chains_stream.gateway.streaming import Forms
from chains_stream.policy import Scope

_IS_JSON = (b"content-type", JSON.encode())


class RunRemote(Endpoint):
    """The endpoint of `/run_remote`."""

    def __init__(self, shared: Shared, codec: Codec, target: RemoteTarget) -> None:
        super().__init__(shared)
        self._codec = codec
        self._target = target
        self._forms = Forms(codec)

    async def handle(self, exchange: Exchange, place: Place) -> None:
        form = self._forms.choose(exchange.accept)
        request = exchange.begin(self.settings.deadline)
        with exchange.wanted(request):
            body = await self.body(exchange, place) or b"{}"
            arguments = self._codec.arguments_from_json(body)
            answer = (
                partial(self.stream, exchange, form) if form is not None else partial(self._result, exchange, place)
            )
            if exchange.keyed:
                await self._once(exchange, place, body, arguments, scope=request, answer=answer)
                return
            del body
            await self.run(exchange, place, self._target, arguments, scope=request, answer=answer)

    async def _once(
        self,
        exchange: Exchange,
        place: Place,
        body: bytes,
        arguments: bytes,
        *,
        scope: Scope,
        answer: Callable[[Answer], Awaitable[None]],
    ) -> None:
        """Run a request with an idempotency key, unless it was run before: then give the answer that it had."""
        claim = await self.claim(exchange, body)
        assert claim is not None, "it has a key"
        if claim.earlier is not None:
            following = self.shared.past.follow(await self.earlier(exchange, claim), scope)
            try:
                await answer(following)
            finally:
                following.close()
            return
        made = False

        async def answer_made(call: Answer) -> None:
            nonlocal made
            made = True
            await answer(call)

        try:
            await self.run(exchange, place, self._target, arguments, scope=scope, answer=answer_made)
        except BaseException as error:
            if not made or (isinstance(error, ChainsError) and not exchange.started and is_retryable(error)):
                claim.release()
            raise

    async def _result(self, exchange: Exchange, place: Place, call: Answer) -> None:
        result = self._codec.result_to_json(await call.result())
        if len(result) > PIECE:
            place.hold_result(len(result))
        await exchange.start(HTTPStatus.OK, _IS_JSON, (b"content-length", b"%d" % len(result)))
        await exchange.finish(result)
