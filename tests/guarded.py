"""A Kafka with SASL/PLAIN and ACLs: `admin` may do everything, `alice` nothing, `bob` what he is granted."""

from typing import Any

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.types import Array, Int8, Int16, Int32, Schema, String

from tests.kafka import Node

LOGIN = (
    "org.apache.kafka.common.security.plain.PlainLoginModule required "
    'username="admin" password="admin-secret" '
    'user_admin="admin-secret" user_alice="alice-secret" user_bob="bob-secret";'
)
SASL = (
    "listeners=SASL_PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}",
    "advertised.listeners=SASL_PLAINTEXT://127.0.0.1:{port}",
    "inter.broker.listener.name=SASL_PLAINTEXT",
    "sasl.mechanism.inter.broker.protocol=PLAIN",
    "listener.security.protocol.map=PLAINTEXT:PLAINTEXT,SASL_PLAINTEXT:SASL_PLAINTEXT,CONTROLLER:PLAINTEXT",
    "sasl.enabled.mechanisms=PLAIN",
    f"listener.name.sasl_plaintext.plain.sasl.jaas.config={LOGIN}",
    "authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer",
    "super.users=User:admin;User:ANONYMOUS",
)


def as_user(name: str, password: str | None = None) -> dict[str, Any]:
    return {
        "security_protocol": "SASL_PLAINTEXT",
        "sasl_username": name,
        "sasl_password": password or f"{name}-secret",
        "connect_timeout": 10,
    }


ADMIN = {
    "security_protocol": "SASL_PLAINTEXT",
    "sasl_plain_username": "admin",
    "sasl_plain_password": "admin-secret",
}
TOPIC, GROUP, TRANSACTIONAL_ID = 2, 3, 5
READ, WRITE, DESCRIBE = 3, 4, 8


class CreateAclsResponse(Response):  # type: ignore[misc] # aiokafka has no types
    """Of the API 30, which aiokafka lacks, in the one version of it that has no tagged fields."""

    API_KEY = 30
    API_VERSION = 1
    SCHEMA = Schema(("throttle_time_ms", Int32), ("results", Array(("error_code", Int16), ("error", String("utf-8")))))


class CreateAclsRequestStruct(RequestStruct):  # type: ignore[misc] # as above
    API_KEY = 30
    API_VERSION = 1
    RESPONSE_TYPE = CreateAclsResponse
    SCHEMA = Schema(
        (
            "creations",
            Array(
                ("resource_type", Int8),
                ("resource_name", String("utf-8")),
                ("pattern_type", Int8),
                ("principal", String("utf-8")),
                ("host", String("utf-8")),
                ("operation", Int8),
                ("permission", Int8),
            ),
        )
    )


class CreateAclsRequest(Request[CreateAclsRequestStruct]):  # type: ignore[misc] # as above
    API_KEY = 30

    def __init__(self, creations: list[tuple[Any, ...]]) -> None:
        self._creations = creations

    def build(self, request_struct_class: type[CreateAclsRequestStruct]) -> CreateAclsRequestStruct:
        return request_struct_class(self._creations)


async def grant(server: Node, user: str, kind: int, name: str, *rights: int, **login: Any) -> None:
    """Give a user rights on what has that name; `login` is that of an administrator: `admin` by default."""
    login = login or ADMIN
    admin = AIOKafkaAdminClient(bootstrap_servers=server.url.removeprefix("kafka://"), **login)
    await admin.start()
    try:
        literal = allow = 3
        acls = [(kind, name, literal, f"User:{user}", "*", right, allow) for right in rights]
        response = await admin._send_to_controller(CreateAclsRequest(acls))
        assert all(code == 0 for code, _ in response.results), response
    finally:
        await admin.close()
