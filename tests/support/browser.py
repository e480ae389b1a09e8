"""A headless Chromium that a test drives over its DevTools protocol: keys, scripts, pictures, memory."""

from __future__ import annotations

import base64
import contextlib
import json
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

from tests.support.programs import program

ARGUMENTS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
_START_SECONDS = 120.0


class Tab:
    """One page."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self.problems: list[str] = []
        """What the browser complained of since: exceptions, refusals by the page's own policy, what did not load."""
        self._sent = 0
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A method of the protocol and its result; of the events on the way, problems are noted."""
        self._sent += 1
        self._connection.send(json.dumps({"id": self._sent, "method": method, "params": parameters}))
        while (answer := json.loads(self._connection.recv(_START_SECONDS))).get("id") != self._sent:
            match answer:
                case {"method": "Runtime.exceptionThrown", "params": {"exceptionDetails": details}}:
                    self.problems.append(str(details))
                case {"method": "Log.entryAdded", "params": {"entry": {"level": "error" | "warning"} as entry}}:
                    self.problems.append(f"{entry['text']} {entry.get('url', '')}")
        assert "error" not in answer, answer
        return dict(answer["result"])

    def size(self, width: int, height: int, *, dark: bool = False) -> None:
        """Of the window, and the scheme that the user prefers."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, url: str) -> None:
        """Go there; a new load even where only the part after # differs."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=url)
        self.until("location.href !== 'about:blank' && document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """What an expression gives, promises awaited."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def until(self, script: str, seconds: float = 60.0) -> None:
        """Wait for an expression to become true."""
        end = time.monotonic() + seconds
        while not self.run(f"Boolean({script})"):
            assert time.monotonic() < end, f"never came true: {script}\n{self.run('document.body?.innerText')}"
            time.sleep(0.05)

    def press(self, key: str) -> None:
        """A key by its name: Tab, Enter, Escape, or a character."""
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        codes = {"Tab": 9, "Enter": 13, "Escape": 27}
        event = {"key": key, "code": key, "text": text, "windowsVirtualKeyCode": codes.get(key, 0)}
        self.call("Input.dispatchKeyEvent", type="keyDown", **event)
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def picture(self, path: Path, *, whole: bool = False) -> None:
        """What is in the window, or the whole page, as a PNG."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[tuple[Tab, int]]:
    """A tab of a new browser, and the browser's process id."""
    argv = [program("chromium"), *ARGUMENTS, "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with connect(_tab_url(process, profile), max_size=None, proxy=None) as connection:
            yield Tab(connection), process.pid
    finally:
        process.terminate()
        process.wait(30)


def _tab_url(process: subprocess.Popen[bytes], profile: Path) -> str:
    """Where the first tab listens, once the browser has written down its port."""
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError, ValueError):
            port = int((profile / "DevToolsActivePort").read_text().split()[0])
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=10) as answer:
                tabs = json.load(answer)
            return str(next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page"))
        time.sleep(0.1)
    raise AssertionError(f"the browser did not start: exit status {process.poll()}")
