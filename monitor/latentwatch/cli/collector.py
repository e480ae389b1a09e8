"""`latentwatch collector`: receive scores, keep the books, serve metrics, API and the live page."""

from __future__ import annotations

import argparse
import functools
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from latentwatch import host
from latentwatch.cli import log_lines, options
from latentwatch.errors import ConfigRefused, RefusalReason

if TYPE_CHECKING:
    from latentwatch.collector.config import CollectorConfig
    from latentwatch.collector.evidence import EvidenceSettings
    from latentwatch.collector.service import CollectorSettings, ForwardSettings, Service
    from latentwatch.collector.telemetry import TelemetrySettings

HELP = "Receive what engines score, and serve metrics, a JSON API and a live page."
EPILOG = """Each option may stand in the file of --config instead (http: 127.0.0.1:9465) or in the environment
(LATENTWATCH_SETTING_HTTP). A flag counts before the environment, the environment before the file.
example:  latentwatch collector --watchlist prod.safetensors
          then open http://127.0.0.1:9464/ and start vLLM with LATENTWATCH_WATCHLIST=prod.safetensors
          LATENTWATCH_COLLECTOR=unix:///run/latentwatch/collector.sock"""

_GROUPS: Final = {
    "token": "engines",
    "peer": "engines",
    "tls": "engines",
    "http": "HTTP",
    "runbook": "HTTP",
    "grafana": "HTTP",
    "forward": "gateway",
    "evidence": "evidence",
    "otlp": "OpenTelemetry",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    from latentwatch.collector.config import CollectorConfig

    parser.add_argument("--config", type=Path, metavar="FILE", help="read options from this YAML file too")
    parser.add_argument("--config-schema", action="store_true", help="print the JSON Schema of that file, and end")
    options.add_settings(parser, CollectorConfig, _GROUPS)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM."""
    import asyncio
    import json

    from latentwatch.collector.config import CollectorConfig

    if args.config_schema:
        print(json.dumps(CollectorConfig.file_schema(), indent=1))
        return 0
    config = CollectorConfig.read(options.given(args, CollectorConfig), args.config)

    from latentwatch.collector.service import serve

    log_lines.log_to_stderr(config.log_level, config.log_format)
    asyncio.run(serve(settings(config), started=functools.partial(_announce, config.listen)))
    return 0


def _announce(listen: Sequence[str], service: Service) -> None:
    watchlist = service.core.watchlist
    print(f"latentwatch collector: {len(watchlist.features)} features of {watchlist.name!r} ({watchlist.sha256[:12]})")
    print(f"  page     {service.http_url}/")
    print(f"  metrics  {service.http_url}/metrics")
    print(f"  engines  {' '.join(listen)}", flush=True)


def settings(config: CollectorConfig) -> CollectorSettings:
    """The collector that these options describe. Reads baseline and canary key. Raises Refusal."""
    from latentwatch.collector.http.connection import HttpLimits
    from latentwatch.collector.http.overview import Links
    from latentwatch.collector.service import CollectorSettings
    from latentwatch.transport.credentials import ServerTls

    tls, http_tls = (config.tls_cert, config.tls_key), (config.http_tls_cert, config.http_tls_key)
    return CollectorSettings(
        watchlist=config.watchlist,
        listen=config.listen,
        http=config.http,
        insecure=config.insecure,
        state=config.state,
        drift=options.drift_settings(config.baseline, config.canary_key, config.route),
        evidence=_evidence(config),
        otlp=_otlp(config),
        forward=_forward(config),
        tls=ServerTls(tls[0], tls[1], config.tls_client_ca) if tls[0] and tls[1] else None,
        token_files=config.token_file,
        http_token_files=config.http_token_file,
        http_hosts=config.http_host,
        http_limits=HttpLimits(config.http_connections, config.http_peer_connections),
        http_body_bytes=int(config.http_body_mib * (1 << 20)),
        links=Links(config.runbook_url or "", (config.grafana_url or "").rstrip("/")),
        peer_streams=config.peer_streams,
        http_tls=ServerTls(http_tls[0], http_tls[1], protocol="http/1.1") if http_tls[0] and http_tls[1] else None,
        request_id_key_file=config.request_id_key_file,
    )


def _otlp(config: CollectorConfig) -> TelemetrySettings | None:
    """None where nothing is to be sent, OTEL_SDK_DISABLED included."""
    from latentwatch.collector.telemetry import TelemetrySettings
    from latentwatch.export import otlp_environment

    if config.otlp is None:
        return None
    if otlp_environment.disabled(os.environ):
        logging.getLogger("latentwatch.collector").warning("OTEL_SDK_DISABLED=true: nothing is sent over OTLP")
        return None
    name = host.host_name()
    # Another collector on this host has another port.
    return TelemetrySettings(config.otlp, config.otlp_metrics, f"{name} {config.http}" if name else "")


def _evidence(config: CollectorConfig) -> EvidenceSettings | None:
    from latentwatch.collector.evidence import EvidenceSettings
    from latentwatch.evidence.store import Retention

    if config.evidence is None:
        return None
    max_bytes = int(config.evidence_gib * (1 << 30))
    return EvidenceSettings(
        folder=config.evidence,
        retention=Retention(config.evidence_days, max_bytes, config.evidence_content_hours),
        scope=config.evidence_keep,
        token_file=config.evidence_token,
        open_to_all=config.evidence_readers == "everyone",
        key_file=config.evidence_key,
    )


def _forward(config: CollectorConfig) -> ForwardSettings | None:
    from latentwatch.collector.service import ForwardSettings
    from latentwatch.transport.credentials import Credentials

    if config.forward_to is None:
        return None
    shown = Credentials(config.forward_ca, config.forward_cert, config.forward_key, config.forward_token_file)
    name = config.forward_name or host.host_name()
    if not name:
        raise ConfigRefused(
            "--forward-name",
            found="it is not given, and the system does not tell this host's name",
            instead="Give a name that no other sidecar of the gateway has.",
            reason=RefusalReason.CONFIG_VALUE,
        )
    return ForwardSettings(config.forward_to, name, shown)
