"""Options of the collector: where they may stand, which counts, and what is refused."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path
from typing import get_args

import jsonschema
import pytest
import yaml
from latentwatch.cli import build_parser, options
from latentwatch.cli.collector import settings
from latentwatch.collector.config import CollectorConfig, flag, variable
from latentwatch.errors import ConfigRefused, Refusal
from pydantic import ValidationError

GIVEN = {
    "watchlist": "w.safetensors",
    "listen": ["unix:///a", "[::]:9090"],
    "http": "0.0.0.0:9464",
    "insecure": True,
    "log_level": "debug",
    "log_format": "json",
    "state": "state",
    "baseline": "prod.baseline",
    "canary_key": "canary",
    "route": "^(.*?)-",
    "request_id_key_file": "ids.key",
    "token_file": ["t1", "t2"],
    "peer_streams": 8,
    "tls_cert": "c",
    "tls_key": "k",
    "tls_client_ca": "ca",
    "http_token_file": ["h1"],
    "http_tls_cert": "hc",
    "http_tls_key": "hk",
    "http_host": ["lw.example.org"],
    "http_connections": 64,
    "runbook_url": "https://wiki.example.org/latentwatch",
    "grafana_url": "https://grafana.example.org",
    "http_peer_connections": 16,
    "http_body_mib": 4.0,
    "forward_to": "gateway:9090",
    "forward_name": "pod-0",
    "forward_ca": "fca",
    "forward_cert": "fc",
    "forward_key": "fk",
    "forward_token_file": "ft",
    "evidence": "evidence",
    "evidence_days": 7.5,
    "evidence_gib": 0.5,
    "evidence_keep": "all",
    "evidence_token": "et",
    "evidence_readers": "everyone",
    "evidence_key": "ek",
    "evidence_content_hours": 1.0,
    "otlp": "http://127.0.0.1:4317",
    "otlp_metrics": 15.0,
}
"""Every option, with a value that is not its default."""


def test_every_option_is_among_those_that_are_tested():
    assert set(GIVEN) == set(CollectorConfig.model_fields)
    defaults = CollectorConfig(watchlist="x")
    assert all(getattr(CollectorConfig(**GIVEN), name) != getattr(defaults, name) for name in GIVEN)


def argv(given):
    lists = {name: value if isinstance(value, list) else [value] for name, value in given.items()}
    pairs = [(f"--{flag(name)}", value) for name, values in lists.items() for value in values]
    return [part for option, value in pairs for part in ((option,) if value is True else (option, str(value)))]


def from_flags(given, monkeypatch, tmp_path):
    return CollectorConfig.read(options.given(build_parser().parse_args(["collector", *argv(given)]), CollectorConfig))


def from_environment(given, monkeypatch, tmp_path):
    for name, value in given.items():
        monkeypatch.setenv(variable(name), ", ".join(value) if isinstance(value, list) else str(value))
    return CollectorConfig.read({})


def from_file(given, monkeypatch, tmp_path):
    path = tmp_path / "collector.yaml"
    path.write_text(yaml.safe_dump({flag(name): value for name, value in given.items()}))
    return CollectorConfig.read({}, path)


PLACES = [from_flags, from_environment, from_file]


@pytest.mark.parametrize("read", PLACES)
def test_every_option_may_stand_in_every_place(read, monkeypatch, tmp_path):
    assert read(GIVEN, monkeypatch, tmp_path) == CollectorConfig(**GIVEN)


@pytest.mark.parametrize("read", PLACES)
def test_what_is_not_given_has_its_default(read, monkeypatch, tmp_path):
    assert read({"watchlist": "w"}, monkeypatch, tmp_path) == CollectorConfig(watchlist="w")


@pytest.mark.parametrize(
    ("places", "seen"),
    [
        ("", "127.0.0.1:9464"),
        ("file", "file:1"),
        ("environment", "environment:1"),
        ("flag", "flag:1"),
        ("environment file", "environment:1"),
        ("flag file", "flag:1"),
        ("flag environment", "flag:1"),
        ("flag environment file", "flag:1"),
    ],
)
def test_a_flag_counts_before_the_environment_before_the_file_before_the_default(places, seen, monkeypatch, tmp_path):
    path = tmp_path / "collector.yaml"
    path.write_text("watchlist: w\n" + ("http: file:1\n" if "file" in places else ""))
    if "environment" in places:
        monkeypatch.setenv("LATENTWATCH_SETTING_HTTP", "environment:1")
    assert CollectorConfig.read({"http": "flag:1"} if "flag" in places else {}, path).http == seen


def test_lists_of_two_places_are_not_joined(monkeypatch, tmp_path):
    path = tmp_path / "collector.yaml"
    path.write_text("watchlist: w\ntoken-file: [a, b]\n")
    monkeypatch.setenv("LATENTWATCH_SETTING_TOKEN_FILE", "c")
    assert CollectorConfig.read({}, path).token_file == (Path("c"),)


def test_an_empty_variable_says_nothing(monkeypatch):
    monkeypatch.setenv("LATENTWATCH_SETTING_HTTP", "")
    assert CollectorConfig.read({"watchlist": "w"}).http == "127.0.0.1:9464"


def test_variables_of_engines_and_of_kubernetes_are_no_options(monkeypatch):
    monkeypatch.setenv("LATENTWATCH_COLLECTOR_TOKEN_FILE", "the-engine-shows-this")
    monkeypatch.setenv("LATENTWATCH_COLLECTOR_PORT", "tcp://10.0.0.1:9464")
    assert CollectorConfig.read({"watchlist": "w"}) == CollectorConfig(watchlist="w")


def test_a_model_made_in_code_does_not_look_at_the_environment(monkeypatch):
    monkeypatch.setenv("LATENTWATCH_SETTING_HTTP", "environment:1")
    assert CollectorConfig(watchlist="w").http == "127.0.0.1:9464"


def test_options_do_not_change_once_they_are_read():
    with pytest.raises(ValidationError):
        CollectorConfig(watchlist="w").http = "0.0.0.0:1"


@pytest.mark.parametrize(
    ("text", "reason", "told"),
    [
        ("evidence-day: 3\n", "config_unknown", "evidence-day in {}.*Did you mean evidence-days\\?"),
        ("evidence_days: 3\n", "config_unknown", "Did you mean evidence-days\\?"),
        ("zzzzzz: 3\n", "config_unknown", "zzzzzz in {}.*Give one of baseline, canary-key"),
        ("9464: http\n", "config_file", "--config {}: the file, line 1: a key on line 1 is not text"),
        ("http: a:1\nhttp: b:1\n", "config_file", "--config {}: http, line 2: this key stands twice"),
        ("- http\n", "config_file", "it holds \\['http'\\], not options"),
        ("http: [\n", "config_file", "line 2"),
        ("watchlist: w\nhttp: \x00\n", "config_file", "--config {}"),
        ("watchlist: w\nevidence-days: soon\n", "config_value", "evidence-days in {}: 'soon': .* number"),
        ("watchlist: w\nevidence-days: 0\n", "config_value", "0: Input should be greater than 0"),
        ("watchlist: w\nevidence-days: .inf\n", "config_file", "evidence-days, line 2: inf is not a finite number"),
        ("watchlist: &w w\nbaseline: *w\n", "config_file", "baseline, line 1: it is an alias"),
        ("watchlist: w\notlp-metrics: -1\n", "config_value", "-1: Input should be greater than or equal to 0"),
        ("watchlist: w\notlp: gopher://x\n", "config_value", "https"),
        ("watchlist: w\nevidence-keep: most\n", "config_value", "'exceeded' or 'all'"),
        ("watchlist: w\nroute: '('\n", "config_value", "regular expression"),
        ("watchlist: w\nlisten: unix:///a\n", "config_value", "listen in {}: 'unix:///a': .* list"),
        ("watchlist: w\nhttp: 9464\n", "config_value", "http in {}: 9464: .* string"),
        ("watchlist: w\nhttp:\n", "config_value", "http in {}: None: .* string"),
        ("http: a:1\n", "config_missing", "--watchlist: it is not given.*LATENTWATCH_SETTING_WATCHLIST"),
        ("", "config_missing", "--watchlist"),
    ],
)
def test_what_a_file_says_wrongly_is_refused_by_name(text, reason, told, tmp_path):
    path = tmp_path / "collector.yaml"
    path.write_text(text)
    with pytest.raises(ConfigRefused, match=told.format(re.escape(str(path)))) as refused:
        CollectorConfig.read({}, path)
    assert refused.value.reason == reason and "\n" not in str(refused.value)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigRefused, match=r"no\.yaml: No such file"):
        CollectorConfig.read({"watchlist": "w"}, tmp_path / "no.yaml")


def test_a_value_is_refused_in_the_place_that_counts(monkeypatch, tmp_path):
    path = tmp_path / "collector.yaml"
    path.write_text("watchlist: w\nevidence-days: 7\n")
    monkeypatch.setenv("LATENTWATCH_SETTING_EVIDENCE_DAYS", "soon")
    with pytest.raises(ConfigRefused, match=r"^LATENTWATCH_SETTING_EVIDENCE_DAYS: 'soon'"):
        CollectorConfig.read({}, path)
    with pytest.raises(ConfigRefused, match=r"^--evidence-days: 'now'"):
        CollectorConfig.read({"evidence_days": "now"}, path)
    assert CollectorConfig.read({"evidence_days": "1"}, path).evidence_days == 1


def test_a_variable_that_is_no_option_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("LATENTWATCH_SETTING_HTP", "a:1")
    with pytest.raises(ConfigRefused, match=r"LATENTWATCH_SETTING_HTP .*Did you mean LATENTWATCH_SETTING_HTTP"):
        CollectorConfig.read({"watchlist": "w"})


@pytest.mark.parametrize(
    ("given", "reason", "told"),
    [
        ({"tls_cert": "c"}, "tls_unusable", "--tls-cert is c, --tls-key is None. Give both."),
        ({"tls_key": "k"}, "tls_unusable", "--tls-cert is None, --tls-key is k. Give both."),
        ({"tls_client_ca": "a"}, "tls_unusable", "--tls-cert is None, --tls-key is None. Give both."),
        ({"http_tls_key": "k"}, "tls_unusable", "Give both."),
        ({"forward_to": "g:1", "forward_key": "k"}, "tls_unusable", "--forward-ca is None. Give all of them."),
        ({"forward_to": "g:1", "forward_cert": "c", "forward_key": "k"}, "tls_unusable", "--forward-ca is None."),
        ({"forward_name": "pod"}, "forward", "--forward-name is given, and --forward-to is not."),
        ({"forward_token_file": "t"}, "forward", "Give --forward-to HOST:PORT too."),
        ({"forward_cert": "c"}, "forward", "--forward-cert is given, and --forward-to is not."),
    ],
)
def test_half_of_what_belongs_together_is_refused_where_the_model_is_made(given, reason, told):
    with pytest.raises(ConfigRefused, match=re.escape(told)) as refused:
        CollectorConfig(watchlist="w", **given)
    assert refused.value.reason == reason


def test_a_secret_is_never_an_option_but_the_path_of_its_file():
    for name, field in CollectorConfig.model_fields.items():
        if re.search("token|key|cert|_ca$", name):
            assert Path in _types(field.annotation) and str not in _types(field.annotation), name


def _types(annotation):
    return {annotation} | {found for part in get_args(annotation) for found in _types(part)}


# -- the schema


def test_the_published_schema_is_todays():
    """Red: latentwatch collector --config-schema > monitor/latentwatch/collector/config.schema.json"""
    published = resources.files("latentwatch.collector").joinpath("config.schema.json").read_text()
    assert json.loads(published) == CollectorConfig.file_schema()


def test_the_verb_prints_the_schema(capsys):
    args = build_parser().parse_args(["collector", "--config-schema"])
    assert args.run(args) == 0
    assert json.loads(capsys.readouterr().out) == CollectorConfig.file_schema()


def test_the_schema_takes_what_the_collector_takes_and_nothing_else():
    schema = CollectorConfig.file_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    check = jsonschema.Draft202012Validator(schema)
    good = {flag(name): value for name, value in GIVEN.items()}
    assert check.is_valid(good) and check.is_valid({})
    for name, value in (("evidence-day", 3), ("evidence-days", 0), ("evidence-keep", "most"), ("listen", "a:1")):
        assert not check.is_valid({**good, name: value}), name
    assert all(option["description"] for option in schema["properties"].values())


# -- the help, and what becomes of options


def test_the_help_says_of_every_option_what_holds_without_it(capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["collector", "--help"])
    shown = " ".join(capsys.readouterr().out.partition("options:")[2].split())
    entries = re.split(r" (?=--[a-z-]+ (?:[A-Z]|\{))", shown)
    by_flag = {entry.split()[0].removeprefix("--"): entry for entry in entries}
    assert "(required)" in by_flag["watchlist"]
    for name, field in CollectorConfig.model_fields.items():
        if field.default not in (None, (), False) and not field.is_required():
            assert (
                f"(default: {field.default[0] if isinstance(field.default, tuple) else field.default}".removesuffix(
                    ".0"
                )
                in by_flag[flag(name)]
            )
    for title in ("engines:", "HTTP:", "gateway:", "evidence:", "OpenTelemetry:"):
        assert title in shown


def test_options_become_the_collectors_settings():
    made = settings(CollectorConfig(**{**GIVEN, "baseline": None, "canary_key": None}))
    assert made.tls and made.tls.protocol == "h2" and made.tls.client_authority == Path("ca")
    assert made.http_tls and made.http_tls.protocol == "http/1.1"
    assert made.forward and (made.forward.target, made.forward.name) == ("gateway:9090", "pod-0")
    assert made.evidence and made.evidence.retention.max_bytes == 1 << 29 and made.evidence.scope == "all"
    assert made.otlp and (made.otlp.endpoint, made.otlp.metrics_seconds) == ("http://127.0.0.1:4317", 15.0)
    assert made.token_files == (Path("t1"), Path("t2")) and made.http_token_files == (Path("h1"),)
    assert made.drift.route and made.drift.route.pattern == "^(.*?)-"
    bare = settings(CollectorConfig(watchlist="w"))
    assert (bare.tls, bare.http_tls, bare.forward, bare.evidence, bare.otlp) == (None,) * 5


def test_what_an_option_names_is_refused_in_its_own_words():
    with pytest.raises(Refusal) as refused:
        settings(CollectorConfig(watchlist="w", baseline="none.baseline"))
    assert "none.baseline" in str(refused.value)
