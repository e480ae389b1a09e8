"""A real Prometheus and a real Alertmanager on loopback, with the product's rules at the speed of a test."""

from __future__ import annotations

import contextlib
import copy
import json
import re
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml
from latentwatch.demo.run.processes import free_ports

from tests.support.engines import ROOT
from tests.support.programs import program

RULES = ROOT / "dashboards" / "rules"
INTERVAL = "500ms"
"""Of scrapes and of rules; in production 15 to 30 seconds."""
_UNIT_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_RANGE = re.compile(r"(\[|offset )(\d+)([smhd])(?=\]|\b)")


def faster(rules: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """The same rules with every range, offset, `for` and `keep_firing_for` divided by `factor`; the rest as it is.

    Numbers that expressions compare with are left alone: the test moves the times that they look at instead.
    """

    def scaled(number: str, unit: str) -> str:
        return f"{round(int(number) * _UNIT_SECONDS[unit] / factor * 1000)}ms"

    def in_text(text: str) -> str:
        return _RANGE.sub(lambda found: found[1] + scaled(found[2], found[3]), text)

    made = copy.deepcopy(dict(rules))
    for rule in (rule for group in made["groups"] for rule in group["rules"]):
        rule["expr"] = in_text(rule["expr"])
        for key in ("for", "keep_firing_for"):
            if key in rule:
                rule[key] = scaled(rule[key][:-1], rule[key][-1])
        annotations = rule.get("annotations", {})
        rule |= {"annotations": {name: in_text(text) for name, text in annotations.items()}} if annotations else {}
    return made


@contextlib.contextmanager
def prometheus(
    folder: Path,
    jobs: Mapping[str, Sequence[str]],
    *,
    factor: float = 1.0,
    interval: str = INTERVAL,
    alertmanager_url: str = "",
) -> Iterator[str]:
    """URL of a Prometheus that scrapes `jobs`, targets by job name, with the rules `factor` times as fast."""
    (port,) = free_ports(1)
    for path in RULES.glob("*.yaml"):
        (folder / path.name).write_text(yaml.safe_dump(faster(yaml.safe_load(path.read_text()), factor)))
    config: dict[str, Any] = {
        "global": {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval},
        "rule_files": [str(folder / path.name) for path in RULES.glob("*.yaml")],
        "scrape_configs": [
            {"job_name": job, "static_configs": [{"targets": list(targets)}]} for job, targets in jobs.items()
        ],
    }
    if alertmanager_url:
        target = alertmanager_url.removeprefix("http://")
        config["alerting"] = {"alertmanagers": [{"static_configs": [{"targets": [target]}]}]}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    argv = [
        program("prometheus"),
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}",
        "--enable-feature=exemplar-storage",
        # Else an alert that fires in the first seconds is lost for a minute.
        "--rules.alert.resend-delay=1s",
    ]
    with _running(argv, folder / "prometheus.log"):
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def alertmanager(folder: Path, config: Mapping[str, Any]) -> Iterator[str]:
    """URL of an Alertmanager with this configuration."""
    (port,) = free_ports(1)
    (folder / "alertmanager.yml").write_text(yaml.safe_dump(dict(config)))
    argv = [
        program("prometheus-alertmanager"),
        f"--config.file={folder}/alertmanager.yml",
        f"--storage.path={folder}/alertmanager",
        f"--web.listen-address=127.0.0.1:{port}",
        "--cluster.listen-address=",
    ]
    with _running(argv, folder / "alertmanager.log"):
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def _running(argv: Sequence[str], log: Path) -> Iterator[None]:
    with log.open("w") as out, subprocess.Popen(argv, stdout=out, stderr=out) as process:
        try:
            yield
        finally:
            process.terminate()


@contextlib.contextmanager
def metrics_page(text: Callable[[], str]) -> Iterator[str]:
    """host:port of a page that answers every GET with text(): a scrape target that is not ours, such as vLLM."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(text().encode())

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing to say."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def ask(url: str, path: str, **parameters: object) -> Any:
    """`data` of an answer of Prometheus' API. Raises OSError, and AssertionError for an error in the answer."""
    with urllib.request.urlopen(f"{url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}", timeout=10) as answer:
        body = json.load(answer)
    assert body["status"] == "success", body
    return body["data"]


def eventually(check: Callable[[], Any], seconds: float = 60.0) -> Any:
    """The first true value of check(), asked again and again; an OSError counts as not yet."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError):
            if found := check():
                return found
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.3)
