"""Pages in a real browser: as they are after their scripts ran, or used by a driver."""

import base64
import contextlib
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

needs_browser = pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the browser chromium")
needs_driver = pytest.mark.skipif(
    None in (shutil.which("chromium"), shutil.which("chromedriver")),
    reason="needs the browser chromium and its driver, chromedriver",
)
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # key of elements in WebDriver's JSON
OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def in_a_browser(page: str, folder: Path, *options: str) -> str:
    """The document as text after the page's scripts have run."""
    file = folder / "page.html"
    file.write_text(page, encoding="utf-8")
    command = [
        "chromium",
        *OPTIONS,
        f"--user-data-dir={folder}/user",
        *options,
        "--dump-dom",
        f"file://{file}",
    ]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, encoding="utf-8")
    return ran.stdout


class Page:
    """A browser's window, by the commands of WebDriver (w3.org/TR/webdriver2)."""

    def __init__(self, session: httpx.Client):
        self._session = session

    def command(self, path: str, **body: Any) -> Any:
        answer = self._session.post(path, json=body)
        value = answer.json()["value"]
        assert answer.status_code == 200, value
        return value

    def visit(self, url: str) -> None:
        self.command("url", url=url)

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script returns; it may await."""
        awaited = (
            "const done = arguments[arguments.length - 1];"
            f"const run = async function () {{ {script} }};"
            "run(...arguments).then((value) => done({ value }), (error) => done({ error: String(error) }));"
        )
        result = self.command("execute/async", script=awaited, args=list(arguments))
        assert "error" not in result, result["error"]
        return result.get("value")

    def text(self, selector: str) -> str:
        return str(self.run("return document.querySelector(arguments[0]).textContent", selector))

    def click(self, selector: str) -> None:
        self.command(f"element/{self._find(selector)}/click")

    def type(self, selector: str, text: str) -> None:
        """Press keys, in an element; WebDriver has characters for keys such as Enter."""
        self.command(f"element/{self._find(selector)}/value", text=text)

    def until(self, condition: str, *arguments: Any, seconds: float = 60) -> None:
        """Wait until an expression is true in the page."""
        end = time.monotonic() + seconds
        while not self.run(f"return Boolean({condition})", *arguments):
            assert time.monotonic() < end, f"{condition} did not come true: {self.text('body')[:2000]}"
            time.sleep(0.05)

    def emulate(self, command: str, **parameters: Any) -> None:
        """A command of the Chrome DevTools protocol."""
        self.command("goog/cdp/execute", cmd=command, params=parameters)

    def show(self, width: int, height: int, scheme: str = "light", scale: float = 1) -> None:
        """Set the size of the window, in CSS pixels, and whether it is light or dark."""
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": False}
        self.emulate("Emulation.setDeviceMetricsOverride", **size)
        media = [{"name": "prefers-color-scheme", "value": scheme}]
        self.emulate("Emulation.setEmulatedMedia", features=media)

    def screenshot(self) -> bytes:
        """PNG of the window."""
        return base64.b64decode(self._session.get("screenshot").json()["value"])

    def messages(self) -> list[str]:
        """What the browser complained of, such as errors of scripts and breaches of a policy."""
        return [entry["message"] for entry in self.command("se/log", type="browser")]

    def _find(self, selector: str) -> str:
        return str(self.command("element", using="css selector", value=selector)[ELEMENT])


@contextlib.contextmanager
def driven(folder: Path) -> Iterator[Page]:
    """A browser whose profile is in a folder."""
    driver = subprocess.Popen(
        ["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True, encoding="utf-8"
    )
    assert driver.stdout is not None
    try:
        port = next(
            found[1] for line in driver.stdout if (found := re.search(r"successfully on port (\d+)", line))
        )
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=90, trust_env=False) as client:
            chrome = {"args": [*OPTIONS, f"--user-data-dir={folder}/user"]}
            wanted = {
                "browserName": "chrome",
                "goog:chromeOptions": chrome,
                "goog:loggingPrefs": {"browser": "ALL"},
            }
            answer = client.post("/session", json={"capabilities": {"alwaysMatch": wanted}})
            assert answer.status_code == 200, answer.text
            session = f"/session/{answer.json()['value']['sessionId']}/"
            try:
                with httpx.Client(
                    base_url=f"http://127.0.0.1:{port}{session}", timeout=90, trust_env=False
                ) as window:
                    yield Page(window)
            finally:
                client.delete(session.rstrip("/"))
    finally:
        driver.terminate()
        driver.wait()
        driver.stdout.close()
