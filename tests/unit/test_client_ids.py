"""An id finds its own request and no other's, whatever clients call theirs."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from latentwatch.client_ids import IdKind, bounded_id, carried, kinds_of, meanings, meant_kind
from latentwatch.collector.pseudonyms import Pseudonyms
from latentwatch.errors import ConfigRefused
from latentwatch.evidence import store as stores
from latentwatch.evidence.archive import Archive

from tests.support.evidence import NOW, one_request, store

IDS = st.one_of(
    st.text(max_size=12),
    st.text("ab_-0123", max_size=8),
    st.text("a", min_size=250, max_size=320),
    st.text(st.characters(codec=None), max_size=4),
)
PREFIXES = ("chatcmpl-", "cmpl-", "resp_", "generate-tokens-")
SUFFIXES = ("-{hex}", "-0-{hex}", "_1-{hex}", "-0-{hex}-beam-3-{hex}")


class Served(NamedTuple):
    """A request as a client and as the engine know it."""

    response_id: str
    request_id: str


def served(client: str, endpoint: int, suffix: int, number: int) -> Served:
    response_id = PREFIXES[endpoint] + client
    hex_digits = f"{number:08x}"
    return Served(response_id, response_id + SUFFIXES[suffix].format(hex=hex_digits))


SERVED = st.builds(served, IDS, st.integers(0, 3), st.integers(0, 3), st.integers(0, 1))


def ids(request: Served) -> dict[str, str]:
    return {"request": bounded_id(request.request_id), "response": bounded_id(request.response_id), "trace": ""}


@given(SERVED, SERVED)
@example(
    Served("chatcmpl-session_42", "chatcmpl-session_42-00000000"), Served("chatcmpl-session", "chatcmpl-session-1")
)
@example(Served("cmpl-a", "cmpl-a-0-00000000"), Served("cmpl-a-0-00000000", "cmpl-a-0-00000000-0-00000001"))
def test_an_id_finds_its_own_and_as_a_response_id_no_others(mine: Served, other: Served):
    meant = meanings(mine.response_id)
    assert IdKind.RESPONSE in kinds_of(meant, **ids(mine))
    if other.response_id != mine.response_id:
        assert IdKind.RESPONSE not in kinds_of(meant, **ids(other))


@given(IDS, IDS)
def test_two_ids_are_never_carried_as_one_and_stay_as_they_are_when_carried_on(one: str, other: str):
    assert (bounded_id(one) == bounded_id(other)) == (one == other)
    assert carried(bounded_id(one)) == bounded_id(one)
    bounded_id(one).encode()


@given(IDS, st.sampled_from(("chatcmpl-", "cmpl-", "generate-tokens-")))
def test_what_a_client_sent_finds_what_the_server_made_of_it(sent: str, prefix: str):
    kinds = kinds_of(meanings(sent), response=bounded_id(prefix + sent), request="", trace="")
    assert (IdKind.CLIENT in kinds) == bool(sent)


def test_a_header_that_is_no_ascii_is_found_as_its_client_wrote_it():
    as_the_server_read_it = "größe".encode().decode("latin-1")
    assert IdKind.CLIENT in kinds_of(meanings("größe"), response=f"cmpl-{as_the_server_read_it}", request="", trace="")


@given(IDS, IDS)
def test_hashed_ids_find_their_own_and_no_others(one: str, other: str):
    pseudonyms = Pseudonyms(b"k" * 32, lambda id: False)
    request, response = pseudonyms.of(f"cmpl-{other}-0-00000000", f"cmpl-{other}")
    found = kinds_of(pseudonyms.meanings(f"cmpl-{one}"), request=request, response=response, trace="")
    assert (IdKind.RESPONSE in found) == (one == other)


def test_a_name_is_meant_as_what_it_is_where_no_reading_of_it_reaches_other_requests():
    response, request, trace, client = ({kind} for kind in (*IdKind,)[:4])
    assert meant_kind([(response, "a"), (response, "a")]) == IdKind.RESPONSE
    assert meant_kind([(trace | client, "a")]) == IdKind.TRACE, "either is this one request"
    assert meant_kind([]) == IdKind.RESPONSE
    assert meant_kind([(response, "a"), (response | request, "a")]) is None, "as the engine's id it is one of two"
    assert meant_kind([(trace | client, "a"), (trace, "b")]) is None, "a client's own id is not its whole trace"
    assert meant_kind([(response, "a"), (request, "b")]) is None
    assert meant_kind([(trace, "a"), (trace, "b")]) is None, "two responses may be two people's"
    assert meant_kind([(client, "chatcmpl-a"), (client, "cmpl-a")]) is None


def kept(folder: Path, *requests: Served) -> None:
    with store(folder) as written:
        for number, request in enumerate(requests, 1):
            records = one_request(number)
            named = records[0].request.info.__class__(
                **{
                    **vars(records[0].request.info),
                    "request_id": bounded_id(request.request_id),
                    "response_id": bounded_id(request.response_id),
                }
            )
            written.write([r._replace(request=r.request._replace(info=named)) for r in records], NOW)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(SERVED, min_size=2, max_size=4, unique=True))
def test_a_deletion_by_a_response_id_takes_its_requests_and_leaves_every_other(tmp_path_factory, requests):
    folder = tmp_path_factory.mktemp("evidence")
    kept(folder, *requests)
    first = requests[0].response_id
    found = {stored.key for stored in Archive(folder).find(first)}
    assert 1 in found
    stores.erase(folder, {IdKind.RESPONSE: meanings(first)[IdKind.RESPONSE]})
    left = {stored.key for stored in Archive(folder).requests()}
    assert left == {n for n, request in enumerate(requests, 1) if request.response_id != first}


def test_an_underscore_and_a_number_are_the_clients_own(tmp_path):
    """X-Request-Id: session_42 was not found by its response id; DELETE of chatcmpl-session took four requests."""
    names = ["session_42", "session_43", "session_1", "session"]
    kept(tmp_path, *(Served(f"chatcmpl-{name}", f"chatcmpl-{name}-0123abcd") for name in names))
    assert [stored.key for stored in Archive(tmp_path).find("chatcmpl-session_42")] == [1]
    assert stores.erase(tmp_path, "chatcmpl-session").requests == 1
    assert {stored.key for stored in Archive(tmp_path).requests()} == {1, 2, 3}


def test_an_id_that_is_one_requests_response_id_and_anothers_own_deletes_nothing_until_it_is_said_which(tmp_path):
    kept(tmp_path, Served("cmpl-a", "cmpl-a-0-0123abcd"), Served("cmpl-a-0-0123abcd", "cmpl-a-0-0123abcd-0-4567abcd"))
    with pytest.raises(ConfigRefused, match="different requests"):
        stores.erase(tmp_path, "cmpl-a-0-0123abcd")
    assert len(list(Archive(tmp_path).requests())) == 2
    stores.erase(tmp_path, {IdKind.RESPONSE: ("cmpl-a-0-0123abcd",)})
    assert [stored.response_id for stored in Archive(tmp_path).requests()] == ["cmpl-a"]


def test_what_an_earlier_version_guessed_is_believed_only_where_it_left_nothing_out(tmp_path):
    """Its files say what the response id is without having been told."""
    import sqlite3

    guesses = [Served("chatcmpl-session", "chatcmpl-session_42-0123abcd"), Served("cmpl-b", "cmpl-b-0-0123abcd")]
    kept(tmp_path, *guesses)
    (path,) = stores.segments(tmp_path)
    with sqlite3.connect(path) as connection:
        connection.execute("DELETE FROM about WHERE name = 'response_ids_told'")
    assert Archive(tmp_path).find("chatcmpl-session") == []
    assert [stored.key for stored in Archive(tmp_path).find("chatcmpl-session_42-0123abcd")] == [1]
    assert [stored.key for stored in Archive(tmp_path).find("cmpl-b")] == [2]
    with store(tmp_path) as written:
        written.write(one_request(3), NOW)
    assert len(stores.segments(tmp_path)) == 2, "what is told does not go where ids are guesses"
