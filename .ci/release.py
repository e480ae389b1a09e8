"""What a release consists of, built into dist/ and checked; with --publish, published.

    python .ci/release.py                                       # a dry run: all but publishing
    python .ci/release.py --publish --registry registry.example/team

Publishing takes a clean checkout at the tag of its version (v0.1.0), a changelog that no longer calls it unreleased,
twine's settings for the package index (TWINE_REPOSITORY, TWINE_USERNAME, TWINE_PASSWORD) and a login at the registry.
An image that could not be built here is named, with the reason; in a dry run that is no failure, since what its
Containerfile does is held by tests/helm/test_images.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
VENV = ROOT / ".cache/release"
"""An empty environment that the wheel goes into, as at a user's."""
EXTRAS = "collector,otel"
"""Of the image, and so of its bill of materials."""
BUILDERS = ("podman", "buildah", "docker")


class Broken(Exception):
    """A release that must not go out, and why."""


@dataclass(frozen=True)
class Image:
    """One of the images that are published."""

    name: str
    file: str
    context: str
    tag: str
    arguments: tuple[str, ...] = ()


def version() -> str:
    """The version, where every place that states it says the same. Raises: Broken."""
    chart = (ROOT / "helm/Chart.yaml").read_text()
    stated = {
        "monitor/latentwatch/__init__.py": r'^__version__ = "(.+)"$',
        "helm/Chart.yaml": r"^version: (\S+)$",
        "CHANGELOG.md": r"^## (\S+)",
    }
    found = {path: re.findall(pattern, (ROOT / path).read_text(), re.MULTILINE)[0] for path, pattern in stated.items()}
    found["helm/Chart.yaml, appVersion"] = re.findall(r"^appVersion: (\S+)$", chart, re.MULTILINE)[0]
    if len(set(found.values())) > 1:
        raise Broken(f"its version is not the same everywhere: {found}")
    return next(iter(found.values()))


def images(of: str, registry: str) -> list[Image]:
    """The collector's, which brings the plugin too, and vLLM's with the plugin in it."""
    vllm = re.findall(r"^ARG VLLM=\S+:(\S+)$", (ROOT / "helm/Containerfile.vllm").read_text(), re.MULTILINE)[0]
    ours = f"{registry}/latentwatch:{of}"
    return [
        Image("latentwatch", "helm/Containerfile", ".", ours),
        Image(
            "vllm-latentwatch",
            "helm/Containerfile.vllm",
            "helm",
            f"{registry}/vllm-latentwatch:{vllm}-{of}",
            ("--build-arg", f"LATENTWATCH={ours}"),
        ),
    ]


