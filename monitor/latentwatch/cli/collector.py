"""`latentwatch collector`: receive scores, keep the books, serve metrics, API and the live page."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from latentwatch.errors import ConfigRefused

if TYPE_CHECKING:
    from latentwatch.collector.drift import DriftSettings
    from latentwatch.collector.evidence import EvidenceSettings
    from latentwatch.collector.service import ForwardSettings
    from latentwatch.transport.credentials import ServerTls

HELP = "Receive what engines score, and serve metrics, a JSON API and a live page."
EPILOG = """example:  latentwatch collector --watchlist prod.safetensors
          then open http://127.0.0.1:9464/ and start vLLM with LATENTWATCH_WATCHLIST=prod.safetensors
          LATENTWATCH_COLLECTOR=unix:///run/latentwatch/collector.sock"""

_LISTEN = "unix:///run/latentwatch/collector.sock"
_HTTP = "127.0.0.1:9464"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    parser.add_argument(
        "--watchlist",
        type=Path,
        required=True,
        metavar="FILE",
        help="the built watchlist; engines that score with another one are refused",
    )
    parser.add_argument(
        "--listen",
        action="append",
        metavar="ADDRESS",
        help=f"where engines connect, unix:///path or host:port; may be given more than once (default: {_LISTEN})",
    )
    parser.add_argument(
        "--state",
        type=Path,
        metavar="FOLDER",
        help="keep counters and running requests in this folder, so that a collector that was killed goes on where it "
        "was (default: in memory)",
    )
    parser.add_argument(
        "--baseline",
        type=Path,
        metavar="FILE",
        help="measure drift against this baseline, as 'latentwatch calibrate' wrote it (default: only collect what one "
        "can be calibrated from)",
    )
    parser.add_argument(
        "--canary-key",
        type=Path,
        metavar="FILE",
        help="the key that 'latentwatch canary' signs its requests with, so that they are compared with each other "
        "instead of counted as traffic",
    )
    parser.add_argument(
        "--route",
        type=route,
        metavar="REGEX",
        help="what this finds in a request's id is its route, or what its first group finds; each of some 8 routes and "
        "adapters has rates of its own in the baseline (default: adapters only)",
    )
    parser.add_argument(
        "--request-id-key-file",
        type=Path,
        metavar="FILE",
        help="hold request ids as hashes under the key in this file, which only its owner may read; a request is still "
        "found by its clear id (default: ids are held as they are)",
    )
    forward = parser.add_argument_group("gateway")
    forward.add_argument(
        "--forward-to",
        metavar="ADDRESS",
        help="tell this collector, the gateway, once a second what is counted here, and a row for each request "
        "(default: nothing is forwarded)",
    )
    forward.add_argument(
        "--forward-name",
        metavar="NAME",
        help="what the gateway calls this collector; each needs a name of its own (default: the host's name)",
    )
    forward.add_argument("--forward-ca", type=Path, metavar="FILE", help="authority of the gateway's certificate")
    forward.add_argument("--forward-cert", type=Path, metavar="FILE", help="certificate to show the gateway")
    forward.add_argument("--forward-key", type=Path, metavar="FILE", help="its key")
    forward.add_argument("--forward-token-file", type=Path, metavar="FILE", help="bearer token to show the gateway")
    evidence = parser.add_argument_group("evidence")
    evidence.add_argument(
        "--evidence",
        type=Path,
        metavar="DIR",
        help="write exceedances, with the activations of their requests, to this folder (default: nothing is written)",
    )
    evidence.add_argument(
        "--evidence-days",
        type=float,
        default=30.0,
        metavar="N",
        help="remove evidence before it is so old (default: %(default)g)",
    )
    evidence.add_argument(
        "--evidence-gib",
        type=float,
        default=10.0,
        metavar="N",
        help="remove the oldest evidence before all of it is so large (default: %(default)g)",
    )
    evidence.add_argument(
        "--evidence-keep",
        choices=("exceeded", "all"),
        default="exceeded",
        help="which requests to write down: those that exceeded a limit, or all (default: %(default)s)",
    )
    evidence.add_argument(
        "--evidence-token",
        type=Path,
        metavar="FILE",
        help="who sends this file's content as bearer token may delete over HTTP, and put and get what was said "
        "(default: nobody)",
    )
    evidence.add_argument(
        "--evidence-key",
        type=Path,
        metavar="FILE",
        help="keep what a gateway says was said in a kept request, encrypted with the key in this file; "
        "'latentwatch evidence key' makes one (default: nothing that was said is kept)",
    )
    evidence.add_argument(
        "--evidence-content-hours",
        type=float,
        default=24.0,
        metavar="N",
        help="remove what was said before it is so old (default: %(default)g)",
    )
    otlp = parser.add_argument_group("OpenTelemetry")
    otlp.add_argument(
        "--otlp",
        metavar="URL",
        help="send every exceedance as a gen_ai.evaluation.result event, in the trace of its request, to this "
        "OTLP/gRPC receiver, such as http://127.0.0.1:4317 (default: nothing is sent)",
    )
    otlp.add_argument(
        "--otlp-metrics",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="with --otlp: send the metrics too, so often (default: they are only scraped)",
    )
    parser.add_argument(
        "--http",
        default=_HTTP,
        metavar="HOST:PORT",
        help=f"where /metrics, the API and the page are served (default: {_HTTP}); beyond loopback give it a token",
    )
    parser.add_argument(
        "--http-token-file",
        type=Path,
        action="append",
        metavar="FILE",
        help="ask for this token over HTTP, as Bearer or as the password of Basic; may be given more than once",
    )
    parser.add_argument(
        "--token-file",
        type=Path,
        action="append",
        metavar="FILE",
        help="ask engines for this bearer token; may be given more than once, for rotation",
    )
    parser.add_argument("--http-tls-cert", type=Path, metavar="FILE", help="PEM certificate: serve --http over TLS")
    parser.add_argument("--http-tls-key", type=Path, metavar="FILE", help="its key")
    parser.add_argument("--tls-cert", type=Path, metavar="FILE", help="PEM certificate for TCP addresses of --listen")
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="its key")
    parser.add_argument(
        "--tls-client-ca",
        type=Path,
        metavar="FILE",
        help="ask engines for a certificate of this authority that names their replica",
    )


