"""`latentwatch watchlist`: exit codes and what is printed."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from latentwatch.cli import main
from latentwatch.watchlist.build import build

from tests.support.sources import document, hook, probe, source, write_yaml


@pytest.fixture(autouse=True)
def only_this_verb(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other verbs need packages that this one does not."""
    monkeypatch.setattr("latentwatch.cli.VERBS", {"watchlist": "latentwatch.cli.watchlist"})


@pytest.fixture
def yaml_path(tmp_path: Path) -> Path:
    probe(tmp_path / "p.safetensors", metadata={"hook_point": "resid_post.1"})
    return write_yaml(tmp_path / "w.yaml", document(hook(1, source("linear_probe", "p.safetensors")), notes="a toy"))


def test_build_show_and_verify_a_watchlist(yaml_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = yaml_path.with_name("out.safetensors")
    assert main(["watchlist", "build", str(yaml_path), "--out", str(out)]) == 0
    assert "3 features at 1 hook points, sha256" in capsys.readouterr().out
    assert main(["watchlist", "show", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "resid_post.1: 3 features" in shown
    assert "gate none" in shown
    assert "a toy" in shown
    assert main(["watchlist", "verify", str(out), "--against", str(yaml_path)]) == 0
    assert "the rows are those of the sources" in capsys.readouterr().out


def test_verify_exits_with_1_when_a_source_has_changed(yaml_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = yaml_path.with_name("out.safetensors")
    main(["watchlist", "build", str(yaml_path), "--out", str(out)])
    write_yaml(yaml_path, document(hook(1, source("linear_probe", "p.safetensors", 2)), notes="a toy"))
    assert main(["watchlist", "verify", str(out), "--against", str(yaml_path)]) == 1
    assert "['f2']" in capsys.readouterr().out


def test_build_refuses_to_overwrite_without_force(yaml_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["watchlist", "build", str(yaml_path), "--out", str(yaml_path)]
    assert main(arguments) == 2
    assert "--force" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["show", "verify"])
def test_a_missing_file_is_refused_with_exit_code_2(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["watchlist", verb, str(tmp_path / "none.safetensors")]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_search_prints_features_as_yaml_to_paste(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "labels.csv").write_text("index,label\n7,\"says: it lies, 'knowingly'\"\n8,weather\n")
    arguments = ["watchlist", "search", str(tmp_path / "labels.csv"), "lies", "--format", "csv"]
    assert main(arguments) == 0
    (feature,) = yaml.safe_load(capsys.readouterr().out)
    assert feature["index"] == 7
    assert feature["label"] == "says: it lies, 'knowingly'"
    probe(tmp_path / "p.safetensors", rows=8, metadata={"hook_point": "resid_post.1"})
    build(
        write_yaml(tmp_path / "w.yaml", document(hook(1, source("linear_probe", "p.safetensors", [feature])))),
        tmp_path / "o",
    )
    assert main([*arguments[:3], "nothing", "--format", "csv"]) == 1


def test_every_action_has_help_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for action in ("build", "show", "search", "verify"):
        with pytest.raises(SystemExit):
            main(["watchlist", action, "--help"])
        assert f"example:  latentwatch watchlist {action}" in capsys.readouterr().out
