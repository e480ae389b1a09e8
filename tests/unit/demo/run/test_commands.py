"""The commands of the demo's stack: what each one listens on, and what is said where a program or a file is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from latentwatch.demo.run import commands, stack
from latentwatch.errors import ConfigRefused
from latentwatch.export import dashboards


def test_missing_assets_are_named_and_the_way_to_build_them() -> None:
    with pytest.raises(ConfigRefused, match=r"model, demo\.watchlist\.safetensors.*latentwatch demo build") as refused:
        commands.Assets.under(Path("/nowhere"))
    assert refused.value.reason == "demo_assets_missing"


def test_everything_listens_on_loopback_or_a_socket_only(tmp_path: Path) -> None:
    serving = commands.Serving("m", tmp_path, tmp_path / "w")
    started = [
        commands.collector(serving.watchlist, tmp_path / "s", 1001),
        commands.engine(serving, tmp_path / "s", 1002),
        commands.prometheus("prometheus", tmp_path, 1003, scrape_ports={"latentwatch": 1001}, alertmanager_port=1004),
        commands.alertmanager("alertmanager", tmp_path, 1004, webhook_port=1005),
    ]
    for command in started:
        words = " ".join(command.argv)
        assert "0.0.0.0" not in words
        assert "127.0.0.1" in words
    assert "--cluster.listen-address=" in started[3].argv
    assert f"unix://{tmp_path / 's'}" in started[0].argv
    assert started[1].env["LATENTWATCH_COLLECTOR"] == f"unix://{tmp_path / 's'}"


def test_prometheus_runs_with_every_rule_file_of_the_product(tmp_path: Path) -> None:
    commands.prometheus("prometheus", tmp_path, 1, scrape_ports={"latentwatch": 2}, alertmanager_port=None)
    config = yaml.safe_load((tmp_path / "prometheus.yml").read_text())
    assert [Path(path).name for path in config["rule_files"]] == ["alerts.yaml", "recording.yaml"]
    assert config["scrape_configs"][0]["static_configs"][0]["targets"] == ["127.0.0.1:2"]
    assert "alerting" not in config


def test_the_demos_alertmanager_keeps_routes_and_inhibitions_and_replaces_every_receiver() -> None:
    sample = yaml.safe_load((dashboards.folder() / "alertmanager.yml").read_text())
    config = commands.demo_alertmanager(sample, webhook_port=7)
    assert config["inhibit_rules"] == sample["inhibit_rules"]
    assert [route["receiver"] for route in config["route"]["routes"]] == ["dead-mans-switch", "pager"]
    assert config["route"]["routes"][1]["group_wait"] == "0s"
    urls = {receiver["name"]: receiver["webhook_configs"][0]["url"] for receiver in config["receivers"]}
    assert urls == {name: f"http://127.0.0.1:7/{name}" for name in ("pager", "tickets", "dead-mans-switch")}
    assert "9095" in str(sample), "the sample itself was changed"


def test_a_missing_prometheus_is_named_with_the_way_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "installed", lambda name: None if name == "prometheus" else f"/usr/bin/{name}")
    assert stack.why_no_paging(wanted=True) == f"prometheus not installed ({commands.INSTALL_HINT})"
    assert stack.why_no_paging(wanted=False) == "--no-prometheus was given"


def test_an_installation_without_the_rules_goes_on_without_the_page_and_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(commands, "installed", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(
        commands.latentwatch, "__file__", str(tmp_path / "site-packages" / "latentwatch" / "__init__.py")
    )
    assert "run it from a checkout" in stack.why_no_paging(wanted=True)


def test_the_compile_cache_is_kept_where_the_user_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "a"))
    assert commands.cache_root() == tmp_path / "a"
    monkeypatch.delenv("VLLM_CACHE_ROOT")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert commands.cache_root() == tmp_path / "b" / "latentwatch" / "vllm"


def test_the_engines_phase_is_the_latest_that_its_log_names(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("")
    assert commands.engine_phase(log, first_start=False) == "importing torch and vLLM"
    log.write_text("Starting to load model /m\nWarming up model for the compilation\n")
    assert commands.engine_phase(log, first_start=False) == "compiling and warming up the model"
    assert "first start" in commands.engine_phase(log, first_start=True)
