"""What an operator sets, and the bounds of the collector: what it keeps, for how long, and from how many engines.

Each option has one name: `--evidence-days` on the command line, `LATENTWATCH_SETTING_EVIDENCE_DAYS` in the environment
and `evidence-days` in the file. A flag counts before the environment, the environment before the file, the file before
the default. A name that nobody knows is refused wherever it stands. A secret is never a value here: it lies in a file,
and the option has its path.
"""

from __future__ import annotations

import difflib
import os
import re
import reprlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Final, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from latentwatch import secrets
from latentwatch.errors import ConfigRefused, RefusalReason, WatchlistRefused

ENVIRONMENT: Final = "LATENTWATCH_SETTING_"
"""Not LATENTWATCH_COLLECTOR_: engines have variables of that name, and so has Kubernetes for a Service."""
_OF_FORWARDING: Final = ("forward_name", "forward_ca", "forward_cert", "forward_key", "forward_token_file")


@dataclass(frozen=True)
class Metavar:
    """What stands for the value in the help."""

    text: str


File = Annotated[Path, Metavar("FILE")]
Url = Annotated[str, Metavar("URL"), Field(pattern="^https?://")]
Folder = Annotated[Path, Metavar("FOLDER")]
Count = Annotated[int, Metavar("N"), Field(gt=0)]
Amount = Annotated[float, Metavar("N"), Field(gt=0, allow_inf_nan=False)]


