"""Starting the demo's processes and waiting until they serve, with progress."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import httpx

from latentwatch.demo.run import commands
from latentwatch.demo.run.processes import Child, ProcessGroup, free_ports
from latentwatch.demo.run.terminal import Terminal
from latentwatch.demo.run.webhook import Webhook
from latentwatch.errors import ConfigRefused
from latentwatch.export import dashboards

READY_SECONDS: Final = 30.0
ENGINE_READY_SECONDS: Final = 420.0
"""A first start compiles: 85 s on two free cores, several times that on busy ones."""
TICK_SECONDS: Final = 0.1


@dataclass(frozen=True)
class Stack:
    """What was started, and where it listens. A URL is empty where its program was not started."""

    collector_url: str
    engine_url: str
    prometheus_url: str = ""
    alertmanager_url: str = ""
    paging: str = ""
    """Why there is no page step; empty where there is one."""


class Launcher:
    """Starts children in one group and waits for each to serve."""

    def __init__(self, group: ProcessGroup, client: httpx.AsyncClient, terminal: Terminal, logs: Path) -> None:
        self.group = group
        self.client = client
        self.terminal = terminal
        self.logs = logs

    def start(self, name: str, command: commands.Command, *, grace_seconds: float = 5.0) -> Child:
        """Start a program; its output goes to NAME.log. Raises ChildFailed."""
        log = self.logs / f"{name.lower()}.log"
        return self.group.start(name, command.argv, log=log, env=command.env, grace_seconds=grace_seconds)

    async def ready(
        self,
        child: Child,
        url: str,
        text: str,
        *,
        seconds: float = READY_SECONDS,
        phase: Callable[[], str] = lambda: "starting",
    ) -> None:
        """Wait until `url` answers 200, showing `phase()` meanwhile and `text` after.

        Raises: ChildFailed: a child ended, or this one does not answer within `seconds`.
        """
        deadline = time.monotonic() + seconds
        while not await self._answers(url):
            self.group.check()
            if time.monotonic() > deadline:
                raise child.failed(f"{url} did not answer within {seconds:.0f} s")
            self.terminal.tick(child.name, phase())
            await asyncio.sleep(TICK_SECONDS)
        # What answered might be a stranger on the same port, if our child could not bind it.
        self.group.check()
        self.terminal.done(child.name, text)

    async def json(self, url: str) -> Any:
        """The JSON at a URL. Raises httpx.HTTPError."""
        return (await self.client.get(url)).raise_for_status().json()

    async def _answers(self, url: str) -> bool:
        try:
            return (await self.client.get(url)).status_code == 200
        except httpx.HTTPError:
            return False


class _Ports(NamedTuple):
    collector: int
    engine: int
    prometheus: int
    alertmanager: int


async def start_all(
    launcher: Launcher, serving: commands.Serving, webhook: Webhook, scratch: Path, *, prometheus: bool
) -> Stack:
    """Start the collector, vLLM, and Alertmanager and Prometheus where wanted and installed. Raises ChildFailed."""
    ports = _Ports(*free_ports(4))
    socket = scratch / "collector.sock"
    collector_url, engine_url = _url(ports.collector), _url(ports.engine)
    first_start = not commands.cache_root().exists()

    collector = launcher.start(
        "collector", commands.collector(serving.watchlist, socket, ports.collector, scratch / "evidence")
    )
    await launcher.ready(collector, f"{collector_url}/healthz", f"{collector_url}/ is the live page")
    # Longer than vLLM's own --shutdown-timeout, which lets the exporter hand over what it holds.
    engine = launcher.start("vLLM", commands.engine(serving, socket, ports.engine), grace_seconds=20.0)
    paging = why_no_paging(prometheus)
    if paging:
        launcher.terminal.done("paging", paging, mark="-", style="yellow")
    else:
        await _start_paging(launcher, scratch, webhook, ports)
    await launcher.ready(
        engine,
        f"{engine_url}/health",
        f"{engine_url}/v1 serves {serving.name}",
        seconds=ENGINE_READY_SECONDS,
        phase=lambda: commands.engine_phase(engine.log, first_start=first_start),
    )
    if paging:
        return Stack(collector_url, engine_url, paging=paging)
    return Stack(collector_url, engine_url, _url(ports.prometheus), _url(ports.alertmanager))


def why_no_paging(wanted: bool) -> str:
    """Why the page step is not shown, and what to do about it; empty where it is."""
    if not wanted:
        return "--no-prometheus was given"
    missing = [name for name in ("prometheus", "prometheus-alertmanager") if commands.installed(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed ({commands.INSTALL_HINT})"
    try:
        dashboards.folder()
    except ConfigRefused as refusal:
        return str(refusal)
    return ""


async def _start_paging(launcher: Launcher, scratch: Path, webhook: Webhook, ports: _Ports) -> None:
    programs = commands.installed("prometheus"), commands.installed("prometheus-alertmanager")
    assert programs[0] and programs[1]
    command = commands.alertmanager(programs[1], scratch, ports.alertmanager, webhook_port=webhook.port)
    alertmanager = launcher.start("Alertmanager", command)
    url = _url(ports.alertmanager)
    await launcher.ready(alertmanager, f"{url}/-/ready", url)
    command = commands.prometheus(
        programs[0],
        scratch,
        ports.prometheus,
        scrape_ports={"latentwatch": ports.collector, "vllm": ports.engine},
        alertmanager_port=ports.alertmanager,
    )
    prometheus = launcher.start("Prometheus", command)
    url = _url(ports.prometheus)
    await launcher.ready(prometheus, f"{url}/-/ready", f"{url} evaluates the alert rules")


def _url(port: int) -> str:
    return f"http://127.0.0.1:{port}"
