"""ComfyUI's own page in a headless Chromium: what it makes of a saved workflow."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlunsplit

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-first-run", "--remote-debugging-port=0",
)  # fmt: skip
READY = """!!(window.app?.graph && window.app?.canvas && window.app?.extensionManager
    && LiteGraph.registered_node_types["KSampler"] && LiteGraph.registered_node_types["ApproximateAttention"])"""
CONVERT = """(async flow => {
    await window.app.loadGraphData(flow, true, true);
    return (await window.app.graphToPrompt()).output;
})(%s)"""


def find_browser() -> str | None:
    """Path of a Chromium or Chrome; ``None`` without one."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((found for found in map(shutil.which, names) if found), None)


def convert(port: int, flows: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Load saved workflows into the page of a running ComfyUI and return what its Run button would queue, by name."""
    return asyncio.run(_convert(port, flows))


def _local(port: int | str, path: str) -> str:
    return urlunsplit(("http", f"127.0.0.1:{port}", path, "", ""))


async def _convert(port: int, flows: dict[str, Any]) -> dict[str, dict[str, Any]]:
    async with _open_page(_local(port, "/")) as page:
        for _ in range(300):
            with contextlib.suppress(AssertionError):
                if await page.evaluate(READY):
                    break
            await asyncio.sleep(0.3)
        else:
            raise AssertionError("the page did not load")
        return {name: await page.evaluate(CONVERT % json.dumps(flow)) for name, flow in flows.items()}


class _Page:
    """A page behind a DevTools socket; one command at a time.

    Args:
        socket: Of aiohttp.
    """

    def __init__(self, socket: Any) -> None:
        self.socket = socket
        self.sent = 0

    async def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        self.sent += 1
        await self.socket.send_json({"id": self.sent, "method": method, "params": parameters})
        while True:
            answer: dict[str, Any] = await self.socket.receive_json(timeout=90)
            if answer.get("id") == self.sent:
                assert "error" not in answer, answer["error"]
                return dict(answer["result"])

    async def evaluate(self, expression: str) -> Any:
        """Value of an expression of the page; promises are awaited."""
        answer = await self.command("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")


@contextlib.asynccontextmanager
async def _open_page(url: str) -> AsyncIterator[_Page]:
    import aiohttp

    browser = find_browser()
    assert browser is not None
    profile = Path(tempfile.mkdtemp(prefix="page-"))
    command = (browser, *FLAGS, f"--user-data-dir={profile}", "--window-size=1600,1000", "about:blank")
    quiet = asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(*command, stdout=quiet, stderr=quiet, start_new_session=True)
    try:
        async with aiohttp.ClientSession() as http:
            address = await _devtools(http, profile / "DevToolsActivePort")
            async with http.ws_connect(address, max_msg_size=0) as socket:
                page = _Page(socket)
                await page.command("Page.navigate", url=url)
                yield page
    finally:
        # The browser's helper processes are in the group that was made for it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        shutil.rmtree(profile, ignore_errors=True)


async def _devtools(http: Any, told: Path) -> str:
    """Wait for the browser to tell its port, and return the address of its page."""
    for _ in range(300):
        if told.exists() and told.stat().st_size:
            port = told.read_text().split()[0]
            async with http.get(_local(port, "/json/list")) as answer:
                pages = [one for one in await answer.json() if one["type"] == "page"]
            if pages:
                return str(pages[0]["webSocketDebuggerUrl"])
        await asyncio.sleep(0.1)
    raise AssertionError("the browser did not start")
