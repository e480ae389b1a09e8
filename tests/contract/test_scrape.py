"""A real Prometheus scrapes a real collector: every sample arrives, and an exemplar leads to the request."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from latentwatch.collector.service import Service
from latentwatch.export.metrics import sample_names

from tests.support.collectors import collector, exceed
from tests.support.programs import program
from tests.support.stack import ask, eventually, prometheus


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with collector(tmp_path) as made:
        exceed(made)
        yield made


@pytest.fixture
def url(service: Service, tmp_path: Path) -> Iterator[str]:
    """Of a Prometheus that scrapes the collector."""
    with prometheus(tmp_path, {"latentwatch": [service.http_url.removeprefix("http://")]}) as made:
        yield made


@pytest.mark.e2e
def test_prometheus_reads_every_metric_and_an_exemplar_leads_to_the_request(service, url):
    eventually(lambda: ask(url, "query", query="up == 1")["result"])
    scraped = set(ask(url, "label/__name__/values"))
    assert {name for name in scraped if name.startswith(("latentwatch", "process"))} == {
        # But what only a gateway, its sidecars or a baseline have to show: tests/contract/test_metrics_table.py.
        name
        for name in sample_names()
        if not name.startswith(("latentwatch_forward", "latentwatch_drift_baseline_created"))
    }
    now = time.time()
    (series,) = ask(url, "query_exemplars", query="latentwatch_exceedances_total", start=now - 300, end=now + 60)
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