def run(args: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM."""
    import asyncio
    import logging

    from latentwatch.collector.service import CollectorSettings, Service, serve
    from latentwatch.collector.telemetry import TelemetrySettings

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    engines_tls, http_tls = _server_tls(args)
    settings = CollectorSettings(
        watchlist=args.watchlist,
        listen=tuple(args.listen or (_LISTEN,)),
        http=args.http,
        state=args.state,
        drift=drift_settings(args.baseline, args.canary_key, args.route),
        evidence=_evidence_settings(args) if args.evidence else None,
        otlp=TelemetrySettings(args.otlp, args.otlp_metrics) if args.otlp else None,
        forward=_forward(args),
        tls=engines_tls,
        token_files=tuple(args.token_file or ()),
        http_token_files=tuple(args.http_token_file or ()),
        http_tls=http_tls,
        request_id_key_file=args.request_id_key_file,
    )

    def started(service: Service) -> None:
        watchlist = service.pipeline.watchlist
        print(
            f"latentwatch collector: {len(watchlist.features)} features of {watchlist.name!r} ({watchlist.sha256[:12]})"
        )
        print(f"  page     {service.http_url}/")
        print(f"  metrics  {service.http_url}/metrics")
        print(f"  engines  {' '.join(settings.listen)}", flush=True)

    asyncio.run(serve(settings, started=started))
    return 0


def route(text: str) -> re.Pattern[str]:
    """Type of --route."""
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error


def drift_settings(baseline: Path | None, canary_key: Path | None, route: re.Pattern[str] | None) -> DriftSettings:
    """What drift is measured against. Raises BaselineRefused or ConfigRefused "canary_key"."""
    from latentwatch.collector.drift import DriftSettings
    from latentwatch.drift import baseline as baselines
    from latentwatch.drift import canary
    from latentwatch.drift.detection import Budget

    key = canary.read_key(canary_key) if canary_key else b""
    if baseline is None:
        return DriftSettings(canary_key=key, route=route)
    read = baselines.read(baseline)
    return DriftSettings(read, Budget(window_seconds=read.window_seconds), key, route)


def _evidence_settings(args: argparse.Namespace) -> EvidenceSettings:
    from latentwatch.collector.evidence import EvidenceSettings
    from latentwatch.evidence.store import Retention

    return EvidenceSettings(
        folder=args.evidence,
        retention=Retention(args.evidence_days, int(args.evidence_gib * (1 << 30)), args.evidence_content_hours),
        keep=args.evidence_keep,
        token_file=args.evidence_token,
        key_file=args.evidence_key,
    )


def _forward(args: argparse.Namespace) -> ForwardSettings | None:
    """Raises ConfigRefused, "tls_unusable" or "forward"."""
    import socket

    from latentwatch.collector.service import ForwardSettings
    from latentwatch.transport.credentials import Credentials, check_together

    given = (args.forward_name, args.forward_ca, args.forward_cert, args.forward_key, args.forward_token_file)
    if args.forward_to:
        if args.forward_cert or args.forward_key:
            files = {
                "--forward-cert": args.forward_cert,
                "--forward-key": args.forward_key,
                "--forward-ca": args.forward_ca,
            }
            check_together("TLS to the gateway", files)
        credentials = Credentials(args.forward_ca, args.forward_cert, args.forward_key, args.forward_token_file)
        return ForwardSettings(args.forward_to, args.forward_name or socket.gethostname(), credentials)
    if any(given):
        raise ConfigRefused(
            "forwarding to a gateway",
            found="--forward-name, -ca, -cert, -key or -token-file is given, and --forward-to is not",
            instead="Give --forward-to HOST:PORT too.",
            reason="forward",
        )
    return None


def _server_tls(args: argparse.Namespace) -> tuple[ServerTls | None, ServerTls | None]:
    """For the addresses of engines and for HTTP. Raises ConfigRefused, "tls_unusable", where a part of it lacks."""
    from latentwatch.transport.credentials import ServerTls, check_together

    engines = http = None
    if args.tls_cert or args.tls_key or args.tls_client_ca:
        check_together("TLS of the collector", {"--tls-cert": args.tls_cert, "--tls-key": args.tls_key})
        engines = ServerTls(args.tls_cert, args.tls_key, args.tls_client_ca)
    if args.http_tls_cert or args.http_tls_key:
        check_together("TLS over HTTP", {"--http-tls-cert": args.http_tls_cert, "--http-tls-key": args.http_tls_key})
        http = ServerTls(args.http_tls_cert, args.http_tls_key, protocol="http/1.1")
    return engines, http
