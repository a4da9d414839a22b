"""A headless Chromium that tests drive through its DevTools protocol, over two pipes."""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECONDS = 60  # for one answer, at most
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-extensions", "--remote-debugging-pipe", "about:blank",
)  # fmt: skip
# Chromium reads from 3 and writes to 4
START = """
import fcntl, os, sys
told, heard = (fcntl.fcntl(int(pipe), fcntl.F_DUPFD, 10) for pipe in sys.argv[1:3])
os.dup2(told, 3)
os.dup2(heard, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32}


def find_browser() -> str | None:
    return next((path for path in map(shutil.which, NAMES) if path is not None), None)


class Browser:
    """One page. What a page writes to its console, and requests that it makes, are kept."""

    def __init__(self, program: str, profile: Path) -> None:
        told, tell = os.pipe()
        hear, heard = os.pipe()
        command = [sys.executable, "-c", START, str(told), str(heard), program, *FLAGS, f"--user-data-dir={profile}"]
        self.process = subprocess.Popen(
            command, pass_fds=(told, heard), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(told)
        os.close(heard)
        self.tell, self.hear, self.rest, self.number = tell, hear, b"", 0
        self.session: str | None = None
        self.messages: list[str] = []  # of the console, and errors
        self.requests: list[str] = []  # addresses, but those of data
        self.loads = 0
        (target,) = [t for t in self.send("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        self.session = self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.tell)
        os.close(self.hear)

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to a command. Raises AssertionError for an error, or none in time."""
        self.number += 1
        session = {"sessionId": self.session} if self.session else {}
        text = json.dumps({"id": self.number, "method": method, "params": parameters, **session})
        os.write(self.tell, text.encode() + b"\0")
        while True:
            message = self.next_message()
            if message.get("id") == self.number:
                assert "error" not in message, message
                found: dict[str, Any] = message["result"]
                return found

    def next_message(self) -> dict[str, Any]:
        deadline = time.monotonic() + SECONDS
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.hear], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "the browser says nothing"
            part = os.read(self.hear, 2**20)
            assert part, "the browser has ended"
            self.rest += part
        data, _, self.rest = self.rest.partition(b"\0")
        message: dict[str, Any] = json.loads(data)
        self.note(message.get("method", ""), message.get("params", {}))
        return message

    def note(self, method: str, parameters: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            self.messages.append(json.dumps(parameters["exceptionDetails"]))
        elif method == "Log.entryAdded":
            self.messages.append(parameters["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            address = parameters["request"]["url"]
            self.requests += [] if address.startswith("data:") else [address]
        elif method == "Page.loadEventFired":
            self.loads += 1

    def open(self, address: str) -> float:
        """Open a page; the seconds until it was loaded."""
        before, started = self.loads, time.monotonic()
        self.send("Page.navigate", url=address)
        while self.loads == before:
            self.next_message()
        return time.monotonic() - started

    def run(self, script: str) -> Any:
        """The value of an expression, once the page has painted."""
        painted = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done())))"
        found = self.send(
            "Runtime.evaluate", expression=f"{painted}.then(() => ({script}))", awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, *keys: str) -> None:
        for key in keys:
            code = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": KEYS[key]}
            text = {"text": "\r" if key == "Enter" else key} if key in ("Enter", " ") else {}
            self.send("Input.dispatchKeyEvent", type="keyDown", **code, **text)
            self.send("Input.dispatchKeyEvent", type="keyUp", **code)

    def type(self, text: str) -> None:
        self.send("Input.insertText", text=text)

    def resize(self, width: int, height: int, scheme: str = "light") -> None:
        """The size of the window in pixels, and the colours that a person prefers: light or dark."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def without_scripts(self, is_off: bool = True) -> None:
        self.send("Emulation.setScriptExecutionDisabled", value=is_off)

    def shoot(self, file: Path, clip: Sequence[float] = ()) -> None:
        """A screenshot as PNG; `clip` is left, top, width and height on the page."""
        whole: dict[str, Any] = {}
        if clip:
            whole = {"clip": {**dict(zip(("x", "y", "width", "height"), clip, strict=True)), "scale": 1}}
            whole["captureBeyondViewport"] = True
        file.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png", **whole)["data"]))
