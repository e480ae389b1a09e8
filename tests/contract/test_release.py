"""What `make release` refuses to publish, and the lowest versions. The gate runs `make release-dry-run` itself."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.engines import ROOT


def script(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


release = script(".ci/release.py")
floors = script(".requirements/floors.py")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with what states a version, all committed, in which a release would run."""
    for name in ("monitor/latentwatch/__init__.py", "helm/Chart.yaml", "helm/Containerfile.vllm", "CHANGELOG.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    change(tmp_path / "CHANGELOG.md", f"## {release.version()} (unreleased)", f"## {release.version()} (2026-12-01)")
    monkeypatch.setattr(release, "ROOT", tmp_path)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "A version")
    git(tmp_path, "tag", f"v{release.version()}")
    return tmp_path


def git(folder: Path, *words: str) -> None:
    subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@example.org", *words], cwd=folder, check=True)


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_the_version_is_the_same_wherever_it_is_stated() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", release.version())


def test_a_chart_of_another_version_is_no_release(checkout: Path) -> None:
    change(checkout / "helm/Chart.yaml", f"appVersion: {release.version()}", "appVersion: 9.9.9")
    with pytest.raises(release.Broken, match=r"appVersion': '9.9.9'"):
        release.version()


def test_a_clean_checkout_at_its_tag_is_ready(checkout: Path) -> None:
    release.refuse_unready(release.version(), "registry.example/team")


def test_what_is_not_ready_is_not_published_and_every_reason_is_said(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    git(checkout, "tag", "-d", f"v{release.version()}")
    change(checkout / "CHANGELOG.md", "(2026-12-01)", "(unreleased)")
    assert release.main(["--publish"]) == 1
    said = capsys.readouterr().err
    assert all(why in said for why in ("has changes", "no tag v", "calls it unreleased", "no --registry")), said
    assert not (checkout / "dist").exists(), "nothing was built before"


@pytest.mark.parametrize("one", release.images("1.2.3", "registry.example/team"), ids=lambda one: one.name)
def test_an_image_that_cannot_be_built_is_named_in_a_dry_run_and_refused_in_a_release(
    one: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(release, "BUILDERS", ("no-such-builder",))
    said = release.image(one, needed=False)
    assert "NOT BUILT HERE, checked by tests/helm/test_images.py" in said and "no-such-builder" in said
    with pytest.raises(release.Broken, match="no-such-builder"):
        release.image(one, needed=True)


def test_both_images_have_the_names_that_the_containerfiles_show() -> None:
    one, other = release.images("0.1.0", "registry.example")
    for image in (one, other):
        shown = (ROOT / image.file).read_text()
        assert f"-t {image.tag}" in shown
        assert f"-f {image.file}" in shown


def test_every_dependency_has_a_lowest_version_that_can_be_tested() -> None:
    """Of what the collector needs; torch and its like in `convert` come with the environment of the model."""
    pinned = floors.floors(PROJECT, ["engine", "collector", "otel", "parquet"])
    assert "uvicorn==0.47" in pinned, "0.34 was accepted and could not start"
    names = [one.partition("==")[0] for one in pinned]
    assert len(names) == len(set(names)), "one floor for each"


def test_a_dependency_without_a_floor_is_refused_by_name() -> None:
    with pytest.raises(SystemExit, match="left-pad"):
        floors.floors({"dependencies": ["numpy>=1.26", "left-pad"], "optional-dependencies": {}}, [])
