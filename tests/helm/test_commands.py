"""What the chart runs is run here: the collector with the rendered options, the helm test, the restarting sidecar."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from latentwatch.cli import build_parser
from latentwatch.engines.vllm import settings
from latentwatch.transport import credentials, spool
from latentwatch.transport.sender import Sender
from latentwatch.watchlist import file as watchlist_file

from tests.support import chart
from tests.support.certificates import Authority
from tests.support.collectors import FEATURES
from tests.support.streams import hello, watchlist

SETTINGS = {
    value
    for module in (settings, credentials, spool)
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


class Gateway:
    """A gateway's container, running here with its own command line. Its paths lie under `root`, its ports are free."""

    def __init__(self, root: Path, **over: Any) -> None:
        grpc, self.http = free_ports(2)
        over["collector"] = {"grpcPort": grpc, "httpPort": self.http}
        self.objects = chart.objects(chart.least(**over))
        (self.container,) = (c for c in containers(self.objects) if c["name"] == "collector")
        self._root = root
        self._put("watchlist/watchlist.safetensors", b"")
        watchlist_file.write(watchlist(FEATURES), root / "etc/latentwatch/watchlist/watchlist.safetensors")
        (root / "var/lib/latentwatch").mkdir(parents=True)
        self.put(engine_token={"token": b"engines-0123456789"})

    def _put(self, path: str, content: bytes, mode: int = 0o644) -> None:
        """A file that a volume would bring."""
        file = self._root / "etc/latentwatch" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        file.chmod(mode)

    def put(self, **volumes: dict[str, bytes]) -> None:
        spec = chart.the(self.objects, "Deployment", "-collector")["spec"]["template"]["spec"]
        secrets = {one["name"]: one["secret"] for one in spec["volumes"] if "secret" in one}
        for volume, files in volumes.items():
            name = volume.replace("_", "-")
            secret = secrets[f"latentwatch-{name}"]
            modes = {item["key"]: item.get("mode", secret["defaultMode"]) for item in secret["items"]}
            for key, content in files.items():
                self._put(f"{name}/{key}", content, modes[key])

    def here(self, text: str) -> str:
        return re.sub("/(etc|var/lib)/latentwatch", lambda found: f"{self._root}{found[0]}", text)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        assert self.container["command"] == ["latentwatch", "collector"]
        argv = map(self.here, self.container["args"])
        process = subprocess.Popen([sys.executable, "-m", "latentwatch", "collector", *argv])
        try:
            self.wait(process)
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            grace = chart.values(chart.HELM / "values.yaml")["collector"]["terminationGracePeriodSeconds"]
            assert process.wait(grace) == 0

    def wait(self, process: subprocess.Popen[bytes]) -> None:
        for _ in range(900):
            try:
                self.probe("startupProbe")
                return
            except OSError:
                assert process.poll() is None, "the collector ended"
                time.sleep(0.1)
        pytest.fail("the collector does not answer")

    def probe(self, name: str) -> None:
        """What the kubelet does. Raises OSError, of which urllib's errors are kinds, where it would not pass."""
        get = self.container[name]["httpGet"]
        (port,) = (port["containerPort"] for port in self.container["ports"] if port["name"] == get["port"])
        url = f"{get['scheme'].lower()}://127.0.0.1:{port}{get['path']}"
        # A kubelet checks no certificate either.
        tls = ssl._create_unverified_context() if get["scheme"] == "HTTPS" else None
        urllib.request.urlopen(url, timeout=5, context=tls).close()

    def helm_test(self, *, streams: int) -> subprocess.CompletedProcess[str]:
        """The test pod's container, asking for this many streams."""
        (test,) = (c for c in containers(self.objects) if c["name"] == "test")
        python, *code = test["command"]
        assert python == "python"
        url, _, *token_file = test["args"]
        url = url.replace(f"{chart.RELEASE}-latentwatch-collector", "127.0.0.1")
        arguments = [url, str(streams), *map(self.here, token_file)]
        return subprocess.run([sys.executable, *code, *arguments], capture_output=True, text=True, timeout=60)

    def patched_environment(self) -> dict[str, str]:
        """What the patch sets in vLLM's container, with paths and addresses of here."""
        patch = yaml.safe_load(chart.the(self.objects, "ConfigMap", "-vllm-patch")["data"]["patch.yaml"])
        (server,) = patch["spec"]["template"]["spec"]["containers"]
        host = f"{chart.RELEASE}-latentwatch-collector.{chart.NAMESPACE}.svc.cluster.local"
        return {v["name"]: self.here(v["value"]).replace(host, "127.0.0.1") for v in server["env"] if "value" in v}


def test_the_collector_starts_as_rendered_and_every_probe_and_the_helm_test_pass(tmp_path):
    gateway = Gateway(tmp_path, evidence={"enabled": True})
    gateway.put(http_token={"token": b"readers-0123456789"})
    with gateway.running():
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            gateway.probe(probe)
        assert gateway.helm_test(streams=0).returncode == 0
        no_engine = gateway.helm_test(streams=1)
    assert no_engine.returncode == 1
    assert "no engine streams to this collector" in no_engine.stderr


def test_an_engine_reaches_a_gateway_with_what_the_patch_gives_it(tmp_path):
    """Certificates for both, tokens for engines and readers: everything that can be asked for, at once."""
    gateway = Gateway(
        tmp_path,
        httpToken={"name": "latentwatch-http", "key": "token"},
        httpTls={"secretName": "latentwatch-http-tls"},
        engineToken={"name": "latentwatch-engines", "key": "token"},
        tls={"enabled": True, "issuer": {"name": "internal"}, "engineCertificates": True},
    )
    pod = "my-vllm-6d4b75cb6d-x2x7k"
    authority = Authority(tmp_path)
    # One folder stands for both pods' volumes: a certificate of the collector's address and of the engine's pod.
    certificate, key = authority.issue("both", pod)
    gateway.put(
        tls={"tls.crt": certificate.read_bytes(), "tls.key": key.read_bytes(), "ca.crt": authority.file.read_bytes()},
        http_tls={"tls.crt": certificate.read_bytes(), "tls.key": key.read_bytes()},
        http_token={"token": b"readers-0123456789"},
        engine_token={"token": b"engines-0123456789"},
    )
    environment = gateway.patched_environment()
    with gateway.running():
        assert gateway.helm_test(streams=0).returncode == 0
        engine = Sender(
            environment["LATENTWATCH_COLLECTOR"],
            hello(
                replica=f"{pod}/0",
                watchlist_sha256=watchlist_file.read(Path(environment["LATENTWATCH_WATCHLIST"])).sha256,
            ),
            credentials=credentials.Credentials.from_env(environment),
        )
        engine.start()
        try:
            eventually(lambda: gateway.helm_test(streams=1).returncode == 0)
        finally:
            engine.close(5)


def eventually(holds: Callable[[], bool]) -> None:
    for _ in range(100):
        if holds():
            return
        time.sleep(0.2)
    pytest.fail("it never held")


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
