"""Which Chainlets of a Chain clients of OpenAI's API may call, and where."""

from collections.abc import Iterable, Iterator
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import msgspec

from chains_stream import foreign
from chains_stream import openai as api
from chains_stream.chain import Chain
from chains_stream.chainlet import ChainletBase, chainlet_name, signature
from chains_stream.codec import Codec, codec_of
from chains_stream.gateway.streaming import bare
from chains_stream.log import get_logger

Path = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]

CHAT: Path = "/v1/chat/completions"
COMPLETIONS: Path = "/v1/completions"
EMBEDDINGS: Path = "/v1/embeddings"

# By the path: what is taken, and what may be given, one after another and at once.
_KINDS: dict[Path, tuple[type[msgspec.Struct], tuple[type[Any], ...], tuple[type[Any], ...]]] = {
    CHAT: (api.ChatCompletionRequest, (str, api.ChatCompletionChunk), (str, api.ChatCompletion)),
    COMPLETIONS: (api.CompletionRequest, (str, api.Completion), (str, api.Completion)),
    EMBEDDINGS: (api.EmbeddingRequest, (), (api.EmbeddingResponse,)),
}

log = get_logger(__name__)


class Offer(msgspec.Struct, frozen=True):
    """A Chainlet that is offered: the `model` of its `path` that is called by one of its `names`, or its class's.

    `strict` says that it is asked for by these alone, also where there is no other.
    """

    path: Path
    names: tuple[str, ...]
    strict: bool
    chainlet: type[ChainletBase]
    request: type[Any]
    codec: Codec

    @property
    def name(self) -> str:
        """What it is called in an answer to a request that names no model."""
        return self.names[0]

    @property
    def streaming(self) -> bool:
        return self.codec.signature.streaming

    def is_called(self, name: str) -> bool:
        return name in self.names or (name == self.chainlet.__name__ and not self.strict)


def offers(chain: Chain) -> list[Offer]:
    """Find the Chainlets whose only argument is a request of the API, and whose result answers it.

    Those are the entrypoint and, as others are not for clients, those that have a name in their `remote_config`.
    """
    named = (cls for cls in chain.chainlets if cls is not chain.entrypoint and cls.remote_config.name)
    ordered = [chain.entrypoint, *named]
    return [offer for cls in ordered if (offer := _offer(cls)) is not None]


def _offer(cls: type[ChainletBase]) -> Offer | None:
    found = signature(cls)
    if len(found.parameters) != 1:
        return None
    request = bare(found.parameters[0].annotation)
    for path, (kind, chunks, wholes) in _KINDS.items():
        if not (isinstance(request, type) and issubclass(request, kind)):
            continue
        allowed = chunks if found.streaming else wholes
        if not _answers(found.result, allowed):
            # A router or a guard may well give something else; so say why it is missed, and no more.
            names = " or ".join(kind.__name__ for kind in allowed) or "no stream"
            log.info("openai.not_offered", chainlet=chainlet_name(cls), path=path, gives=names)
            return None
        called = tuple(cls.openai_models)
        return Offer(path, called or (chainlet_name(cls),), bool(called), cls, request, codec_of(found))
    return None


def _answers(result: Any, allowed: Iterable[type[Any]]) -> bool:
    allowed = tuple(allowed)
    if allowed == (api.EmbeddingResponse,) and _is_vectors(result):
        return True
    return bool(allowed) and all(isinstance(kind, type) and issubclass(kind, allowed) for kind in _members(result))


def _members(kind: Any) -> Iterator[Any]:
    kind = bare(kind)
    if get_origin(kind) in (Union, UnionType):
        for member in get_args(kind):
            yield from _members(member)
    else:
        yield kind


def _is_vectors(result: Any) -> bool:
    """Tell whether a result is plain vectors: a list of lists of floats, or an array."""
    result = bare(result)
    return result == list[list[float]] or foreign.is_array(result)