class CollectorConfig(BaseSettings):
    """The options of a collector. The text under each is its help."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_prefix=ENVIRONMENT, env_ignore_empty=True, use_attribute_docstrings=True
    )

    watchlist: File
    """the built watchlist; engines that score with another one are refused"""
    listen: tuple[Annotated[str, Metavar("ADDRESS")], ...] = ("unix:///run/latentwatch/collector.sock",)
    """where engines connect, unix:///path or host:port; may be given more than once"""
    insecure: bool = False
    """listen on addresses that other hosts reach although neither TLS nor a token guards them; without it they are
    refused"""
    http: Annotated[str, Metavar("HOST:PORT")] = "127.0.0.1:9464"
    """where /metrics, the API and the live page are served; beyond loopback give it a token"""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """from which level on it logs, to standard error"""
    log_format: Literal["text", "json"] = "text"
    """as lines of text, or as a JSON object a line"""
    state: Folder | None = None
    """keep counters and running requests in this folder, so that a collector that was killed goes on where it was
    (default: in memory)"""
    baseline: File | None = None
    """measure drift against this baseline, as 'latentwatch calibrate' wrote it (default: only collect what one can be
    calibrated from)"""
    canary_key: File | None = None
    """the key that 'latentwatch canary' signs its requests with, so that they are compared with each other instead of
    counted as traffic"""
    route: Annotated[re.Pattern[str], Metavar("REGEX")] | None = None
    """what this finds in a request's id is its route, or what its first group finds; each of some 8 routes and adapters
    has rates of its own in the baseline (default: adapters only)"""
    request_id_key_file: File | None = None
    """hold request ids as hashes under the key in this file, which only its owner may read; a request is still found by
    its clear id (default: ids are held as they are)"""

    token_file: tuple[File, ...] = ()
    """ask engines for this bearer token; may be given more than once, for rotation"""
    peer_streams: Count = 256
    """connections and streams of engines from one address (of IPv6 from one /64), or through the Unix sockets; engines
    behind one address translation share them"""
    tls_cert: File | None = None
    """PEM certificate for TCP addresses of --listen"""
    tls_key: File | None = None
    """its key"""
    tls_client_ca: File | None = None
    """ask engines for a certificate of this authority that names their replica"""

    http_token_file: tuple[File, ...] = ()
    """ask for this token over HTTP, as Bearer or as the password of Basic; may be given more than once"""
    http_tls_cert: File | None = None
    """PEM certificate: serve --http over TLS"""
    http_tls_key: File | None = None
    """its key"""

    http_host: tuple[Annotated[str, Metavar("NAME")], ...] = ()
    """a name under which this is asked over HTTP, such as that of a Service or of a proxy; may be given more than once.
    Addresses, localhost and the name in --http need none; any other Host is refused"""
    http_connections: Count = 128
    """HTTP connections at once; beyond it those that wait are closed, the oldest of whoever has most first; /healthz
    and /metrics are still answered"""
    http_peer_connections: Count = 64
    """of them, from one address; of IPv6 from one /64"""
    http_body_mib: Amount = 16.0
    """largest body that is read, MiB: what was said in a request"""

    runbook_url: Url | None = None
    """where you publish dashboards/runbook.md, such as https://wiki.example.org/latentwatch; the live page links to it
    (default: no link)"""
    grafana_url: Url | None = None
    """of your Grafana, such as https://grafana.example.org; the live page links to its dashboards (default: no link)"""

    forward_to: Annotated[str, Metavar("ADDRESS")] | None = None
    """tell this collector, the gateway, once a second what is counted here, and a row for each request (default:
    nothing is forwarded)"""
    forward_name: Annotated[str, Metavar("NAME")] | None = None
    """what the gateway calls this collector; each needs a name of its own (default: the host's name)"""
    forward_ca: File | None = None
    """authority of the gateway's certificate"""
    forward_cert: File | None = None
    """certificate to show the gateway"""
    forward_key: File | None = None
    """its key"""
    forward_token_file: File | None = None
    """bearer token to show the gateway"""

    evidence: Folder | None = None
    """write exceedances, with the activations of their requests, to this folder (default: nothing is written)"""
    evidence_days: Amount = 30.0
    """remove evidence before it is so old"""
    evidence_gib: Amount = 10.0
    """remove the oldest evidence before all of it is so large"""
    evidence_keep: Literal["exceeded", "all"] = "exceeded"
    """which requests to write down: those that exceeded a limit, or all"""
    evidence_token: File | None = None
    """who sends this file's content as bearer token may delete over HTTP, and put and get what was said (default:
    nobody)"""
    evidence_readers: Literal["token", "everyone"] = "token"
    """who may read evidence over HTTP where --http is no loopback and asks for no token: nobody without the token of
    --evidence-token, or everyone"""
    evidence_key: File | None = None
    """keep what a gateway says was said in a kept request, encrypted with the key in this file; 'latentwatch evidence
    key' makes one (default: nothing that was said is kept)"""
    evidence_content_hours: Amount = 24.0
    """remove what was said before it is so old"""

    otlp: Annotated[str, Metavar("URL"), Field(pattern="^(https?://|env$)")] | None = None
    """send every exceedance as a gen_ai.evaluation.result event, in the trace of its request, to this OTLP/gRPC
    receiver, such as http://127.0.0.1:4317 or https:// for TLS; 'env': to the one of OTEL_EXPORTER_OTLP_ENDPOINT
    (default: nothing is sent)"""
    otlp_metrics: Annotated[float, Metavar("SECONDS"), Field(ge=0, allow_inf_nan=False)] = 0.0
    """with --otlp: send the metrics too, so often; 0 leaves them to be scraped"""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        """Raises ConfigRefused, "tls_unusable" or "forward", where a part lacks what it needs."""
        if self.tls_cert or self.tls_key or self.tls_client_ca:
            secrets.check_together("TLS of the collector", self._files("tls_cert", "tls_key"))
        if self.http_tls_cert or self.http_tls_key:
            secrets.check_together("TLS over HTTP", self._files("http_tls_cert", "http_tls_key"))
        if self.otlp and "@" in urlsplit(self.otlp).netloc:
            raise ConfigRefused(
                "--otlp",
                found="its URL holds a name or a password, which every user of this host sees in the list of processes",
                instead="Give them as OTEL_EXPORTER_OTLP_HEADERS in the environment.",
                reason=RefusalReason.CONFIG_VALUE,
            )
        if self.forward_to is None and (extra := [name for name in _OF_FORWARDING if getattr(self, name)]):
            raise ConfigRefused(
                "forwarding to a gateway",
                found=f"--{flag(extra[0])} is given, and --forward-to is not",
                instead="Give --forward-to HOST:PORT too.",
                reason=RefusalReason.FORWARD,
            )
        if self.forward_cert or self.forward_key:
            secrets.check_together("TLS to the gateway", self._files("forward_cert", "forward_key", "forward_ca"))
        return self

    def _files(self, *names: str) -> dict[str, Path | None]:
        return {f"--{flag(name)}": getattr(self, name) for name in names}

    # The library passes each source by name, so those that are not used keep theirs.
    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what the constructor is given: `read` looks at the environment, and names what it finds there."""
        return (init_settings,)

    @classmethod
    def read(cls, flags: Mapping[str, object], file: Path | None = None) -> Self:
        """What flags (by field), environment and file say together.

        Raises: ConfigRefused: "config_missing", "config_file", "config_unknown", "config_value", "tls_unusable" or
                "forward".
        """
        in_file = _read(file) if file else {}
        _check_known(in_file, {flag(name) for name in cls.model_fields}, f"in {file}")
        here = [name for name in os.environ if name.startswith(ENVIRONMENT)]
        _check_known(here, {variable(name) for name in cls.model_fields}, "in the environment")
        in_environment = _Environment(cls)()
        by_field = {name: in_file[flag(name)] for name in cls.model_fields if flag(name) in in_file}
        try:
            return cls.model_validate({**by_field, **in_environment, **flags})
        except ValidationError as error:
            wrong = error.errors(include_url=False)[0]
            name = str(wrong["loc"][0])
            if name in flags:
                where = f"--{flag(name)}"
            else:
                where = variable(name) if name in in_environment else f"{flag(name)} in {file}"
            raise _refused(name, cls.model_fields[name], wrong, where) from error

    @classmethod
    def file_schema(cls) -> dict[str, object]:
        """The JSON Schema (2020-12) of the file."""
        made = cls.model_json_schema()
        for option in made["properties"].values():
            del option["title"]
        return {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": "The file of latentwatch collector --config",
            "type": "object",
            "properties": {flag(name): option for name, option in made["properties"].items()},
            "additionalProperties": False,
        }


def flag(name: str) -> str:
    """The option of a field, without its dashes."""
    return name.replace("_", "-")


def variable(name: str) -> str:
    """The variable of a field."""
    return f"{ENVIRONMENT}{name.upper()}"


class _Environment(EnvSettingsSource):
    """As the library's, but for lists: values with commas between them instead of JSON."""

    # The library's signature.
    def decode_complex_value(self, field_name: str, field: FieldInfo, value: str) -> list[str]:  # noqa: ARG002
        return [part.strip() for part in value.split(",")]


