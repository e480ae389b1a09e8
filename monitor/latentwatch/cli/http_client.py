"""How verbs talk HTTP: to collectors, to Prometheus and Alertmanager, to a model's server.

Proxies and authorities are those of the environment and the system, but this host itself is asked without any. A GET
follows redirects, and shows its token to the host it was given for only; a POST follows none, since it would arrive as
a GET. An answer has a bound.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import httpx

from latentwatch import host
from latentwatch.errors import ConfigRefused, RefusalReason

_MAX_REDIRECTS: Final = 5
_THIS_HOST: Final = ("localhost", "127.0.0.1", "[::1]")
"""Where a redirect may lead to."""


@dataclass(frozen=True)
class Web:
    """One HTTP service. Every method raises ConfigRefused, "unreachable"."""

    url: str
    token: str = ""
    timeout_seconds: float = 5.0
    """To connect, and between two pieces of the answer."""
    max_bytes: int = 64 << 20

    def get(self, path: str, **query: str) -> bytes:
        """What stands behind a path."""
        return self._asked("GET", path, params=query)

    def json(self, path: str, **query: str) -> Any:
        """The JSON behind a path."""
        try:
            return json.loads(self.get(path, **query))
        except ValueError as error:
            raise self._unreachable(f"{path} answers no JSON: {error}") from error

    def post(self, path: str, body: Any, headers: Mapping[str, str]) -> bytes:
        """The answer to a JSON body."""
        return self._asked("POST", path, json=body, headers=headers)

    def _asked(self, method: str, path: str, **content: Any) -> bytes:
        if not self.url.startswith(("http://", "https://")):
            raise self._unreachable("it does not begin with http:// or https://")
        if "@" in self.url.partition("://")[2].partition("/")[0]:
            raise ConfigRefused(
                "the address of an HTTP service",
                found="it holds a name or a password, which every user of this host sees in the list of processes",
                instead="Give the address alone, and a token with --token-file.",
                reason=RefusalReason.UNREACHABLE,
            )
        try:
            with (
                self._client() as client,
                client.stream(
                    method, self.url.rstrip("/") + path, follow_redirects=method == "GET", **content
                ) as answer,
            ):
                if not answer.is_success:
                    raise self._unreachable(f"{path} answers {answer.status_code} {answer.reason_phrase}")
                found = bytearray()
                for piece in answer.iter_bytes():
                    found += piece
                    if len(found) > self.max_bytes:
                        raise self._unreachable(f"{path} answers more than {self.max_bytes} bytes")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._unreachable(str(error) or type(error).__name__) from error
        return bytes(found)

    def _client(self) -> httpx.Client:
        try:
            return httpx.Client(
                headers={"authorization": f"Bearer {self.token}"} if self.token else {},
                timeout=self.timeout_seconds,
                max_redirects=_MAX_REDIRECTS,
                # The authorities that the system trusts; httpx brings its own list otherwise.
                verify=ssl.create_default_context(),
                # A proxy that httpx cannot speak with is refused even for what would not go through it.
                trust_env=not host.is_loopback(httpx.URL(self.url).host),
                mounts={f"all://{name}": None for name in _THIS_HOST},
            )
        except (ImportError, ValueError) as error:
            raise ConfigRefused(
                f"proxy for {self.url}",
                found=f"{error}",
                instead="Correct http_proxy, https_proxy and all_proxy, or unset them.",
                reason=RefusalReason.UNREACHABLE,
            ) from error

    def _unreachable(self, found: str) -> ConfigRefused:
        return ConfigRefused(self.url, found=found, instead="Check the address.", reason=RefusalReason.UNREACHABLE)
