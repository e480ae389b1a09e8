"""Addresses: one spelling for both ends, and a sentence for every other."""

from __future__ import annotations

import pytest
from latentwatch.errors import ConfigRefused
from latentwatch.transport.address import Address


@pytest.mark.parametrize(
    "text",
    ["unix:///run/latentwatch.sock", "127.0.0.1:4319", "collector.monitoring.svc:4319", "[::1]:4319", "localhost:1"],
)
def test_an_address_is_spelled_for_grpc_as_the_operator_spelled_it(text):
    assert str(Address.parse(text)) == text


def test_port_0_is_for_listening_only():
    assert Address.parse("127.0.0.1:0", listening=True).port == 0
    with pytest.raises(ConfigRefused, match="port 0"):
        Address.parse("127.0.0.1:0")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "4319",
        "localhost",
        "localhost:",
        ":4319",
        "localhost:99999",
        "http://localhost:4319",
        "::1:4319",
        "a b:1",
        "unix:relative.sock",
        "unix://relative.sock",
        "unix:////run/x.sock",
        "unix:///run/",
        "unix:///" + "x" * 107,
        "dns:///collector:4319",
    ],
)
def test_any_other_spelling_is_refused_with_what_to_write_instead(text):
    with pytest.raises(ConfigRefused) as refused:
        Address.parse(text)
    assert refused.value.reason == "target_invalid"
    assert "unix:///absolute/path.sock, or host:port" in str(refused.value)