def run(*argv: str | Path, seconds: float = 600) -> str:
    """What a command printed. Raises: Broken: it failed."""
    ran = subprocess.run([*map(str, argv)], cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    if ran.returncode:
        raise Broken(f"{Path(argv[0]).name} {argv[1] if len(argv) > 1 else ''}: {(ran.stderr or ran.stdout).strip()}")
    return ran.stdout


def python(*argv: str | Path) -> str:
    """A module of the environment that this runs in."""
    return run(sys.executable, "-m", *argv)


# -- what is built


def packages(of: str) -> str:
    """The sdist, and from it the wheel, so that the sdist is whole. Both are checked, and what the wheel holds."""
    python("build", "--no-isolation", "--outdir", DIST)
    sdist, wheel = DIST / f"latentwatch-{of}.tar.gz", DIST / f"latentwatch-{of}-py3-none-any.whl"
    python("twine", "check", "--strict", sdist, wheel)
    run(Path(sys.executable).with_name("check-wheel-contents"), wheel)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    if missing := sorted(expected_in_wheel(of) - names):
        raise Broken(f"{wheel.name} lacks {', '.join(missing)}")
    if foreign := sorted(name for name in names if not name.startswith((f"latentwatch-{of}.", "latentwatch/"))):
        raise Broken(f"{wheel.name} would install {', '.join(foreign)} beside the package")
    return f"{sdist.name}, {wheel.name}: {len(names)} files"


def expected_in_wheel(of: str) -> set[str]:
    """Names in the wheel: of the package whatever git has, and the rules and dashboards that an installation brings."""
    data = f"latentwatch-{of}.data/data/share/latentwatch/dashboards"
    package = run("git", "ls-files", "monitor/latentwatch").splitlines()
    installed = run("git", "ls-files", "dashboards/*.yml", "dashboards/*.md", "dashboards/rules/*.yaml").splitlines()
    installed += run("git", "ls-files", "dashboards/grafana/*.json").splitlines()
    there = {name for name in (*package, *installed) if (ROOT / name).exists()}
    # A glob of git's goes into folders: the rules' tests are not installed.
    there -= {name for name in there if "/rules/tests/" in name}
    return {
        re.sub("^dashboards", data, name) if name.startswith("dashboards") else name.removeprefix("monitor/")
        for name in there
    }


def installation(of: str) -> str:
    """The wheel installs into an empty environment by the versions that the tests run with, and its command starts."""
    run("python3", "-m", "venv", "--clear", VENV)
    wheel = f"{DIST / f'latentwatch-{of}-py3-none-any.whl'}[{EXTRAS}]"
    lock = ROOT / ".requirements/engine-cpu.txt"
    run(VENV / "bin/python", "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", lock, wheel)
    run(VENV / "bin/python", "-m", "pip", "check")
    latentwatch = VENV / "bin/latentwatch"
    said = run(latentwatch, "--version").strip()
    if said != f"latentwatch {of}":
        raise Broken(f"the installed command says {said!r}")
    json.loads(run(latentwatch, "collector", "--config-schema"))
    return f"{said} [{EXTRAS}] starts in an empty environment"


def bill_of_materials(of: str) -> str:
    """CycloneDX of what was installed, which is what the collector's image holds; valid by its schema."""
    path = DIST / f"latentwatch-{of}.cdx.json"
    options = ("--pyproject", "pyproject.toml", "--output-reproducible", "--of", "JSON", "--validate", "-o", path)
    python("cyclonedx_py", "environment", *options, VENV / "bin/python")
    parts = {part["name"].lower() for part in json.loads(path.read_text())["components"]}
    listed = json.loads(run(VENV / "bin/python", "-m", "pip", "list", "--format", "json", "--exclude", "pip"))
    own = {"latentwatch", "setuptools"}
    if missing := sorted({one["name"].lower() for one in listed} - parts - own):
        raise Broken(f"{path.name} lacks {', '.join(missing)}")
    return f"{path.name}: {len(parts)} components, CycloneDX"


def chart() -> str:
    """The chart as an archive, with the rules and dashboards that it links to."""
    from helm_python import chart as helm

    helm.lint(ROOT / "helm", None, strict=False)
    archive = Path(helm.package(ROOT / "helm", destination=DIST))
    with tarfile.open(archive) as file:
        names = {name.removeprefix("latentwatch/") for name in file.getnames()}
    linked = {f"files/{at}/{path.name}" for at, (of, glob) in _LINKED.items() for path in (ROOT / of).glob(glob)}
    wanted = {"Chart.yaml", "values.schema.json", "README.md"} | linked
    if missing := sorted(wanted - names):
        raise Broken(f"{archive.name} lacks {', '.join(missing)}")
    return f"{archive.name}: {len(names)} files"


_LINKED = {"dashboards": ("dashboards/grafana", "*.json"), "rules": ("dashboards/rules", "*.yaml")}


def image(one: Image, *, needed: bool) -> str:
    """Build it where a builder is and its base can be had; else say by name that it was not. Raises: Broken: needed."""
    builder = next((name for name in BUILDERS if shutil.which(name)), None)
    bases = re.findall(r"^ARG \w+=(\S+/\S+)$", (ROOT / one.file).read_text(), re.MULTILINE)
    try:
        if builder is None:
            raise Broken(f"none of {', '.join(BUILDERS)} is here")
        for base in bases if needed or one.name == "latentwatch" else ():
            run(builder, "pull", base)
        if not needed and one.name != "latentwatch":
            raise Broken(f"its base {bases[0]} has gigabytes, which a dry run does not fetch")
        run(builder, "build", "-f", one.file, *one.arguments, "-t", one.tag, one.context, seconds=3600)
    except Broken as why:
        if needed:
            raise
        return f"NOT BUILT HERE, checked by tests/helm/test_images.py: {str(why).splitlines()[-1][:160]}"
    return f"{one.tag} by {builder}"


def sums() -> str:
    """SHA256SUMS of every file."""
    files = sorted(path for path in DIST.iterdir() if path.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (DIST / "SHA256SUMS").write_text("".join(lines))
    return f"SHA256SUMS of {len(lines)} files"


# -- what is published


def refuse_unready(of: str, registry: str) -> None:
    """Raises: Broken: publishing would say something that the repository does not."""
    reasons = []
    if run("git", "status", "--porcelain").strip():
        reasons.append("the checkout has changes: commit them")
    if f"v{of}" not in run("git", "tag", "--points-at", "HEAD").split():
        reasons.append(f"no tag v{of} is here: git tag v{of}")
    if re.search(rf"^## {re.escape(of)} \(unreleased\)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE):
        reasons.append("CHANGELOG.md calls it unreleased: write the date")
    if not registry:
        reasons.append("no --registry for images and chart")
    if reasons:
        raise Broken("not ready to publish: " + "; ".join(reasons))


def publish(of: str, registry: str) -> str:
    """Packages to the index, images and chart to the registry."""
    import helm_python

    builder = next(name for name in BUILDERS if shutil.which(name))
    wheels = sorted(DIST.glob(f"latentwatch-{of}-*.whl"))
    python("twine", "upload", "--non-interactive", *wheels, DIST / f"latentwatch-{of}.tar.gz")
    for one in images(of, registry):
        run(builder, "push", one.tag, seconds=3600)
    helm_python.RegistryClient().push(DIST / f"latentwatch-{of}.tgz", f"oci://{registry}/charts")
    return f"published {of}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--publish", action="store_true", help="publish what was built")
    parser.add_argument("--registry", default="", metavar="HOST/PATH", help="where images and chart go")
    args = parser.parse_args(argv)
    try:
        of = version()
        if args.publish:
            refuse_unready(of, args.registry)
        shutil.rmtree(DIST, ignore_errors=True)
        DIST.mkdir()
        steps: list[tuple[str, Callable[[], str]]] = [
            ("packages", lambda: packages(of)),
            ("install", lambda: installation(of)),
            ("SBOM", lambda: bill_of_materials(of)),
            ("chart", chart),
            *(
                (f"image {one.name}", lambda one=one: image(one, needed=args.publish))
                for one in images(of, args.registry or "localhost")
            ),
            ("sums", sums),
        ]
        if args.publish:
            steps.append(("publish", lambda: publish(of, args.registry)))
        for name, step in steps:
            print(f"{name:<24}{step()}", flush=True)
    except Broken as broken:
        print(f"release: {broken}", file=sys.stderr)
        return 1
    if not args.publish:
        print("A dry run: nothing was published.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
