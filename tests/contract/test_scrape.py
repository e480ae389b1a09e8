"""A real Prometheus scrapes a real collector: every sample arrives, and an exemplar leads to the request."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from monitor.collector.service import Service
from monitor.export.metrics import sample_names
from tests.support.collectors import collector, exceed
from tests.support.real import program


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with collector(tmp_path) as made:
        exceed(made)
        yield made


@pytest.fixture
def prometheus(service: Service, tmp_path: Path) -> Iterator[str]:
    """URL of a Prometheus that scrapes the collector every second."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    target = service.http_url.removeprefix("http://")
    (tmp_path / "prometheus.yml").write_text(
        "global: {scrape_interval: 1s}\n"
        f"scrape_configs: [{{job_name: latentwatch, static_configs: [{{targets: ['{target}']}}]}}]\n"
    )
    argv = [
        program("prometheus"),
        f"--config.file={tmp_path}/prometheus.yml",
        f"--storage.tsdb.path={tmp_path}/data",
        f"--web.listen-address=127.0.0.1:{port}",
        "--enable-feature=exemplar-storage",
    ]
    with (tmp_path / "log").open("w") as log, subprocess.Popen(argv, stdout=log, stderr=log) as process:
        yield f"http://127.0.0.1:{port}"
        process.terminate()


def ask(url: str, path: str, **parameters: object) -> Any:
    with urllib.request.urlopen(f"{url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}", timeout=5) as answer:
        return json.load(answer)["data"]


def eventually(check: Any, seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    while True:
        try:
            if found := check():
                return found
        except OSError:
            pass
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.3)


@pytest.mark.e2e
def test_prometheus_reads_every_metric_and_an_exemplar_leads_to_the_request(service, prometheus):
    eventually(lambda: ask(prometheus, "query", query="up == 1")["result"])
    scraped = set(ask(prometheus, "label/__name__/values"))
    assert {name for name in scraped if name.startswith(("latentwatch", "process"))} == sample_names()
    now = time.time()
    (series,) = ask(prometheus, "query_exemplars", query="latentwatch_exceedances_total", start=now - 300, end=now + 60)
    (exemplar,) = series["exemplars"]
    with urllib.request.urlopen(f"{service.http_url}/v1/requests/{exemplar['labels']['request_id']}") as answer:
        (request,) = json.load(answer)["requests"]
    assert request["features"][0]["feature"] == series["seriesLabels"]["feature"] == "jailbreak"
    assert float(exemplar["value"]) == request["features"][0]["statistic"] == 5.0


@pytest.mark.e2e
def test_promtool_finds_nothing_to_complain_of(service):
    with urllib.request.urlopen(service.http_url + "/metrics") as answer:
        page = answer.read()
    ran = subprocess.run([program("promtool"), "check", "metrics"], input=page, capture_output=True, timeout=60)
    assert ran.returncode == 0 and not ran.stdout + ran.stderr, (ran.stdout + ran.stderr).decode()
