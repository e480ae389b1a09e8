"""What the chart runs is run here: the collector with the rendered options, the helm test, the restarting sidecar."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from monitor.cli import build_parser
from monitor.engine import settings
from monitor.transport import security
from monitor.watchlist import card
from tests.support import chart
from tests.support.collectors import FEATURES
from tests.support.streams import watchlist

SETTINGS = {
    value
    for module in (settings, security)
    for name, value in vars(module).items()
    if name.isupper() and str(value).startswith("LATENTWATCH_")
}
"""Every environment variable that the plugin and its exporter read."""


def containers(found: list[chart.Object]) -> Iterator[chart.Object]:
    for one in found:
        spec = one["spec"].get("template", one)["spec"] if one["kind"] in ("Deployment", "Pod") else {"containers": []}
        yield from [*spec.get("initContainers", []), *spec["containers"]]


def free_ports(count: int) -> list[int]:
    taken = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in taken]
    for one in taken:
        one.close()
    return ports


def test_every_option_and_variable_that_is_set_exists():
    variables = set()
    for path in chart.CI_SETS:
        values = chart.merged(chart.values(path), {"vllm": {"enabled": True, "model": "m"}})
        for container in containers(chart.objects(values)):
            if container["name"].endswith("collector"):
                build_parser().parse_args(["collector", *container["args"]])
            variables |= {variable["name"] for variable in container.get("env", [])}
    assert {name for name in variables if name.startswith("LATENTWATCH_")} <= SETTINGS


@pytest.fixture
def collector(tmp_path: Path) -> Iterator[tuple[chart.Object, list[chart.Object]]]:
    """The gateway's container, running here with its own command line; and everything that was rendered."""
    grpc, http = free_ports(2)
    found = chart.objects(chart.least(collector={"grpcPort": grpc, "httpPort": http}))
    (container,) = (c for c in containers(found) if c["name"] == "collector")
    card.write(watchlist(FEATURES), tmp_path / "watchlist.safetensors")
    assert container["command"] == ["latentwatch", "collector"]
    here = {"/etc/latentwatch/watchlist": str(tmp_path), "/var/lib/latentwatch": str(tmp_path)}
    argv = [re.sub("|".join(here), lambda found: here[found[0]], argument) for argument in container["args"]]
    running = subprocess.Popen([sys.executable, "-m", "monitor", "collector", *argv])
    try:
        wait_for(f"http://127.0.0.1:{http}{container['startupProbe']['httpGet']['path']}", running)
        yield container, found
    finally:
        running.send_signal(signal.SIGTERM)
        assert running.wait(chart.values(chart.HELM / "values.yaml")["collector"]["terminationGracePeriodSeconds"]) == 0


def wait_for(url: str, running: subprocess.Popen[Any]) -> None:
    for _ in range(600):
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            assert running.poll() is None, "the collector ended"
            time.sleep(0.1)
    pytest.fail(f"{url} does not answer")


def test_the_collector_starts_as_rendered_and_every_probe_and_the_helm_test_pass(collector):
    container, found = collector
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        get = container[probe]["httpGet"]
        with urllib.request.urlopen(f"http://127.0.0.1:{ports[get['port']]}{get['path']}", timeout=5) as answer:
            assert answer.status == 200
    assert helm_test(found, streams="0").returncode == 0
    no_engine = helm_test(found, streams="1")
    assert no_engine.returncode == 1
    assert "no engine streams to this collector" in no_engine.stderr


def helm_test(found: list[chart.Object], *, streams: str) -> subprocess.CompletedProcess[str]:
    (container,) = (c for c in containers(found) if c["name"] == "test")
    python, *code = container["command"]
    assert python == "python"
    url = container["args"][0].replace(f"{chart.RELEASE}-latentwatch-collector", "127.0.0.1")
    return subprocess.run([sys.executable, *code, url, streams], capture_output=True, text=True, timeout=60)


STUB = """#!/bin/sh
# Ends with an error twice, then stays until it is told to go.
echo "$@" >> "$CALLS"
[ "$(wc -l < "$CALLS")" -lt 3 ] && exit 2
trap 'echo told >> "$CALLS"; exit 0' TERM
while :; do /bin/sleep 0.05; done
"""


def test_a_sidecar_whose_collector_ends_starts_it_again_and_passes_on_the_signal(tmp_path):
    """The container itself never ends by it: that would make the pod unready, and the server would stop serving."""
    values = chart.merged(chart.values(chart.HELM / "ci" / "sidecar-vllm-values.yaml"), {})
    (container,) = (c for c in containers(chart.objects(values)) if c["name"] == "latentwatch-collector")
    assert container["restartPolicy"] == "Always"
    assert not [key for key in container if key.endswith("Probe")]
    calls = tmp_path / "calls"
    for name, text in (("latentwatch", STUB), ("sleep", "#!/bin/sh\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    running = subprocess.Popen(
        [*container["command"], *container["args"]],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls)},
        stderr=subprocess.PIPE,
        text=True,
    )
    for _ in range(600):
        if calls.exists() and len(calls.read_text().splitlines()) == 3:
            break
        time.sleep(0.05)
    assert running.poll() is None
    time.sleep(0.3)  # for the stub to have set its trap
    running.terminate()
    _, said = running.communicate(timeout=30)
    assert running.returncode == 0
    assert calls.read_text().splitlines() == [" ".join(["collector", *container["args"]])] * 3 + ["told"]
    assert said.count("latentwatch collector ended with code 2; it starts again in 10 seconds") == 2
