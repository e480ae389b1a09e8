"""Who may open a stream: certificates and bearer tokens, read from files that may be replaced at any time.

Nothing here opens a socket. Files are looked at again for every connection, so that a rotated certificate, authority or
token counts from the next connection on and no process has to start again. A private key is a secret, of which
`secrets` says who may read it; certificates and authorities may be for everyone.
"""

from __future__ import annotations

import hmac
import logging
import ssl
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc

from latentwatch import secrets
from latentwatch.errors import ConfigRefused, RefusalReason
from latentwatch.log_limit import LogLimit

log = logging.getLogger(__name__)

_LOG_AGAIN_SECONDS: Final = 600.0
CERTIFICATE: Final = "LATENTWATCH_COLLECTOR_CERT"
"""PEM certificate that the engine shows the collector; it names LATENTWATCH_REPLICA"""
KEY: Final = "LATENTWATCH_COLLECTOR_KEY"
"""its key, which only its owner may read"""
AUTHORITY: Final = "LATENTWATCH_COLLECTOR_CA"
"""PEM authority of the collector's certificate; without it the stream is not encrypted"""
TOKEN_FILE: Final = "LATENTWATCH_COLLECTOR_TOKEN_FILE"  # noqa: S105, the name of a variable
"""file with the bearer token that the collector asks engines for"""


class Tokens:
    """The bearer tokens that are accepted, one a file: two files while one is rotated out."""

    def __init__(
        self, files: Sequence[Path], what: str = "token file", reason: RefusalReason = RefusalReason.TOKEN_UNUSABLE
    ) -> None:
        """Raises: ConfigRefused, for this reason."""
        self._files = tuple(files)
        self._what = what
        self._reason = reason
        self._may_log = LogLimit(_LOG_AGAIN_SECONDS, time.monotonic)
        self._read()

    def __contains__(self, token: str) -> bool:
        """Whether this is one of them, by the files as they are now."""
        try:
            known = self._read()
        except ConfigRefused as refusal:
            if self._may_log("token"):
                log.error("nobody is let in: %s", refusal)
            return False
        # All are compared, each in constant time, and as bytes: a text beyond ASCII is an error there.
        shown = token.encode("utf-8", "surrogatepass")
        return sum([hmac.compare_digest(shown, one.encode()) for one in known]) > 0

    def accept(self, authorization: str) -> bool:
        """Whether a stream shows one of them: `Bearer TOKEN`."""
        scheme, _, token = authorization.partition(" ")
        return scheme.lower() == "bearer" and token.strip() in self

    def _read(self) -> list[str]:
        return [secrets.read_token(path, self._what, self._reason) for path in self._files]


@dataclass(frozen=True)
class ServerTls:
    """A collector's certificate, and the authority whose certificates engines must show."""

    certificate: Path
    key: Path
    client_authority: Path | None = None
    """None: engines need no certificate."""

    protocol: str = "h2"
    """What is spoken behind it, as ALPN names it."""

    def context(self) -> ssl.SSLContext:
        """From the files as they are now. Raises ConfigRefused, "tls_unusable"."""
        _read_key(self.key)
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            context.set_alpn_protocols([self.protocol])
            context.load_cert_chain(self.certificate, self.key)
            if self.client_authority is not None:
                context.verify_mode = ssl.CERT_REQUIRED
                context.load_verify_locations(self.client_authority)
        except OSError as error:  # ssl.SSLError is one
            raise _unusable(self.certificate, error) from error
        return context


@dataclass(frozen=True)
class Credentials:
    """What an engine shows a collector, and how it knows the collector."""

    authority: Path | None = None
    """Authority of the collector's certificate; None: no TLS."""
    certificate: Path | None = None
    key: Path | None = None
    token_file: Path | None = None

    def __post_init__(self) -> None:
        if self.certificate or self.key:
            needed = {CERTIFICATE: self.certificate, KEY: self.key, AUTHORITY: self.authority}
            secrets.check_together("credentials for the collector", needed)

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Credentials:
        """From LATENTWATCH_COLLECTOR_CA, _CERT, _KEY and _TOKEN_FILE. Raises ConfigRefused, "tls_unusable"."""
        authority, certificate, key, token = (
            Path(env[name]) if env.get(name) else None for name in (AUTHORITY, CERTIFICATE, KEY, TOKEN_FILE)
        )
        return cls(authority, certificate, key, token)

    def channel(self, target: str, options: Sequence[tuple[str, Any]]) -> grpc.Channel:
        """A channel by the files as they are now. Raises ConfigRefused, "tls_unusable"."""
        tls = self._tls()
        return grpc.secure_channel(target, tls, options) if tls else grpc.insecure_channel(target, options)

    def aio_channel(self, target: str, options: Sequence[tuple[str, Any]]) -> grpc.aio.Channel:
        """The same for an event loop."""
        tls = self._tls()
        return grpc.aio.secure_channel(target, tls, options) if tls else grpc.aio.insecure_channel(target, options)

    def _tls(self) -> grpc.ChannelCredentials | None:
        if self.authority is None:
            return None
        try:
            authority = self.authority.read_bytes()
            certificate = self.certificate.read_bytes() if self.certificate else None
        except OSError as error:
            raise _unusable(self.authority, error) from error
        return grpc.ssl_channel_credentials(authority, _read_key(self.key) if self.key else None, certificate)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What each stream carries beside its messages. Raises ConfigRefused, "token_unusable"."""
        return (("authorization", f"Bearer {secrets.read_token(self.token_file)}"),) if self.token_file else ()


def names_of(certificate: Mapping[str, Any] | None) -> frozenset[str]:
    """Names that a verified certificate, as `ssl` gives it, stands for: its DNS and URI alternative names."""
    alternatives = (certificate or {}).get("subjectAltName", ())
    return frozenset(name for kind, name in alternatives if kind in ("DNS", "URI"))


def may_speak_for(names: frozenset[str], replica: str) -> bool:
    """Whether a peer with these names is `replica`: NAME itself, or NAME/engine as the plugin makes it."""
    return bool(names & {replica, replica.rpartition("/")[0]} - {""})


def _read_key(path: Path) -> bytes:
    return secrets.read(path, "TLS key", RefusalReason.TLS_UNUSABLE)


def _unusable(path: Path, error: OSError) -> ConfigRefused:
    return ConfigRefused(
        f"TLS with {path}",
        found=f"{type(error).__name__}: {error}",
        instead="Give PEM files that this process can read: a certificate with its chain, its key, the authorities.",
        reason=RefusalReason.TLS_UNUSABLE,
    )
