"""Every alert is made to fire and to clear: real collectors, a real Prometheus and Alertmanager, a webhook at the end.

The rules are the shipped ones, 60 times as fast (`faster(rules, 60)`): ranges, `for` and `keep_firing_for` are
divided, so that 5 minutes are 5 seconds, thresholds are not; Prometheus scrapes and evaluates every half second.
Alertmanager runs with the sample configuration and waits of 0 to 1 second, without its inhibitions: they have tests of
their own, and an alert that is inhibited would not arrive. A disk that fails and a drift of hours, which no test can
have at will, are a page with the metrics' text.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from latentwatch.collector.config import Bounds
from latentwatch.collector.service import CollectorSettings, Service
from latentwatch.demo.run.commands import demo_alertmanager
from latentwatch.demo.run.processes import free_ports
from latentwatch.demo.run.webhook import Page, Webhook
from latentwatch.errors import StreamRefused
from latentwatch.export.metrics import sample_names
from latentwatch.names import Outcome, Phase, Reason, Severity, TokenState
from latentwatch.step.batch import SEGMENT_DTYPE, RequestClosed, RequestOpened, StepBatch
from latentwatch.watchlist import file as watchlist_file
from latentwatch.watchlist.file import Limit

from tests.support.engines import ROOT
from tests.support.stack import RULES, alertmanager, eventually, metrics_page, prometheus
from tests.support.streams import Piece, Tokens, hello, received, sparse, step_batch, watchlist
from tests.support.wire import in_loop

FEATURES = (
    sparse("p.deceive", limit=Limit("max", 1.0), severity=Severity.CRITICAL, label="Deceiving the user"),
    sparse("f.refunds", limit=Limit("max", 1.0), severity=Severity.WARNING, label="Refunds"),
)
Fired = tuple[str, str]
"""Alert name and severity."""
WATCHDOG = ("Watchdog", "none")


def shipped_alerts() -> set[Fired]:
    groups = [group for path in RULES.glob("*.yaml") for group in yaml.safe_load(path.read_text())["groups"]]
    alerts = [rule for group in groups for rule in group["rules"] if "alert" in rule]
    return {(rule["alert"], rule["labels"]["severity"]) for rule in alerts}


class Fleet:
    """One collector that lives through everything that can go wrong with its engines, for as long as `troubled`."""

    def __init__(self, folder: Path) -> None:
        watched = watchlist_file.write(watchlist(FEATURES), folder / "w.safetensors")
        # Room for one request: a second one that runs cannot be followed.
        bounds = Bounds(open_requests=1)
        self.service = Service(
            CollectorSettings(folder / "w.safetensors", (f"unix://{folder}/c.sock",), "127.0.0.1:0", bounds=bounds)
        )
        self.troubled = True
        self._troubles = 0
        self._sha256 = watched.sha256
        self._boots = itertools.count(1)
        self._handles = itertools.count(1)
        self._batches = itertools.count(1)
        self._who = self._hello("pod-0/0")
        self._silent = self._hello("pod-1/0")
        self._ended = threading.Event()

    def _hello(self, replica: str, **changes: object):
        boot = f"{next(self._boots):032d}"
        return hello(replica=replica, model_name="m", boot_id=boot, **{"watchlist_sha256": self._sha256, **changes})

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        """Traffic, four steps a second, from a thread of its own."""
        in_loop(self.service.start())
        in_loop(self._greet())
        thread = threading.Thread(target=self._run, name="fleet")
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()
            in_loop(self.service.stop())

    def _run(self) -> None:
        while not self._ended.wait(0.25):
            in_loop(self._trouble() if self.troubled else self._health())

    async def _greet(self) -> None:
        now = time.time()
        self.service.core.ingest.hello(self._who, now)
        self.service.core.ingest.hello(self._silent, now)
        blind = self._hello("pod-2/0", armed=False, not_armed_reason="watchlist_width", watchlist_sha256="")
        self.service.core.ingest.hello(blind, now)

    async def _trouble(self) -> None:
        core = self.service.core
        self._troubles += 1
        if self._troubles == 60:
            # Heard for 15 seconds, which is how many are usual; then last heard 5 minutes ago.
            core.ingest.hello(self._silent, time.time() - 300)
        try:
            core.ingest.hello(self._hello("pod-3/0", watchlist_sha256="c" * 64), time.time())
        except StreamRefused as refusal:
            core.ingest.refused(refusal.reason)
        core.ingest.refused("protocol_version")
        # Half of the tokens dropped, an exceedance of each severity, 30 seconds late, with an end that tells of one
        # token fewer, while a second request runs that finds no room.
        handle, other = next(self._handles), next(self._handles)
        request = Tokens(
            handle, 2, np.full((4, 2), 5.0, np.float32), np.array([1, 1, 4, 4]), np.ones((4, 1), np.float32)
        )
        late = time.time_ns() - 30_000_000_000
        opened = (request.opened(), RequestOpened(other, f"chatcmpl-{other}-0123abcd", 1))
        closed = (
            RequestClosed(handle, request.request_id, 2, 2, 3, Outcome.FINISHED),
            RequestClosed(other, f"chatcmpl-{other}-0123abcd", 1, 1, 0, Outcome.ABORTED),
        )
        batch = step_batch([Piece(request, 0, 4)], FEATURES, time_unix_nano=late, opened=opened, closed=closed)
        core.ingest.observe(self._who, received(next(self._batches), batch), time.time())

    async def _health(self) -> None:
        """Very many tokens, all scored: the budget of days is made good in seconds."""
        core, now, count = self.service.core, time.time(), 50_000
        if self._silent.replica == "pod-1/0":
            self._silent = self._hello("pod-1/0")
            core.ingest.hello(self._silent, now)
            core.ingest.hello(self._hello("pod-2/0"), now)
        handle = next(self._handles)
        name = f"chatcmpl-{handle}-0123abcd"
        batch = StepBatch(
            step=1,
            time_unix_nano=time.time_ns(),
            segments_S=np.array([(handle, 0, count, TokenState.SCORED, Reason.NONE, Phase.PROMPT)], SEGMENT_DTYPE),
            dense_RP=np.empty((count, 0), np.float16),
            norm_RH=np.ones((count, 1), np.float32),
            opened=(RequestOpened(handle, name, count),),
            closed=(RequestClosed(handle, name, count, 1, count, Outcome.FINISHED),),
        )
        core.ingest.observe(self._who, received(next(self._batches), batch), now)


@contextlib.contextmanager
def second_collector(folder: Path, port: int) -> Iterator[None]:
    made = Service(CollectorSettings(folder / "w.safetensors", (f"unix://{folder}/c2.sock",), f"127.0.0.1:{port}"))
    in_loop(made.start())
    try:
        yield
    finally:
        in_loop(made.stop())


def key(page: Page) -> Fired:
    return page.alert, page.labels["severity"]


@pytest.mark.e2e
def test_every_alert_fires_and_clears_through_prometheus_and_alertmanager_to_a_webhook(tmp_path: Path) -> None:
    fleet, served = Fleet(tmp_path), time.time()
    sample = yaml.safe_load((ROOT / "dashboards" / "alertmanager.yml").read_text())

    def until_now() -> float:
        """A counter that rises for as long as there is trouble."""
        nonlocal served
        served = time.time() if fleet.troubled else served
        return served

    def vllm() -> str:
        """Another model's engine, which runs without the plugin and goes idle when the trouble ends."""
        return "".join(
            f'vllm:{name}_tokens_total{{model_name="n"}} {until_now()}\n' for name in ("prompt", "generation")
        )

    def afar() -> str:
        """A collector with old state, evidence that is lost or damaged, drift, and a baseline of another model."""
        now, wrong = time.time(), fleet.troubled
        severities = {"p.deceive": "critical", "f.refunds": "warning"}
        drifts = [
            f'model_name="m",feature="{id}",severity="{severity}",kind="rate"' for id, severity in severities.items()
        ]
        info = 'label="x",hook_point="resid_post.0",kind="sae",gate="exact"'
        return "".join(
            (
                f"latentwatch_state_checkpoint_timestamp_seconds {now - 3600 * wrong}\n",
                f'latentwatch_drift_armed{{model_name="m",reason="baseline_mismatch"}} {int(not wrong)}\n',
                f'latentwatch_drift_baseline_created_timestamp_seconds{{model_name="m"}} {now - 40 * 86400 * wrong}\n',
                'latentwatch_drift_limit_log10_evalue{model_name="m",kind="rate"} 7.9\n',
                'latentwatch_drift_limit_log10_evalue{model_name="m",kind="common"} 5.4\n',
                f'latentwatch_drift_common_log10_evalue{{model_name="m"}} {9 * wrong}\n',
                *(f"latentwatch_drift_log10_evalue{{{labels}}} {9 * wrong}\n" for labels in drifts),
                f'latentwatch_evidence_dropped_total{{kind="request",reason="queue_full"}} {until_now()}\n',
                f"latentwatch_evidence_damaged_files {int(wrong)}\n",
                *(
                    f'latentwatch_health_cause{{cause="{cause}",level="problem",alert="{alert}"}} {int(wrong)}\n'
                    for cause, alert in (("no_engine", "LatentwatchNoEngine"), ("ingest_late", "LatentwatchHealth"))
                ),
                f'latentwatch_tokens_total{{model_name="o",state="unseen",reason="kv_connector"}} {until_now()}\n',
                f'latentwatch_tokens_total{{model_name="o",state="scored",reason="none"}} {1e9 * (not wrong)}\n',
                f'latentwatch_engine_model_info{{replica="pod-9/0",model_name="m",match="differs"}} {int(wrong)}\n',
                f'latentwatch_feature_info{{feature="p.deceive",severity="critical",{info}}} 1\n',
                f'latentwatch_feature_info{{feature="f.refunds",severity="warning",{info}}} 1\n',
            )
        )

    assert set(re.findall(r"^latentwatch_\w+", afar(), re.MULTILINE)) <= sample_names()
    with Webhook() as webhook, contextlib.ExitStack() as stack:
        config = demo_alertmanager(sample, webhook.port) | {"inhibit_rules": []}
        for receiver in config["receivers"]:
            receiver["webhook_configs"][0]["send_resolved"] = True
        config["route"]["routes"][0]["repeat_interval"] = "2s"  # the watchdog's, a minute in production
        stack.enter_context(fleet.live())
        (port,) = free_ports(1)
        url = fleet.service.http_url
        targets = [url.removeprefix("http://"), f"127.0.0.1:{port}"]
        jobs = {
            "latentwatch": [*targets, stack.enter_context(metrics_page(afar))],
            "vllm": [stack.enter_context(metrics_page(vllm))],
        }
        receiver_url = stack.enter_context(alertmanager(tmp_path, config))
        stack.enter_context(prometheus(tmp_path, jobs, factor=60, alertmanager_url=receiver_url))

        expected = shipped_alerts()
        eventually(lambda: expected <= {key(page) for page in webhook.pages() if page.status == "firing"}, 120)
        fleet.troubled = False
        with second_collector(tmp_path, port):
            begun = time.time()

            def since(status: str) -> set[Fired]:
                return {key(page) for page in webhook.pages() if page.status == status and page.at > begun}

            eventually(lambda: expected - {WATCHDOG} <= since("resolved"), 180)
            eventually(lambda: WATCHDOG in since("firing"))
        pages = webhook.pages()

    assert WATCHDOG not in {key(page) for page in pages if page.status == "resolved"}
    assert {page.receiver for page in pages if key(page) == WATCHDOG} == {"dead-mans-switch"}
    for page in pages:
        assert page.receiver == {"critical": "pager", "warning": "tickets"}.get(page.labels["severity"], page.receiver)
        assert page.annotations["runbook_url"].endswith(f"#{page.alert.lower()}")
        assert page.annotations["dashboard_url"].startswith("/d/latentwatch-")
        said = page.annotations["summary"] + page.annotations["description"]
        assert not re.search(r"<no value>|\{\{|<error", said), said
    deceived = next(page for page in pages if page.alert == "LatentwatchCriticalExceedance")
    assert re.fullmatch(
        r"m: Deceiving the user went over its critical limit in \d+ request\(s\)", deceived.annotations["summary"]
    )
    assert "drove feature p.deceive, at resid_post.0" in deceived.annotations["description"]
    assert deceived.annotations["page_url"] == f"{url}/#feature=p.deceive"
    assert set(deceived.labels) == {"alertname", "severity", "model_name", "feature"}
