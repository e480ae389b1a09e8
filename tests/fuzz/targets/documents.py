"""Texts and files that people or other processes of ours write."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import yaml
from latentwatch.collector.config import CollectorConfig
from latentwatch.drift import baseline
from latentwatch.errors import ConfigRefused
from latentwatch.transport import credentials
from latentwatch.transport.address import Address, positive
from latentwatch.transport.spool import SpoolSettings
from latentwatch.watchlist import file as watchlist_file
from latentwatch.watchlist import labels, selection
from latentwatch.watchlist.location import Location

from tests.fuzz.targets.target import Target, put, scratch
from tests.support import sources
from tests.support.drift import random_baseline
from tests.support.streams import probe, sparse, watchlist

FEATURES = (sparse("a", limit=watchlist_file.Limit("max", 3.0)), probe("p"))


def _watchlist(data: bytes) -> None:
    read = watchlist_file.parse(data)
    written = watchlist_file.write(read, scratch() / "again.safetensors")
    again = watchlist_file.read(scratch() / "again.safetensors")
    assert repr(again) == repr(written)


def _baseline(data: bytes) -> None:
    read = baseline.parse(data)
    assert baseline.parse(read.to_bytes()).to_bytes() == read.to_bytes()


def _yaml(data: bytes) -> None:
    chosen = selection.parse(data, "watchlist.yaml", scratch())
    assert repr(selection.parse(data, "watchlist.yaml", scratch())) == repr(chosen)


def _labels(data: bytes) -> None:
    format_name = ("neuronpedia", "json", "csv")[(data[0] if data else 0) % 3]
    if format_name == "neuronpedia":
        folder = scratch() / "labels"
        folder.mkdir(exist_ok=True)
        put(folder / "batch-0.jsonl", data[1:])
        location = Location("labels", scratch())
    else:
        put(scratch() / f"labels.{format_name}", data[1:])
        location = Location(f"labels.{format_name}", scratch())
    found = labels.load(format_name, location)
    assert dict(labels.load(format_name, location)) == dict(found)


def _settings(data: bytes) -> None:
    path = scratch() / "collector.yaml"
    path.write_bytes(data)
    read = CollectorConfig.read({}, path)
    dumped = {name.replace("_", "-"): value for name, value in json.loads(read.model_dump_json()).items()}
    path.write_text(yaml.safe_dump({name: value for name, value in dumped.items() if value is not None}))
    assert CollectorConfig.read({}, path) == read


_VARIABLES = (
    "LATENTWATCH_SPOOL",
    "LATENTWATCH_SPOOL_MAX_MIB",
    "LATENTWATCH_SPOOL_SYNC_SECONDS",
    credentials.CERTIFICATE,
    credentials.KEY,
    credentials.AUTHORITY,
    credentials.TOKEN_FILE,
)


def _environment(data: bytes) -> None:
    kind, text = (data[0] if data else 0) % 3, os.fsdecode(data[1:].replace(b"\0", b""))
    if kind == 0:
        address = Address.parse(text, listening=True)
        assert Address.parse(str(address), listening=True) == address
    elif kind == 1:
        assert 0 < positive({"X": text}, "X", 1.0) < 1e9
    else:
        env = dict(zip(_VARIABLES, text.split("\n"), strict=False))
        SpoolSettings.from_env(env)
        shown = credentials.Credentials.from_env(env)
        try:
            shown.metadata()
        except ConfigRefused as refusal:
            assert refusal.reason == "token_unusable"
            raise


@cache
def _seed_files() -> dict[str, bytes]:
    folder = scratch()
    built = watchlist_file.write(watchlist(FEATURES), folder / "seed.safetensors")
    made = random_baseline(FEATURES, sha256=built.sha256)
    return {"watchlist": (folder / "seed.safetensors").read_bytes(), "baseline": made.to_bytes()}


def _yaml_seeds() -> Sequence[bytes]:
    example = Path(selection.__file__).with_name("example.yaml").read_bytes()
    hook = {
        "hook_point": "resid_post.2",
        "sources": [{"format": "linear_probe", "path": "p.safetensors", "features": [{"name": "f0", "id": "a"}]}],
    }
    return [example, yaml.safe_dump(sources.document(hook)).encode()]


def _label_seeds() -> Sequence[bytes]:
    return [
        b'\0{"index": "3", "description": "a label", "modelId": "m", "layer": "2-res", "explanationModelName": "x"}\n',
        b'\1{"3": "a label"}',
        b"\2index,label\n3,a label\n",
    ]


def _settings_seeds() -> Sequence[bytes]:
    options = {"watchlist": "w", "listen": ["unix:///a", "[::]:9090"], "http": "0.0.0.0:9464", "evidence-days": 7.5}
    options |= {
        "evidence": "e",
        "route": "^(a|b)-",
        "otlp": "http://127.0.0.1:4317",
        "http-host": ["a"],
        "peer-streams": 4,
    }
    return [b"watchlist: w\n", yaml.safe_dump(options).encode()]


DOCUMENTS = [
    Target("watchlist file", _watchlist, lambda: [_seed_files()["watchlist"]], ("watchlist/file.py", "storage.py")),
    Target("baseline file", _baseline, lambda: [_seed_files()["baseline"]], ("drift/baseline.py", "storage.py")),
    Target(
        "watchlist.yaml",
        _yaml,
        _yaml_seeds,
        ("watchlist/document.py", "watchlist/selection.py"),
        tuple(
            word.encode()
            for word in ("hook_points:", "sources:", "features:", "limit:", "&a", "*a", "!!python/", "<<:", ".nan")
        ),
    ),
    Target("labels", _labels, _label_seeds, ("watchlist/labels.py",), (b'"index"', b'"description"', b"\x1f\x8b")),
    Target(
        "settings file",
        _settings,
        _settings_seeds,
        ("collector/config.py", "watchlist/document.py"),
        tuple(name.replace("_", "-").encode() + b": " for name in CollectorConfig.model_fields),
    ),
    Target(
        "environment",
        _environment,
        lambda: [b"\0unix:///run/a.sock", b"\0[::1]:4319", b"\0host:1", b"\x011e3", b"\x02/tmp/x\n10\n1"],
        ("transport/address.py", "transport/credentials.py", "transport/spool.py", "secrets.py"),
    ),
]