def _read(path: Path) -> dict[str, object]:
    from latentwatch.watchlist.document import Document  # not for the help: it takes longer than the rest of it

    try:
        read = Document(str(path), path.read_bytes()).value
        found = "" if read is None or isinstance(read, dict) else f"it holds {reprlib.repr(read)}, not options"
    except WatchlistRefused as refusal:
        what = f"--config {refusal.what}"
        raise ConfigRefused(
            what, found=refusal.found, instead=refusal.instead, reason=RefusalReason.CONFIG_FILE
        ) from refusal
    except OSError as error:
        read, found = None, error.strerror or str(error)
    if found:
        instead = "Give a YAML file of lines such as 'http: 127.0.0.1:9464'."
        raise ConfigRefused(f"--config {path}", found=found, instead=instead, reason=RefusalReason.CONFIG_FILE)
    return dict(read) if isinstance(read, dict) else {}


def _check_known(names: Collection[str], known: Collection[str], where: str) -> None:
    for name in sorted(set(names) - set(known)):
        close = difflib.get_close_matches(name, known, 1)
        raise ConfigRefused(
            f"{name} {where}",
            found="no option of the collector has this name",
            instead=f"Did you mean {close[0]}?" if close else f"Give one of {', '.join(sorted(known))}.",
            reason=RefusalReason.CONFIG_UNKNOWN,
        )


