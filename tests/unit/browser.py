"""A headless Chromium driven over its DevTools protocol: real clicks and keys, at any width, light or dark.

    with Browser(profile_folder) as browser:
        page = browser.open("file:///…/report.html", width=390, height=844, dark=True)
        page.click("#arms-table thead button")
        page.evaluate("document.title"), page.screenshot(path), page.errors, page.requests

The protocol is JSON over a web socket, which aiohttp speaks (it comes with datasets). Pages are clicked as a
person would: the element is scrolled into view and the mouse goes to its middle.
"""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import aiohttp

TIMEOUT = 60  # seconds for the browser to start, and for any answer


def chromium() -> str | None:
    """Return the name of an installed Chromium, or None."""
    return next((name for name in ("chromium", "chromium-browser", "google-chrome") if shutil.which(name)), None)


class Browser:
    """A Chromium of its own, ended with the context."""

    def __init__(self, profile: Path):
        self.profile = profile

    def __enter__(self) -> Browser:
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
        options += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        options += ["--remote-debugging-port=0", f"--user-data-dir={self.profile}", "about:blank"]
        self.process = subprocess.Popen([chromium(), *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.loop = asyncio.new_event_loop()
        self.session = None
        self.pages: list[Page] = []
        try:
            self.address = self._address()
            self.session = self.loop.run_until_complete(self._session())
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        for page in self.pages:
            self.loop.run_until_complete(page.socket.close())
        if self.session:
            self.loop.run_until_complete(self.session.close())
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)
        self.loop.close()

    def _address(self) -> str:
        """The browser writes the port that it chose into its profile."""
        port = self.profile / "DevToolsActivePort"
        until = time.monotonic() + TIMEOUT
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise RuntimeError(f"chromium ended with status {self.process.returncode}")
            if port.exists() and "\n" in (text := port.read_text()):
                return f"http://127.0.0.1:{text.split()[0]}"
            time.sleep(0.1)
        raise TimeoutError("chromium did not start")

    async def _session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=TIMEOUT))

    def open(self, url: str, *, width: int = 1280, height: int = 900, dark: bool = False) -> Page:
        """Open a page in a tab of its own and wait until it is loaded."""
        page = Page(self, self.loop.run_until_complete(self._tab()))
        self.pages.append(page)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        page.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", features=[scheme])
        page.call("Page.navigate", url=url)
        page.wait("document.readyState === 'complete'")
        return page

    async def _tab(self) -> aiohttp.ClientWebSocketResponse:
        async with self.session.put(f"{self.address}/json/new?about:blank") as answer:
            target = await answer.json(content_type=None)
        return await self.session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0)


class Page:
    """A tab. ``errors`` are exceptions and errors of its console, ``requests`` the addresses that it asked for."""

    def __init__(self, browser: Browser, socket: aiohttp.ClientWebSocketResponse):
        self.browser, self.socket = browser, socket
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.number = 0

    def call(self, method: str, **parameters: Any) -> dict:
        """Call a method of the protocol and return its result."""
        return self.browser.loop.run_until_complete(asyncio.wait_for(self._call(method, parameters), TIMEOUT))

    async def _call(self, method: str, parameters: dict) -> dict:
        self.number += 1
        number = self.number
        await self.socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            message = json.loads((await self.socket.receive()).data)
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return message["result"]
            self._hear(message.get("method"), message.get("params", {}))

    def _hear(self, event: str | None, parameters: dict) -> None:
        if event == "Runtime.exceptionThrown":
            details = parameters["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details["text"])
        elif event == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
            self.errors.append(" ".join(str(value.get("value", "")) for value in parameters["args"]))
        elif event == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.errors.append(parameters["entry"]["text"])
        elif event == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']['exception']['description']}")
        return answer["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until a JavaScript expression is true."""
        until = time.monotonic() + TIMEOUT
        while not self.evaluate(condition):
            if time.monotonic() > until:
                raise TimeoutError(condition)
            time.sleep(0.05)

    def click(self, selector: str, index: int = 0) -> None:
        """Scroll the element into view and click its middle, where nothing may cover it."""
        element = f"document.querySelectorAll({json.dumps(selector)})[{index}]"
        self.evaluate(f"{element}.scrollIntoView({{block: 'center', inline: 'center', behavior: 'instant'}})")
        place = self.evaluate(
            f"(() => {{ const box = {element}.getBoundingClientRect();"
            " const x = box.x + box.width / 2, y = box.y + box.height / 2, top = document.elementFromPoint(x, y);"
            f" return {{x, y, free: Boolean(top) && ({element}.contains(top) || top.contains({element}))}}; }})()"
        )
        if not place["free"]:
            raise RuntimeError(f"{selector}: something else is in front of it, or it is outside the page")
        mouse = {"x": place["x"], "y": place["y"], "button": "left", "clickCount": 1}
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, **mouse)

    def write(self, selector: str, text: str) -> None:
        """Replace what an input holds by typing."""
        self.click(selector)
        self.evaluate(f"document.querySelector({json.dumps(selector)}).select()")
        if text:
            self.call("Input.insertText", text=text)
        else:
            self.key("Delete")

    def key(self, name: str) -> None:
        """Press a key, such as `Escape` or `Delete`."""
        codes = {"Escape": 27, "Delete": 46, "Enter": 13, "Tab": 9}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=codes[name])

    def screenshot(self, path: Path, whole: bool = False) -> None:
        """Write a PNG of what is seen, or of the whole page."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))
