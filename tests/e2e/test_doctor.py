"""The doctor in front of a whole installation: real collector, Prometheus and Alertmanager."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from latentwatch.cli import main

from tests.support.collectors import collector, exceed
from tests.support.engines import ROOT
from tests.support.stack import alertmanager, eventually, prometheus


@pytest.mark.e2e
def test_a_whole_installation_has_nothing_wrong_and_without_alertmanager_one_thing_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = yaml.safe_load((ROOT / "dashboards/alertmanager.yml").read_text())
    with collector(tmp_path) as made, alertmanager(tmp_path, config) as receiver:
        exceed(made)
        jobs = {"latentwatch": [made.http_url.removeprefix("http://")]}
        asked = ["doctor", "--collector", made.http_url, "--watchlist", str(tmp_path / "w.safetensors")]
        with prometheus(tmp_path, jobs, alertmanager_url=receiver) as url:
            eventually(lambda: main([*asked, "--prometheus", url, "--alertmanager", receiver]) == 0)
        said = capsys.readouterr().out.split("plugin")[-1]
        for part in ("watchlist", "collector", "same file", "stream", "coverage", "scrape", "rules", "alertmanager"):
            assert f"ok      {part}" in said, said
        assert "goes to dead-mans-switch" in said and "Nothing failed." in said
        (tmp_path / "alone").mkdir()
        with prometheus(tmp_path / "alone", jobs) as url:
            eventually(
                lambda: main([*asked, "--prometheus", url]) == 8 and "1 of the checks failed" in capsys.readouterr().out
            )
