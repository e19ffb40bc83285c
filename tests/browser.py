"""A browser without a window for tests: Chromium by its own driver, spoken to in the W3C WebDriver protocol.

It needs `chromium` (or Google Chrome) and `chromedriver` on the path, and no package and no network.
"""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KEYS = {"ArrowUp": "\ue013", "ArrowDown": "\ue015", "PageUp": "\ue00e", "PageDown": "\ue00f", "Home": "\ue011", "End": "\ue010"}
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


def programs() -> tuple[str, str] | None:
    """Return the paths of Chromium and its driver, None where one of them is not there."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


class Browser:
    """One session."""

    def __init__(self, address: str, options: dict[str, Any]) -> None:
        self.address = address
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        made = self.ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self.session = f"/session/{made['sessionId']}"

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """Send one command and return its value."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            with error:
                value = json.load(error)["value"]
            raise AssertionError(f"{path}: {value['error']}: {value['message'].splitlines()[0]}") from None

    def open(self, path: Path) -> None:
        """Load a file."""
        self.ask("POST", f"{self.session}/url", {"url": path.resolve().as_uri()})

    def run(self, script: str, *values: Any) -> Any:
        """Run a script in the page, which finds the values in `arguments`, and return what it returns."""
        return self.ask("POST", f"{self.session}/execute/sync", {"script": script, "args": list(values)})

    def wait(self, script: str, *values: Any, seconds: float = 60) -> Any:
        """Wait until a script returns something true, and return that."""
        end = time.monotonic() + seconds
        while not (value := self.run(script, *values)):
            assert time.monotonic() < end, f"not true after {seconds:g} s: {script}"
            time.sleep(0.05)
        return value

    def element(self, selector: str) -> str:
        """Return the id of an element."""
        return str(self.ask("POST", f"{self.session}/element", {"using": "css selector", "value": selector})[ELEMENT])

    def click(self, selector: str) -> None:
        """Click on the middle of an element."""
        self.ask("POST", f"{self.session}/element/{self.element(selector)}/click", {})

    def keys(self, selector: str, *names: str) -> None:
        """Press keys on an element: names of `KEYS` or single characters."""
        text = "".join(KEYS.get(name, name) for name in names)
        self.ask("POST", f"{self.session}/element/{self.element(selector)}/value", {"text": text})

    def wheel(self, selector: str, delta: int) -> None:
        """Turn the wheel over the middle of an element by `delta` pixels, downwards when it is positive."""
        over = {ELEMENT: self.element(selector)}
        turn = {"type": "scroll", "x": 0, "y": 0, "deltaX": 0, "deltaY": delta, "duration": 0, "origin": over}
        self.ask("POST", f"{self.session}/actions", {"actions": [{"type": "wheel", "id": "wheel", "actions": [turn]}]})

    def drag(self, selector: str, dx: int, dy: int) -> None:
        """Press the mouse on the middle of an element, move it by (dx, dy) pixels, and let it go."""
        over = {ELEMENT: self.element(selector)}
        moves = [
            {"type": "pointerMove", "x": 0, "y": 0, "origin": over, "duration": 0},
            {"type": "pointerDown", "button": 0},
            {"type": "pointerMove", "x": dx, "y": dy, "origin": over, "duration": 50},
            {"type": "pointerUp", "button": 0},
        ]
        self.ask("POST", f"{self.session}/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": moves}]})

    def prefer(self, colours: str) -> None:
        """Pretend that the system prefers `light` or `dark` pages."""
        features = {"features": [{"name": "prefers-color-scheme", "value": colours}]}
        self.ask("POST", f"{self.session}/goog/cdp/execute", {"cmd": "Emulation.setEmulatedMedia", "params": features})

    def size(self, width: int, height: int) -> None:
        """Lay the page out on a screen of this many pixels."""
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.ask("POST", f"{self.session}/goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride", "params": screen})

    def picture(self, path: Path) -> None:
        """Write what is seen of the page as PNG."""
        path.write_bytes(base64.b64decode(self.ask("GET", f"{self.session}/screenshot")))

    def complaints(self) -> list[str]:
        """Return warnings and errors of the console since the last call."""
        log = self.ask("POST", f"{self.session}/se/log", {"type": "browser"})
        return [line["message"] for line in log if line["level"] in ("WARNING", "SEVERE")]


@contextlib.contextmanager
def browser(folder: Path, *flags: str) -> Iterator[Browser]:
    """Start a browser without a window, with its profile in `folder`, and end it afterwards."""
    found = programs()
    assert found is not None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with subprocess.Popen([found[1], f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as driver:
        try:
            for _ in range(200):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
                time.sleep(0.05)
            always = ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--force-device-scale-factor=1", "--hide-scrollbars",
                      "--no-first-run", "--disable-background-networking", f"--user-data-dir={folder}"]  # fmt: skip
            session = Browser(f"http://127.0.0.1:{port}", {"binary": found[0], "args": [*always, *flags]})
            try:
                yield session
            finally:
                session.ask("DELETE", session.session)
        finally:
            driver.terminate()
