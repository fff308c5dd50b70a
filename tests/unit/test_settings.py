"""The settings of a process: from keywords, from the environment, and what is said of a wrong one."""

import os
from collections.abc import Callable

import pytest

from chains_stream.errors import ChainsUsageError
from chains_stream.settings import KafkaSettings, Settings, from_environment, misspelled

Set = Callable[..., None]


@pytest.fixture(autouse=True)
def set_variables(monkeypatch: pytest.MonkeyPatch) -> Set:
    for name in os.environ:
        if name.startswith("CHAINS_"):
            monkeypatch.delenv(name)

    def set_variables(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_variables


def test_without_anything_given_they_are_the_defaults() -> None:
    settings = from_environment()
    assert settings == Settings()
    assert settings.model_fields_set == set()


def test_every_setting_has_its_variable(set_variables: Set) -> None:
    set_variables(CHAINS_BROKER="kafka://a:1,b:2", CHAINS_NAMESPACE="mine", CHAINS_PORT="0", CHAINS_DEADLINE="1.5")
    settings = from_environment()
    assert (settings.broker, settings.namespace, settings.port, settings.deadline) == (
        "kafka://a:1,b:2",
        "mine",
        0,
        1.5,
    )
    assert settings.model_fields_set == {"broker", "namespace", "port", "deadline"}


def test_those_of_kafka_have_theirs(set_variables: Set) -> None:
    set_variables(
        CHAINS_KAFKA_SECURITY_PROTOCOL="SASL_SSL",
        CHAINS_KAFKA_SASL_MECHANISM="PLAIN",
        CHAINS_KAFKA_SASL_USERNAME="ada",
        CHAINS_KAFKA_SASL_PASSWORD="hunter2",
        CHAINS_KAFKA_SESSION_TIMEOUT_MS="20000",
    )
    kafka = from_environment().kafka
    assert kafka.sasl_password is not None
    assert kafka.sasl_password.get_secret_value() == "hunter2"
    assert (kafka.security_protocol, kafka.sasl_username, kafka.session_timeout_ms) == ("SASL_SSL", "ada", 20_000)
    assert "hunter2" not in repr(kafka) + str(kafka)


def test_a_flag_wins_over_its_variable(set_variables: Set) -> None:
    set_variables(CHAINS_PORT="many", CHAINS_HOST="0.0.0.0")
    settings = from_environment(port="8080", host=None)
    assert (settings.port, settings.host) == (8080, "0.0.0.0")


def test_an_empty_variable_is_none(set_variables: Set) -> None:
    set_variables(CHAINS_PORT="", CHAINS_KAFKA_SASL_USERNAME="")
    assert from_environment() == Settings()


@pytest.mark.parametrize(
    ("variables", "flags", "said"),
    [
        ({"CHAINS_PORT": "many"}, {}, "CHAINS_PORT: should be a valid integer (got 'many')"),
        ({"CHAINS_PORT": "8000"}, {"port": "-1"}, "--port: should be greater than or equal to 0 (got '-1')"),
        ({}, {"health_port": "x"}, "--health-port: should be a valid integer (got 'x')"),
        ({"CHAINS_LOG_FORMAT": "xml"}, {}, "CHAINS_LOG_FORMAT: should be 'console' or 'json' (got 'xml')"),
        (
            {"CHAINS_KAFKA_SASL_MECHANISM": "GSSAPI"},
            {},
            "CHAINS_KAFKA_SASL_MECHANISM: should be 'PLAIN', 'SCRAM-SHA-256' or 'SCRAM-SHA-512' (got 'GSSAPI')",
        ),
        ({"CHAINS_KAFKA": "nothing"}, {}, "CHAINS_KAFKA: should be JSON"),
        ({"CHAINS_SECRET": "short"}, {}, "CHAINS_SECRET: should have at least 16 characters"),
        (
            {"CHAINS_KAFKA_SASL_PASWORD": "hunter2"},
            {},
            "CHAINS_KAFKA_SASL_PASWORD: there is no such setting; did you mean CHAINS_KAFKA_SASL_PASSWORD?",
        ),
    ],
)
def test_a_wrong_value_names_itself_its_source_and_what_is_allowed(
    set_variables: Set, variables: dict[str, str], flags: dict[str, str], said: str
) -> None:
    set_variables(**variables)
    with pytest.raises(ChainsUsageError) as caught:
        from_environment(**flags)
    assert str(caught.value) == said


def test_all_wrong_values_are_told_at_once() -> None:
    with pytest.raises(ChainsUsageError) as caught:
        Settings.of(port="x", namespace="a b", nmaespace="c")
    assert str(caught.value).split("; ") == [
        "namespace: should match pattern '^[A-Za-z0-9_-]{1,60}$' (got 'a b')",
        "port: should be a valid integer (got 'x')",
        "nmaespace: there is no such setting",
        "did you mean namespace?",
    ]


@pytest.mark.parametrize(
    "variables",
    [
        {"CHAINS_KAFKA": '["hunter2"]'},
        {"CHAINS_KAFKA": "hunter2"},
        {"CHAINS_KAFKA": '{"sasl_password": ["hunter2"]}'},
        {"CHAINS_KAFKA_SSL_PASWORD": "hunter2"},
    ],
)
def test_a_password_is_never_shown(set_variables: Set, variables: dict[str, str]) -> None:
    set_variables(**variables)
    with pytest.raises(ChainsUsageError) as caught:
        from_environment()
    assert "hunter2" not in str(caught.value)
    assert caught.value.__suppress_context__


def test_variables_that_look_like_settings_are_found() -> None:
    known = ["PATH", "CHAINS_PORT", "CHAINS_SECRETS_DIR", "CHAINS_ENVIRONMENT"]
    meant = {"CHAINS_NAMESPCE": "CHAINS_NAMESPACE", "CHAINS_KAFKA_SASL_USER": "CHAINS_KAFKA_SASL_USERNAME"}
    assert misspelled([*known, *meant]) == meant


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings().port = 1
    with pytest.raises(ValueError, match="frozen"):
        KafkaSettings().sasl_username = "x"
