"""Headless Chromium, driven over its debugging pipe: a page as a reader has it, with nothing fetched.

The pipe needs no port and no library: commands and events are JSON texts that end in a zero byte, on file descriptors
3 and 4 of the browser.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
_PATIENCE_S = 60.0


def browser() -> str | None:
    """The path of an installed Chromium, if there is one."""
    return next((path for name in _BROWSERS if (path := shutil.which(name))), None)


class ChromiumError(RuntimeError):
    """The browser refused a command, ended, or did not answer in time."""


class Page:
    """One tab.

    Attributes:
        errors: what the console called an error or a warning, and every exception that nothing caught.
        fetched: addresses that the page asked for, other than files and data.
    """

    def __init__(self, commands: int, events: int) -> None:
        self._commands, self._events = commands, events
        self._buffer, self._number, self._session = b"", 0, ""
        self.errors: list[str] = []
        self.fetched: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")
        self._call("Performance.enable", timeDomain="threadTicks")

    # What a reader does

    def open(self, path: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> float:
        """Shows a file at a size in CSS pixels, and waits until its figures in the window are drawn.

        Returns:
            Seconds from the start of the navigation to the first moment at which the page answers with them drawn.
        """
        self.errors.clear()
        self.fetched.clear()
        self.scheme(dark=dark)
        self.resize(width, height)
        started = time.monotonic()
        self._call("Page.navigate", url=path.resolve().as_uri())
        self.wait("document.readyState === 'complete' && location.protocol === 'file:'")
        self.settle()
        return time.monotonic() - started

    def scheme(self, *, dark: bool) -> None:
        """The colours that the reader's system prefers."""
        preferred = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[preferred])

    def resize(self, width: int, height: int) -> None:
        """Another window; up to 600 pixels of width it is a phone's."""
        phone = width <= 600
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)

    def settle(self) -> None:
        """Waits until every figure in the window is drawn and two frames have been shown since."""
        self.wait(
            "[...document.querySelectorAll('figure')].every((f) => { const b = f.getBoundingClientRect();"
            " return b.top > innerHeight || b.bottom < 0 || b.height === 0 || f.querySelector('.main-svg'); })"
        )
        self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; a promise is waited for.

        Raises:
            ChromiumError: it threw.
        """
        found = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise ChromiumError(f"{script}: {found['exceptionDetails'].get('exception', {}).get('description')}")
        return found["result"].get("value")

    def wait(self, condition: str) -> None:
        """Waits until a JavaScript expression is true.

        Raises:
            ChromiumError: it was not within a minute.
        """
        until = time.monotonic() + _PATIENCE_S
        while not self.run(condition):
            if time.monotonic() > until:
                raise ChromiumError(f"not within {_PATIENCE_S:.0f} s: {condition}")
            time.sleep(0.02)

    def click(self, selector: str) -> None:
        """A click in the middle of the first element that matches, with the mouse, after scrolling to it."""
        x, y = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            " e.scrollIntoView({block: 'center', behavior: 'instant'}); const b = e.getBoundingClientRect();"
            " return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        self.settle()
        self.point(x, y)

    def point(self, x: float, y: float) -> None:
        """A click at a place of the window."""
        self._call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for kind in ("mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str, times: int = 1) -> None:
        """A key by its name ("ArrowLeft", "Tab", "Enter"), where the focus is."""
        code = {"ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35, "Tab": 9, "Enter": 13}[key]
        text = {"text": "\r"} if key == "Enter" else {}
        for _ in range(times):
            for kind in ("keyDown", "keyUp"):
                typed = text if kind == "keyDown" else {}
                self._call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **typed)

    def busy_s(self) -> float:
        """Processor seconds of the page's main thread so far: what a load on the machine does not stretch."""
        found = self._call("Performance.getMetrics")["metrics"]
        return next(float(each["value"]) for each in found if each["name"] == "TaskDuration")

    def screenshot(self, image: Path, *, whole: bool = False) -> Path:
        """The window as a PNG, or the whole page with every figure drawn."""
        if whole:
            self.run("dispatchEvent(new Event('beforeprint'))")
            size = self._call("Page.getLayoutMetrics")["cssContentSize"]
            clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
            found = self._call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        else:
            found = self._call("Page.captureScreenshot")
        image.write_bytes(base64.b64decode(found["data"]))
        return image

    # The pipe

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + _PATIENCE_S
        while True:
            answer = self._message(until)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise ChromiumError(f"{method}: {answer['error']['message']}")
                return dict(answer["result"])
            self._hear(answer)

    def _message(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._events], [], [], max(until - time.monotonic(), 0.0))
            if not ready:
                raise ChromiumError(f"chromium did not answer within {_PATIENCE_S:.0f} s")
            more = os.read(self._events, 1 << 20)
            if not more:
                raise ChromiumError("chromium has ended")
            self._buffer += more
        line, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(line))

    def _hear(self, event: dict[str, Any]) -> None:
        found, kind = event.get("params", {}), event.get("method")
        if kind == "Runtime.exceptionThrown":
            details = found["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details["text"])
        elif kind == "Runtime.consoleAPICalled" and found["type"] in ("error", "warning", "assert"):
            self.errors.append(" ".join(str(a.get("value", a.get("description"))) for a in found["args"]))
        elif kind == "Log.entryAdded" and found["entry"]["level"] in ("error", "warning"):
            self.errors.append(found["entry"]["text"])
        elif kind == "Network.requestWillBeSent":
            address = found["request"]["url"]
            if not address.startswith(("file:", "data:", "blob:", "about:")):
                self.fetched.append(address)


@contextlib.contextmanager
def page() -> Iterator[Page]:
    """A tab of a fresh browser, which ends with the block.

    Raises:
        ChromiumError: no Chromium is installed.
    """
    path = browser()
    if path is None:
        raise ChromiumError(f"none of {', '.join(_BROWSERS)} is installed (Debian: apt-get install chromium)")
    to_browser, commands = os.pipe()
    events, from_browser = os.pipe()
    # The browser's ends must be its descriptors 3 and 4, which a shell can say without touching this process.
    wiring = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            ["bash", "-c", wiring, "bash", path, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(to_browser)
        os.close(from_browser)
        try:
            yield Page(commands, events)
        finally:
            os.close(commands)  # Chromium ends when its pipe does
            os.close(events)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()
