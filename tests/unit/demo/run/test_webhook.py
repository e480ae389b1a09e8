"""The receiver of pages: what a notification becomes, and what it refuses."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request

import pytest
from latentwatch.demo.run.webhook import Webhook

NOTIFICATION = {
    "version": "4",
    "receiver": "pager",
    "status": "firing",
    "alerts": [
        {
            "status": "firing",
            "labels": {"alertname": "LatentwatchCriticalExceedance", "feature": "p.1"},
            "annotations": {"summary": "it went over"},
            "startsAt": "2026-01-02T03:04:05.123Z",
            "endsAt": "0001-01-01T00:00:00Z",
        }
    ],
}


def post(port: int, body: bytes) -> None:
    urllib.request.urlopen(f"http://127.0.0.1:{port}/pager", body, timeout=5).close()


def test_a_notification_becomes_a_page_with_its_arrival_and_the_rules_time() -> None:
    with Webhook() as webhook:
        before = time.time()
        post(webhook.port, json.dumps(NOTIFICATION).encode())
        (page,) = webhook.pages()
    assert before <= page.at <= time.time()
    assert page.starts_at == pytest.approx(1767323045.123)
    assert (page.alert, page.receiver, page.status) == ("LatentwatchCriticalExceedance", "pager", "firing")
    assert page.annotations == {"summary": "it went over"}


@pytest.mark.parametrize("body", [b"not json", b"{}", b"[]", b'{"receiver": 1, "alerts": [{}]}', b'{"alerts": 3}'])
def test_anything_else_is_refused_and_does_not_stop_the_receiver(body: bytes) -> None:
    with Webhook() as webhook:
        with pytest.raises(urllib.error.HTTPError, match="400"):
            post(webhook.port, body)
        post(webhook.port, json.dumps(NOTIFICATION).encode())
        assert len(webhook.pages()) == 1
