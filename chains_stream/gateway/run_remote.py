"""``POST /run_remote``: arguments as a JSON object in, the result or the stream of the Chain's entrypoint out."""

from functools import partial
from http import HTTPStatus

from chains_stream.answers import Answer
from chains_stream.calls import RemoteTarget
from chains_stream.codec import Codec
from chains_stream.gateway.endpoint import JSON, Endpoint, Shared
from chains_stream.gateway.exchange import PIECE, Exchange
from chains_stream.gateway.limits import Place
from chains_stream.gateway.streaming import Forms

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
            body = body if exchange.keyed else b""  # let go of, but for the comparison with an earlier one
            await self.run_once(exchange, place, self._target, body, arguments, scope=request, answer=answer)

    async def _result(self, exchange: Exchange, place: Place, call: Answer) -> None:
        result = self._codec.result_to_json(await call.result())
        if len(result) > PIECE:
            place.hold_result(len(result))
        await exchange.start(HTTPStatus.OK, _IS_JSON, (b"content-length", b"%d" % len(result)))
        await exchange.finish(result)
