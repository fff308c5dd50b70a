"""What a Chain file is told by --set."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pydantic
import pytest

import chains_stream as chains
from chains_stream.chain import Chain
from chains_stream.errors import ChainsUsageError

FILE = """
import pydantic
import chains_stream as chains

class Options(pydantic.BaseModel):
    model: str | None = None
    places: int = 1
    loras: dict[str, str] = {}

options = chains.parameters(Options)

@chains.mark_entrypoint
class Answer(chains.ChainletBase):
    remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=options.places))
    told = options

    async def run_remote(self) -> str:
        return str(options.model)
"""


class Options(pydantic.BaseModel):
    model: str
    size: Literal["small", "large"] = "small"
    places: int = 1
    eager: bool = False
    ratio: float | None = None
    loras: dict[str, str] = {}
    stops: list[str] = []


def told(**values: Any) -> Options:
    with chains.parameter_values(**values):
        return chains.parameters(Options)


@pytest.fixture
def chain_file(tmp_path: Path) -> str:
    path = tmp_path / "told.py"
    path.write_text(FILE)
    return str(path)


def test_text_becomes_what_the_field_is() -> None:
    options = told(model="{% a %}", places="8", eager="true", ratio="0.5", loras='{"a": "/a"}', stops='["x"]')
    assert options == Options(model="{% a %}", places=8, eager=True, ratio=0.5, loras={"a": "/a"}, stops=["x"])


def test_values_of_a_program_are_taken_as_they_are() -> None:
    assert told(model="a", stops=["b"]).stops == ["b"]


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({}, "parameter `model` is missing: give it with --set model=…"),
        ({"model": "a", "places": "many"}, "parameter `places` should be a valid integer (got 'many')"),
        ({"model": "a", "size": "huge"}, "parameter `size` should be 'small' or 'large' (got 'huge')"),
        ({"model": "a", "loras": "[1"}, "parameter `loras` should be a valid dictionary (got '[1')"),
        ({"model": "a", "plases": "8"}, "it takes no parameter `plases`: did you mean `places`?"),
        (
            {"model": "a", "x": "8"},
            "it takes no parameter `x`; it takes eager, loras, model, places, ratio, size, stops",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(values: dict[str, Any], line: str) -> None:
    with pytest.raises(ChainsUsageError, match=f"^{re.escape(line)}$"):
        told(**values)


def test_what_is_wrong_with_several_together_shows_none_of_them() -> None:
    class Access(pydantic.BaseModel):
        token: str | None = None
        user: str | None = None

        @pydantic.model_validator(mode="after")
        def _one(self) -> Self:
            if self.token and self.user:
                raise ValueError("give a token or a user, not both")
            return self

    with pytest.raises(ChainsUsageError) as caught, chains.parameter_values(token="s3cret", user="ada"):
        chains.parameters(Access)
    assert str(caught.value) == "the parameters of Access: give a token or a user, not both"


def test_a_secret_that_does_not_fit_is_not_shown() -> None:
    class Access(pydantic.BaseModel):
        token: Annotated[pydantic.SecretStr, pydantic.Field(min_length=20)] | None = None

    with (
        pytest.raises(ChainsUsageError, match=r"parameter `token` .*20 ") as caught,
        chains.parameter_values(token="s3cret"),
    ):
        chains.parameters(Access)
    assert "s3cret" not in str(caught.value)


def test_what_is_missing_in_a_field_is_not_asked_for_as_a_field() -> None:
    class Place(pydantic.BaseModel):
        host: str

    class Access(pydantic.BaseModel):
        place: Place

    with pytest.raises(ChainsUsageError) as caught, chains.parameter_values(place="{}"):
        chains.parameters(Access)
    assert str(caught.value) == "parameter `place.host` is missing"


def test_a_field_with_an_alias_is_told_by_its_name() -> None:
    class Served(pydantic.BaseModel):
        model_name: str = pydantic.Field("small", alias="model")
        places: list[int] = pydantic.Field([], validation_alias="seats")

    with chains.parameter_values(model_name="large", places="[1, 2]"):
        served = chains.parameters(Served)
    assert (served.model_name, served.places) == ("large", [1, 2])
    with pytest.raises(ChainsUsageError, match=r"^parameter `places` "), chains.parameter_values(places="many"):
        chains.parameters(Served)


def test_several_models_take_each_its_own() -> None:
    class More(pydantic.BaseModel):
        url: str = "none"

    with chains.parameter_values(model="a", url="b"):
        assert (chains.parameters(Options).model, chains.parameters(More).url) == ("a", "b")


def test_without_values_there_are_the_defaults(chain_file: str) -> None:
    cls: Any = Chain.load(chain_file).entrypoint
    assert (cls.told.model, cls.remote_config.compute.concurrency) == (None, 1)


def test_a_file_is_told_when_it_is_loaded(chain_file: str) -> None:
    cls: Any = Chain.load(chain_file, {"model": "a", "places": "7"}).entrypoint
    assert (cls.told.model, cls.remote_config.compute.concurrency) == ("a", 7)


def test_mistakes_name_the_file(chain_file: str, tmp_path: Path) -> None:
    with pytest.raises(ChainsUsageError, match=rf"^{re.escape(chain_file)}: it takes no parameter `modle`: did you"):
        Chain.load(chain_file, {"modle": "a"})
    with pytest.raises(ChainsUsageError, match=rf"^{re.escape(chain_file)}:10: parameter `places` should be"):
        Chain.load(chain_file, {"places": "a"})
    plain = tmp_path / "plain.py"
    plain.write_text("")
    with pytest.raises(ChainsUsageError, match=r"plain\.py: it takes no parameter `a`; it takes none at all"):
        Chain.load(str(plain), {"a": "b"})