def _refused(name: str, field: FieldInfo, wrong: Mapping[str, object], where: str) -> ConfigRefused:
    meaning = " ".join(str(field.description).split())
    if wrong["type"] == "missing":
        return ConfigRefused(
            f"--{flag(name)}",
            found="it is not given",
            instead=f"Give it, or {variable(name)}, or {flag(name)} in the file of --config: {meaning}.",
            reason=RefusalReason.CONFIG_MISSING,
        )
    # A file has lists; that they become tuples is no concern of who writes it.
    found = f"{reprlib.repr(wrong['input'])}: {str(wrong['msg']).replace('tuple', 'list')}"
    return ConfigRefused(where, found=found, instead=f"It is for this: {meaning}.", reason=RefusalReason.CONFIG_VALUE)


@dataclass(frozen=True)
class Bounds:
    """Each bound caps memory; what falls out of one is counted on /metrics."""

    open_requests: int = 4096
    """Requests with running statistics: twice vLLM's usual --max-num-seqs for 8 engines of 256.
    Each costs 13 bytes a feature."""
    evict_after_seconds: float = 60.0
    """When all slots are taken, one that was quiet for so long goes to the newcomer. If none was, the newcomer's tokens
    are counted but it gets no statistics of its own: evicting requests that run would cost more and keep nothing."""
    closed_requests: int = 10_000
    """Request summaries kept after the end, for the API and the live page."""
    flagged_requests: int = 2_000
    """Summaries with an exceedance that are kept beyond `closed_requests`: those are the ones that are looked up."""
    summary_features: int = 128
    """Features kept per summary, the most abnormal ones; a summary names how many it left out."""
    exceedances: int = 10_000
    """Exceedance events kept for the API and the live page."""
    replicas: int = 256
    """Engine processes known at one time; a further one is refused."""
    models: int = 8
    """Served model names; each has a series per feature, so they are the factor of the series count."""
    feature_samples: int = 300_000
    """Samples on /metrics that have a feature as a label, over all models: 8 models of 1,024 features with all that is
    known of each are 211,900. What is beyond is withheld, and how much is on the live page too."""
    boots_per_replica: int = 4
    """Boots whose sequence marks are kept, so that a late resend of an earlier boot is not counted twice."""
    sequence_marks: int = 4096
    """Sequence marks kept of boots that are forgotten otherwise: an engine that was cut off for an hour sends again
    what it was never told had arrived. About 300 bytes each."""
    stream_gone_seconds: float = 600.0
    """Without a stream for so long, a boot's open requests are closed as lost."""
    forward_bytes: int = 32 << 20
    """Rows of ended requests that wait for a gateway, bytes; beyond it the oldest without an exceedance go first."""
    request_idle_seconds: float = 3600.0
    """Without a token for so long, a request is closed as lost: its engine forgot to say how it ended."""
    name_idle_seconds: float = 86_400.0
    """Without a stream and an open request for so long, what was counted of a model name or engine goes. Sooner where
    another one needs the place."""
    replica_forgotten_seconds: float = 900.0
    """Without a stream for so long, a replica's health series go: long enough for an alert, and a pod that was replaced
    does not stay for ever."""
    window_seconds: float = 2.0
    """Width of a point on the live page; the live page asks as often."""
    windows: int = 180
    """Points kept: six minutes."""

    def __post_init__(self) -> None:
        for bound in fields(self):
            value = getattr(self, bound.name)
            if not value > 0:
                raise ConfigRefused(
                    f"bound {bound.name}",
                    found=f"it is {value!r}",
                    instead="Give a number above 0.",
                    reason=RefusalReason.CONFIG_VALUE,
                )
