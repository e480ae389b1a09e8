"""OpenTelemetry's own variables: which of them count here, and what is refused of them before anything is sent.

The library's exporters read them. Where they would go on without what a variable asks for, this refuses instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from latentwatch import secrets
from latentwatch.errors import ConfigRefused, RefusalReason

FROM_ENVIRONMENT: Final = "env"
"""In place of a URL: the variables say where OTLP goes."""
_EXPORTER: Final = "OTEL_EXPORTER_OTLP_"
_SIGNALS: Final = ("", "LOGS_", "METRICS_")

VARIABLES: Final = {
    "ENDPOINT": "with `--otlp env`: where OTLP/gRPC goes, `http://HOST:4317`, or `https://` for TLS",
    "HEADERS": "what each call carries, such as `authorization=Bearer%20TOKEN`; commas between several",
    "CERTIFICATE": "PEM file of the authority that the receiver's certificate is checked against, else the system's",
    "CLIENT_CERTIFICATE": "PEM file of the certificate that is shown to the receiver; with the two beside it",
    "CLIENT_KEY": "its key, which only its owner may read",
    "TIMEOUT": "seconds that one sending may take, 10 if unset",
    "COMPRESSION": "`gzip`, or nothing",
    "PROTOCOL": "`grpc` or unset: no other is spoken, and any other value is refused",
}
"""By what follows OTEL_EXPORTER_OTLP_; the form with LOGS_ or METRICS_ between counts before it, for that signal."""
RESOURCE: Final = {
    "OTEL_SERVICE_NAME": "`service.name`, in place of `latentwatch-collector`",
    "OTEL_RESOURCE_ATTRIBUTES": "further attributes of the resource, or other values, `service.instance.id` included: "
    "`k8s.pod.name=a,deployment.environment.name=prod`",
    "OTEL_SDK_DISABLED": "`true`: nothing is sent, whatever else is set",
}


def disabled(env: Mapping[str, str]) -> bool:
    """Whether the environment turns OpenTelemetry off."""
    return env.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"


def endpoint(wanted: str, signal: str, env: Mapping[str, str]) -> str:
    """The URL for a signal, "logs" or "metrics": the one that is wanted, else that of the environment.

    Raises: ConfigRefused, "otlp_endpoint": the environment names none, or one that is no URL.
    """
    if wanted != FROM_ENVIRONMENT:
        return wanted
    names = (f"{_EXPORTER}{signal.upper()}_ENDPOINT", f"{_EXPORTER}ENDPOINT")
    found = next((env[name] for name in names if env.get(name)), "")
    if not found.startswith(("http://", "https://")):
        raise _refused(
            f"--otlp {FROM_ENVIRONMENT}",
            f"{names[1]} is {found!r}" if found else f"neither {names[0]} nor {names[1]} is set",
            "Set it to http://HOST:4317, or to https:// for TLS.",
        )
    return found


def check(env: Mapping[str, str]) -> None:
    """Raises: ConfigRefused: "otlp_endpoint" for another protocol; "tls_unusable" for files that cannot be used."""
    for signal in _SIGNALS:
        name = f"{_EXPORTER}{signal}PROTOCOL"
        if env.get(name, "grpc") != "grpc":
            raise _refused(
                name, f"it is {env[name]!r}", "Only grpc is spoken: give the receiver's gRPC port, or unset it."
            )
    for signal in _SIGNALS:
        _check_files(_EXPORTER + signal, env)


def _check_files(prefix: str, env: Mapping[str, str]) -> None:
    given = {name: Path(env[name]) for name in _files(prefix) if env.get(name)}
    if len(given) > 1 or any("CLIENT" in name for name in given):
        # The library shows no certificate where it was given no authority, and says nothing.
        secrets.check_together(f"{prefix}CLIENT_*", {name: given.get(name) for name in _files(prefix)})
    for name, path in given.items():
        if name.endswith("CLIENT_KEY"):
            secrets.read(path, name, RefusalReason.TLS_UNUSABLE)
        try:
            path.read_bytes()
        except OSError as error:
            raise ConfigRefused(
                f"{name}={path}",
                found=error.strerror or str(error),
                instead="Give a PEM file that this user can read, or unset it.",
                reason=RefusalReason.TLS_UNUSABLE,
            ) from error


def _files(prefix: str) -> Iterator[str]:
    return (f"{prefix}{part}" for part in ("CERTIFICATE", "CLIENT_CERTIFICATE", "CLIENT_KEY"))


def _refused(what: str, found: str, instead: str) -> ConfigRefused:
    return ConfigRefused(what, found=found, instead=instead, reason=RefusalReason.OTLP_ENDPOINT)
