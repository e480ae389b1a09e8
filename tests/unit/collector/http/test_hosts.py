"""Whom a collector may be asked as, and by whose pages."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from latentwatch.collector.evidence import EvidenceSettings
from latentwatch.collector.http.hosts import Hosts
from latentwatch.collector.service import Service
from latentwatch.errors import ConfigRefused

from tests.support.collectors import collector, exceed
from tests.support.raw_http import answer, ask, connect

PATHS = ["/", "/main.js", "/metrics", "/healthz", "/openapi.json", "/v1/overview", "/v1/requests"]
PATHS += ["/v1/evidence/exceedances", "/v1/evidence/requests/chatcmpl-1", "/nothing", "/%68ealthz", "//", "/healthz/"]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("hosts")
    evidence = EvidenceSettings(folder / "evidence")
    with collector(folder, evidence=evidence, http_hosts=["watch.example.org"]) as made:
        exceed(made)
        yield made


def refused(service: Service, reason: str) -> int:
    return service.core.lookup.snapshot(0).collector.streams_refused.get(reason, 0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_a_page_whose_name_was_pointed_at_this_host_reads_nothing(service, path, method):
    """DNS rebinding: the browser believes to ask the attacker's own server, and says so in Host."""
    before = refused(service, "http_host")
    answer = ask(service.http_url, path, method=method, headers={"Host": "attacker.example:9464"})
    assert answer.status == 421
    assert b"attacker.example:9464" in answer.body and b"--http-host" in answer.body
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert refused(service, "http_host") == before + 1


OURS = [
    "localhost",
    "localhost:9464",
    "LOCALHOST:1",
    "localhost.",
    "127.0.0.1",
    "127.0.0.1:80",
    "127.9.9.9",
    "[::1]:9464",
]
OURS += ["watch.example.org", "watch.example.org:443", "Watch.Example.Org"]
FOREIGN = [
    "attacker.example",
    "localhost.attacker.example",
    "127.0.0.1.attacker.example",
    "10.0.0.7",
    "[2001:db8::1]:80",
]
FOREIGN += [
    "watch.example.org.attacker.example",
    "localhost@attacker.example",
    "localhost:9464:1",
    "a b",
    "é",
    "169.254.1.1",
]
FOREIGN += ["localhost/", "127.1", "2130706433", "[::ffff:10.0.0.7]", "watch", ".", "-"]


@pytest.mark.parametrize("host", OURS)
def test_on_loopback_its_own_names_are_answered(service, host):
    assert ask(service.http_url, "/v1/overview", headers={"Host": host}).status == 200


@pytest.mark.parametrize("host", FOREIGN)
def test_on_loopback_any_other_is_refused(service, host):
    assert ask(service.http_url, "/v1/overview", headers={"Host": host}).status in (400, 421)


def test_a_request_of_http_1_0_needs_a_host_too(service):
    with connect(service.http_url) as peer:
        peer.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert answer(peer).status == 421


def test_a_load_balancer_that_names_no_host_is_told_of_health(service):
    with connect(service.http_url) as peer:
        peer.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert answer(peer).status == 200


def test_beyond_loopback_an_address_is_answered_and_a_name_needs_to_be_listed():
    hosts = Hosts(["latentwatch-collector.monitoring.svc", "lw.example.org"])
    hosts.bound("0.0.0.0", "0.0.0.0")
    ours = ["10.1.2.3:9464", "[fd00::7]:9464", "127.0.0.1", "localhost", socket.gethostname()]
    ours += ["latentwatch-collector.monitoring.svc:9464", "lw.example.org"]
    assert [host for host in ours if not hosts.is_ours(host)] == []
    assert [host for host in ("attacker.example", "svc", "10.1.2.3.attacker.example", "") if hosts.is_ours(host)] == []


def test_the_name_in_http_is_ours():
    hosts = Hosts([])
    hosts.bound("pod-7.internal", "10.0.0.7")
    assert hosts.is_ours("pod-7.internal:9464") and not hosts.is_ours("pod-8.internal")


@pytest.mark.parametrize("name", ["*", "http://a", "a b", "", "a/b", "a:80", "*.example.org", "a,b"])
def test_a_name_that_is_none_is_refused_at_the_start(name):
    with pytest.raises(ConfigRefused) as refusal:
        Hosts([name])
    assert refusal.value.reason == "config_value"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://attacker.example"}, 403),
        ({"Origin": "http://127.0.0.1:3000"}, 403),  # another program of this host
        ({"Origin": "http://localhost:9464"}, 403),  # the same program under another name: another site to a browser
        ({"Origin": "null"}, 403),
        ({"Origin": "file://"}, 403),
        ({"Origin": "OWN"}, 200),
        ({"Origin": "https://watch.example.org"}, 200),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, 403),
        ({"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, 200),  # a link in Grafana
        ({"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors"}, 200),
        ({"Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "navigate"}, 200),
    ],
)
@pytest.mark.parametrize("path", ["/", "/v1/evidence/exceedances", "/metrics"])
def test_another_sites_page_gets_nothing_and_a_link_to_here_works(service, headers, status, path):
    headers = {name: service.http_url if value == "OWN" else value for name, value in headers.items()}
    before = refused(service, "http_origin")
    answer = ask(service.http_url, path, headers=headers)
    assert answer.status == status
    assert "access-control-allow-origin" not in answer.headers
    assert refused(service, "http_origin") == before + (status == 403)


@pytest.mark.parametrize("method", ["DELETE", "PUT", "POST", "OPTIONS"])
def test_another_sites_page_changes_nothing_not_even_by_a_form_that_navigates(service, method):
    headers = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert ask(service.http_url, "/v1/evidence/requests/chatcmpl-1", method=method, headers=headers).status == 403
    headers = {"Origin": "https://attacker.example", "Access-Control-Request-Method": method}
    assert ask(service.http_url, "/v1/evidence/requests/chatcmpl-1", method="OPTIONS", headers=headers).status == 403


def test_a_name_of_the_operator_is_no_licence_for_other_ports_of_localhost():
    hosts = Hosts(["lw.example.org"])
    hosts.bound("127.0.0.1", "127.0.0.1")
    elsewhere = lambda origin, host: hosts.is_cross_site("GET", host, {b"origin": origin})  # noqa: E731, a table
    assert elsewhere(b"http://127.0.0.1:3000", "127.0.0.1:9464")
    assert not elsewhere(b"http://127.0.0.1:9464", "127.0.0.1:9464")
    assert not elsewhere(b"https://lw.example.org", "127.0.0.1:9464")  # a proxy that asks by address
    assert not elsewhere(b"http://h", "h:80") and elsewhere(b"https://h", "h:80")
