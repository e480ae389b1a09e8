"""Every process and every verb in hosts that mean no good (tests/support/hostile.py): none of it decides who lives.

What a process needs is refused by name; what it can do without, it does without. Loopback never asks a proxy.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from latentwatch.cli import build_parser
from latentwatch.collector.drift import DriftSettings
from latentwatch.demo.run.processes import free_ports
from latentwatch.drift import baseline
from latentwatch.evidence.audit import Audit
from latentwatch.watchlist import file as watchlist_file
from prometheus_client.parser import text_string_to_metric_families

from tests.support import sources, tiny
from tests.support.collectors import FEATURES, collector
from tests.support.drift import random_baseline
from tests.support.evidence import one_request, store
from tests.support.hostile import ROOT, WORLDS, World, give_away, trap
from tests.support.otlp import otlp_receiver
from tests.support.streams import watchlist
from tests.support.stub_demo import write_assets

pytestmark = pytest.mark.e2e

REQUESTS = 3
PYTHON = (sys.executable, "-P")
ENGINE = """
import os, sys, types
from pathlib import Path
sys.modules["vllm"] = types.SimpleNamespace(__version__="0")  # vLLM itself reads its files in the locale's encoding
from tests.e2e.test_failures import Engine
if sys.argv[4] == "deleted":  # torch does not load there
    os.mkdir("gone")
    os.chmod("gone", 0o700)
    os.chdir("gone")
    os.rmdir("../gone")
engine = Engine(Path(sys.argv[1]), sys.argv[2])
for _ in range(int(sys.argv[3])):
    engine.request(8)
engine.worker.shutdown()
engine.exporter.wait(30)
"""
TOKENS = REQUESTS * (5 + 7)
"""A prompt of five, and eight tokens out of which the last is never fed back."""


@dataclass(frozen=True)
class Scene:
    """One world, what its processes may read and write, and who listens in vain."""

    world: World
    folder: Path
    trap: str

    def start(self, *command: str, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.world.argv(command, self.folder),
            env=self.world.environment(self.trap, **env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *command: str, seconds: float = 120.0) -> tuple[int, str]:
        """Exit code, and all that it said."""
        process = self.start(*command)
        try:
            out, err = process.communicate(timeout=seconds)
        finally:
            process.kill()
        return process.returncode, out + err

    def engine(self, target: str) -> tuple[int, str]:
        """A stand-in engine's whole life, with its exporter."""
        there = "decoys" if self.world.cwd == "deleted" else self.world.cwd
        arguments = (str(self.folder / "w.safetensors"), target, str(REQUESTS), self.world.cwd)
        # torch does not load without a folder for temporary files either.
        env = {**self.world.env, "TMPDIR": str(self.folder)}
        return replace(self, world=replace(self.world, cwd=there, env=env)).run(*PYTHON, "-c", ENGINE, *arguments)

    def verb(self, *words: str) -> tuple[int, str]:
        return self.run(*PYTHON, "-m", "latentwatch", *words)


@pytest.fixture(params=WORLDS, ids=lambda world: world.name)
def scene(request: pytest.FixtureRequest) -> Iterator[Scene]:
    with tempfile.TemporaryDirectory(prefix="lwh") as name, trap() as (address, asked):
        yield Scene(request.param, Path(name), address)
        assert asked == [], "a proxy was asked for this host"


def until(condition: Callable[[], Any], what: str, seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError):
            if found := condition():
                return found
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.1)


def sums(port: int, name: str, **labels: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    samples = (sample for family in families for sample in family.samples)
    return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())


@contextlib.contextmanager
def serving(scene: Scene, port: int, *words: str) -> Iterator[subprocess.Popen[str]]:
    """A collector process in the scene's world, until it was told to end; it ends as one that nothing befell."""
    process = scene.start(*PYTHON, "-m", "latentwatch", "collector", "--http", f"127.0.0.1:{port}", *words)
    try:

        def answers() -> bool:
            assert process.poll() is None, f"it ended with {process.returncode}: {process.communicate()}"
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=10) as answer:
                return bool(answer.status == 200)

        until(answers, "a collector")
        yield process
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=30)
        assert process.returncode == 0, said
        assert "Traceback" not in "".join(said), said
    finally:
        process.kill()
        process.wait()


