"""Every command that README, runbook and docs show: ours are parsed, the runbook's are run against real servers.

Not run: `pip install` (its extras must exist), `vllm serve`, and the commands of docs/kubernetes.md that are not ours.
vLLM's own health page, which the runbook asks for, is a stand-in.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from monitor.cli import build_parser
from tests.support.collectors import collector, exceed
from tests.support.engines import ROOT
from tests.support.stack import alertmanager, ask, eventually, metrics_page, prometheus

PAGES = [ROOT / "README.md", ROOT / "dashboards/runbook.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(path: Path) -> list[str]:
    """Lines of the shell blocks of a page, continuation lines joined, comments cut."""
    blocks = re.findall(r"^ *```(?:sh)?\n(.*?)^ *```", path.read_text(), re.MULTILINE | re.DOTALL)
    text = re.sub(r"\\\n\s*", " ", "\n".join(blocks))
    lines = (re.sub(r"\s+#.*$", "", line).strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


OURS = [
    pytest.param(line, id=f"{path.name}-{line[:60]}")
    for path in PAGES
    for line in commands(path)
    if line.startswith("latentwatch ")
]
RUNBOOK = ROOT / "dashboards/runbook.md"
INLINE = re.findall(r"`((?:curl|amtool) [^`]+)`", RUNBOOK.read_text())
RUN = sorted({line for line in [*commands(RUNBOOK), *INLINE] if line.startswith(("curl", "amtool"))})


@pytest.mark.parametrize("line", OURS)
def test_every_command_of_ours_parses(line: str) -> None:
    words = shlex.split(line.replace("$AM", "http://am:9093").rstrip("& "))
    build_parser().parse_args(words[1:])


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_extras_that_are_installed_exist(path: Path) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for wanted in re.findall(r"latentwatch\[([\w,-]+)\]", path.read_text()):
        assert set(wanted.split(",")) <= set(extras)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_between_the_pages_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), target


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    folder = tmp_path_factory.mktemp("servers")
    config = yaml.safe_load((ROOT / "dashboards/alertmanager.yml").read_text())
    with collector(folder) as made, alertmanager(folder, config) as receiver:
        exceed(made, "chatcmpl-7f3c-0123abcd")
        here = made.http_url.removeprefix("http://")
        with (
            prometheus(folder, {"latentwatch": [here]}, alertmanager_url=receiver) as url,
            metrics_page(lambda: "") as engine,
        ):
            eventually(
                lambda: ask(url, "query_exemplars", query="latentwatch_exceedances_total", start=0, end=time.time())
            )
            yield {"COLLECTOR": here, "PROMETHEUS": url.removeprefix("http://"), "AM": receiver, "ENGINE": engine}


@pytest.mark.e2e
@pytest.mark.parametrize("line", RUN)
def test_every_command_of_the_runbook_runs(line: str, servers: dict[str, str]) -> None:
    env = {**os.environ, "AM": servers["AM"], "USER": "oncall"}
    if "SILENCE_ID" in line:
        add = f"amtool --alertmanager.url={servers['AM']} silence add a=b --duration=1m --author=t --comment=t"
        line = line.replace("SILENCE_ID", subprocess.check_output(shlex.split(add), text=True).strip())
    for name in ("COLLECTOR", "PROMETHEUS", "ENGINE"):
        line = re.sub(rf"\b{name}\b", servers[name], line)
    line = re.sub(r"\bcurl\b", "curl --fail-with-body", line)
    ran = subprocess.run(["bash", "-o", "pipefail", "-c", line], env=env, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, f"{line}\n{ran.stdout}{ran.stderr}"
