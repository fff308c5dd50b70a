"""TLS for the server: a certificate and its key, which may be replaced while it runs."""

import ssl
from typing import Self

from chains_stream.errors import ChainsUsageError
from chains_stream.settings import Settings

HANDSHAKE_SECONDS = 10.0  # that a client has for its part of a handshake
SHUTDOWN_SECONDS = 3.0  # that it has to answer the end of a connection, and to take what is not in the socket yet


class Tls:
    """A certificate with its key. Raises ChainsUsageError if there is none in the files.

    Attributes:
        context: for the server; connections that are made from `reload` on get the new certificate.
    """

    context: ssl.SSLContext

    def __init__(self, certfile: str, keyfile: str | None, password: str | None) -> None:
        self._certfile = certfile
        self._keyfile = keyfile
        self._password = password
        self._current = self._build()
        self.context = self._build()
        self.context.sni_callback = self._use_current

    @classmethod
    def of(cls, settings: Settings) -> Self | None:
        """Give what is configured, or None if nothing is. Raises ChainsUsageError."""
        if settings.tls_certfile is None:
            if settings.tls_keyfile is not None:
                raise ChainsUsageError("CHAINS_TLS_KEYFILE: there is no certificate to it (CHAINS_TLS_CERTFILE)")
            return None
        secret = settings.tls_key_password
        password = None if secret is None else secret.get_secret_value()
        return cls(settings.tls_certfile, settings.tls_keyfile, password)

    def reload(self) -> None:
        """Read the files again. Raises ChainsUsageError; then the old certificate stays."""
        # A context of its own: one keeps a certificate of each kind of key, and would go on to choose the old one.
        self._current = self._build()

    def _use_current(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:  # noqa: ARG002 - ssl's
        """Have a handshake go on with the certificate that counts now, whether the client names a host or not."""
        connection.context = self._current

    def _build(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        self._load(context)
        return context

    def _load(self, context: ssl.SSLContext) -> None:
        asked = False

        def password() -> str:
            # Always given: for an encrypted key without one OpenSSL would ask on the terminal, and wait.
            nonlocal asked
            asked = True
            return self._password or ""

        for variable, path in (("CERTFILE", self._certfile), ("KEYFILE", self._keyfile)):
            if path is not None:
                _check_readable(f"CHAINS_TLS_{variable}", path)
        try:
            context.load_cert_chain(self._certfile, self._keyfile, password)
        except (ssl.SSLError, ValueError) as error:
            raise ChainsUsageError(self._explain(error, asked=asked)) from error

    def _explain(self, error: Exception, *, asked: bool) -> str:
        reason = getattr(error, "reason", None) or str(error)
        key = self._keyfile or self._certfile
        if asked and reason != "KEY_VALUES_MISMATCH":
            how = "does not open it" if self._password else "is needed"
            return f"CHAINS_TLS_KEY_PASSWORD: the key in {key} is encrypted, and a password {how}"
        if reason == "KEY_VALUES_MISMATCH":
            return f"CHAINS_TLS_KEYFILE: the key in {key} does not belong to the certificate in {self._certfile}"
        return f"CHAINS_TLS_CERTFILE: {self._certfile} and {key} hold no certificate with its key in PEM ({reason})"


def _check_readable(variable: str, path: str) -> None:
    try:
        with open(path, "rb"):  # noqa: PTH123 - a setting is a text
            pass
    except OSError as error:
        raise ChainsUsageError(f"{variable}: can't read {path}: {error.strerror}") from error