def test_engine_exporter_sidecar_and_gateway_count_every_token(scene: Scene) -> None:
    """Each of the processes in the same world, over TCP and Unix sockets, with state, evidence and OTLP."""
    folder = scene.folder
    tiny.watchlist(folder / "w.safetensors")
    (folder / "evidence").mkdir(mode=0o700)
    (folder / "state").mkdir(mode=0o700)
    give_away(folder)
    gateway_port, sidecar_port, tcp = free_ports(3)
    watched = ("--watchlist", str(folder / "w.safetensors"))
    with otlp_receiver() as otlp:
        gateway = ("--listen", f"unix://{folder}/g.sock", *watched)
        sidecar = (
            *("--listen", f"127.0.0.1:{tcp}", *watched, "--forward-to", f"unix://{folder}/g.sock"),
            *("--forward-name", "sidecar", "--state", str(folder / "state"), "--evidence", str(folder / "evidence")),
            *("--otlp", otlp.url, "--otlp-metrics", "1"),
        )
        with serving(scene, gateway_port, *gateway), serving(scene, sidecar_port, *sidecar):
            code, said = scene.engine(f"127.0.0.1:{tcp}")
            assert code == 0, said
            for port in (sidecar_port, gateway_port):
                until(lambda port=port: sums(port, "latentwatch_requests_total") == REQUESTS, "the requests' ends")
                assert sums(port, "latentwatch_tokens_total", state="scored") == TOKENS, said
            assert sums(sidecar_port, "latentwatch_engine_exporter_restarts_total") == 0
            until(lambda: otlp.metrics, "metrics over OTLP")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file of each kind that a verb reads."""
    made = tmp_path_factory.mktemp("library")
    with store(made / "evidence") as writing:
        for number in (1, 2, 3):
            writing.write(
                one_request(number, request_id=f"chatcmpl-{number}-0123abcd", seconds=time.time()), time.time()
            )
    with contextlib.closing(Audit(made / "evidence")) as audit:
        audit.add(time.time(), "cli:someone", "query", 3, subject="since=2h")
    watched = watchlist_file.write(watchlist(FEATURES), made / "w.safetensors")
    baseline.write(random_baseline(watched.features, sha256=watched.sha256), made / "prod.baseline")
    sources.probe(made / "p.safetensors", metadata={"hook_point": "resid_post.1"})
    explained = sources.source("linear_probe", "p.safetensors")
    document = sources.document(sources.hook(1, explained), notes="Täuschung ✓")
    sources.write_yaml(made / "w.yaml", document)
    (made / "labels.csv").write_text("index,label\n7,Täuschung ✓ lies\n", encoding="utf-8")
    (made / "prompts.txt").write_text("Guten Tag, schöne Welt\n", encoding="utf-8")
    return made


VERBS = {
    "query": "evidence query --dir {here}/evidence",
    "show": "evidence show chatcmpl-1 --dir {here}/evidence",
    "html": "evidence show chatcmpl-1 --dir {here}/evidence --html {here}/r.html",
    "delete": "evidence delete chatcmpl-2 --dir {here}/evidence",
    "export": "evidence export --dir {here}/evidence --out {here}/parquet",
    "audit": "evidence audit --dir {here}/evidence",
    "repair": "evidence repair --dir {here}/evidence",
    "key": "evidence key {here}/evidence.key",
    "build": "watchlist build {here}/w.yaml --out {here}/built.safetensors",
    "cards": "watchlist show {here}/w.safetensors",
    "page": "watchlist show {here}/w.safetensors --html {here}/cards.html",
    "search": "watchlist search {here}/labels.csv lies --format csv",
    "verify": "watchlist verify {here}/w.safetensors",
    "baseline": "baseline show {here}/prod.baseline",
    "schema": "collector --config-schema",
    "rules": "rules --out {here}/rules --page https://latentwatch.example.org",
    "doctor": "doctor --collector {collector} --watchlist {here}/w.safetensors",
    "canary": "canary --server {server} --model m --prompts {here}/prompts.txt --key {here}/canary.key --make-key "
    "--every 0 --runs 2",
}
ELSEWHERE = {
    ("record",): "with replay and calibrate, below",
    ("replay",): "below",
    ("calibrate",): "below",
    ("collector",): "with an engine, above",
    ("demo",): "with stand-ins, below",
    ("demo", "build"): "trains a model, with libraries that need more of a host",
    ("watchlist", "record"): "runs a model, with libraries that need more of a host",
    ("watchlist", "discover"): "as record",
    ("watchlist", "probe"): "as record",
    ("watchlist", "start"): "as record",
    ("watchlist", "try"): "as record",
}
"""Verbs that the table has not, and why."""
LEAVES = {
    "html": "r.html",
    "export": "parquet/requests.parquet",
    "key": "evidence.key",
    "build": "built.safetensors",
    "rules": "rules/alerts.yaml",
    "page": "cards.html",
    "canary": "canary.key",
}
"""What a verb has left behind, whether or not anybody heard of it."""
SILENT = {"canary"}
"""Verbs that print nothing where all is well, or whose work is not what they print."""


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A collector, and what answers as a model's server does."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    model = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=model.serve_forever, daemon=True).start()
    with collector(tmp_path_factory.mktemp("collector"), drift=DriftSettings()) as made:
        yield {"collector": made.http_url, "server": f"http://127.0.0.1:{model.server_address[1]}"}
    model.shutdown()
    model.server_close()


@pytest.mark.parametrize("name", VERBS)
def test_a_verb_does_its_work(name: str, scene: Scene, library: Path, servers: dict[str, str]) -> None:
    shutil.copytree(library, scene.folder, dirs_exist_ok=True)
    scene.folder.chmod(0o700)
    give_away(scene.folder)
    words = [word.format(here=scene.folder, **servers) for word in VERBS[name].split(" ")]
    code, said = scene.verb(*words)
    assert "Traceback" not in said, said
    if name in LEAVES:
        assert (scene.folder / LEAVES[name]).stat().st_size, said
        assert (scene.folder / LEAVES[name]).stat().st_mode & 0o402 == 0o400, "the user's own, and nobody writes to it"
    wanted = {"closed": 1, "full": 1, "broken": 128 + signal.SIGPIPE}.get(scene.world.streams, 0)
    if name == "doctor" and scene.world.streams != "broken":
        assert code == 5, "no engine streams to it, whether or not that can be written"
        assert not scene.world.prints or "ok      collector" in said, said
    else:
        assert code == (0 if name in SILENT else wanted), said


def words_of(parser: argparse.ArgumentParser, begin: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every verb, and every action of one."""
    if (verb := getattr(parser, "verb", None)) is not None:
        parser.verb = None  # type: ignore[attr-defined]
        verb.add_arguments(parser)
    # argparse has no public way to ask for them.
    choices = [a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if begin and not (choices and begin != ("demo",)):
        yield begin
    for name, child in (item for choice in choices for item in choice.items()):
        yield from words_of(child, (*begin, name))


def test_no_verb_is_left_out() -> None:
    here = {tuple(words.split(" ")[:2]) for words in VERBS.values()} | {(w.split(" ")[0],) for w in VERBS.values()}
    every = list(words_of(build_parser()))
    assert ("evidence", "query") in every and ("doctor",) in every
    left = [words for words in every if words not in here and words not in ELSEWHERE]
    assert left == [], "run it in the table VERBS, where what it prints and leaves is looked at"


def test_recorded_traffic_becomes_a_baseline_and_is_replayed(scene: Scene) -> None:
    """`record` until it is told to end, with a stand-in engine; `calibrate`; `replay`."""
    folder = scene.folder
    tiny.watchlist(folder / "w.safetensors")
    give_away(folder)
    recording = str(folder / "a.recording")
    process = scene.start(
        *PYTHON, "-m", "latentwatch", "record", "--listen", f"unix://{folder}/c.sock", "--out", recording
    )
    try:
        until(lambda: (folder / "c.sock").exists(), "the recorder")
        code, said = scene.engine(f"unix://{folder}/c.sock")
        assert code == 0, said
        process.send_signal(signal.SIGTERM)
        told = process.communicate(timeout=30)
        assert process.returncode == 0, told
    finally:
        process.kill()
        process.wait()
    watched = ("--watchlist", str(folder / "w.safetensors"))
    code, said = scene.verb("replay", recording, *watched)
    assert "Traceback" not in said and code in (0, 1, 141)
    if scene.world.prints:
        assert code == 0 and f"{REQUESTS} ended requests" in said, said
    # Far too little traffic: a refusal by name.
    code, said = scene.verb("calibrate", "--from", recording, *watched, "--model-name", "fake", "--out", f"{folder}/b")
    assert "Traceback" not in said and code == 2
    assert not scene.world.prints or "requests" in said


def test_the_demo_runs_its_stand_ins_to_the_end(scene: Scene) -> None:
    folder = scene.folder
    write_assets(folder / "assets")
    (folder / "out").mkdir()
    give_away(folder)
    code = (
        "import sys; from latentwatch import host; from latentwatch.cli.output import lenient_streams\n"
        "host.prepare_process(); from tests.support import stub_demo\n"
        "sys.argv = ['demo', sys.argv[1], '--seconds', '2']; stub_demo.write_assets = lambda _: None\n"
        "with lenient_streams(): ended = stub_demo.main()\nsys.exit(ended)"
    )
    ended, said = scene.run(*PYTHON, "-c", code, str(folder))
    assert ended == 0, said
    (figures,) = [*folder.glob("cwd-*/demo-report.json"), *folder.glob("out/demo-report.json")]
    assert json.loads(figures.read_text())["passed"] is True


def texts_without_encoding(path: Path) -> Iterator[str]:
    """Calls that read or write text in the encoding of whoever's locale it is."""
    for call in ast.walk(ast.parse(path.read_text())):
        if not isinstance(call, ast.Call):
            continue
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        named = {keyword.arg for keyword in call.keywords}
        words = [arg.value for arg in call.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        # Path.open has its mode first, open() second; neither os.open nor what is opened for bytes has an encoding.
        place = {"read_text": 1, "write_text": 2}.get(name)
        text = place is not None and len(call.args) < place
        if name == "open" and ast.unparse(call.func) not in ("os.open", "webbrowser.open", "Image.open"):
            modes = [word for word in words if set(word) <= set("rwxab+t")] + [
                str(getattr(keyword.value, "value", "")) for keyword in call.keywords if keyword.arg == "mode"
            ]
            text = any("b" not in mode for mode in modes)
        if text and "encoding" not in named:
            yield f"{path.relative_to(ROOT)}:{call.lineno}: {ast.unparse(call)}"


def test_no_text_is_read_or_written_in_the_encoding_of_the_locale() -> None:
    found = [
        line
        for folder in ("monitor", "dashboards")
        for path in (ROOT / folder).rglob("*.py")
        for line in texts_without_encoding(path)
    ]
    assert found == []


def test_every_python_of_ours_starts_without_the_working_folder_on_its_path() -> None:
    started = []
    for path in (ROOT / "monitor").rglob("*.py"):
        text = path.read_text()
        started += [line.strip() for line in text.splitlines() if "sys.executable" in line]
    assert started and all('"-P"' in line or '"-I"' in line for line in started), started


def test_the_worlds_are_what_they_say(scene: Scene) -> None:
    """Else a test above would hold because nothing was refused."""
    code = (
        "import os, sys, pwd, json, errno; found = {}\n"
        "def answer(name, call):\n"
        "    try: call(); found[name] = ''\n"
        "    except Exception as error:\n"
        "        found[name] = errno.errorcode.get(getattr(error, 'errno', 0), type(error).__name__)\n"
        "answer('scheduler', lambda: os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0)))\n"
        "answer('memory', lambda: os.memfd_create('x'))\n"
        "answer('user', lambda: pwd.getpwuid(os.geteuid()))\n"
        "answer('folder', os.getcwd)\n"
        "answer('disk', lambda: open('/nobody', 'w'))\n"
        "answer('print', lambda: print('x' * 100, flush=True))\n"
        "os.umask(0o022); open(sys.argv[1], 'w').write(json.dumps(found))"
    )
    give_away(scene.folder)
    scene.run(*PYTHON, "-c", code, str(scene.folder / "found.json"))
    found = json.loads((scene.folder / "found.json").read_text())
    assert found["scheduler"] == found["memory"] == scene.world.error
    assert found["user"] == "KeyError" and found["disk"] in ("EROFS", "EACCES")
    assert (found["folder"] == "ENOENT") == (scene.world.cwd == "deleted")
    assert found["print"] == {"full": "ENOSPC", "broken": "EPIPE"}.get(scene.world.streams, "")
