"""A real ComfyUI for tests: started once, told what to run, asked what came of it."""

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDERS = ("custom_nodes", "input", "models", "output", "temp", "user")
Prompt = dict[str, tuple[str, dict[str, Any]]]
"""Nodes by name: class and inputs; a link is ``[name, output]``."""


@dataclass
class Outcome:
    """What one prompt came to.

    Attributes:
        outputs: What each output node showed.
        error: Type, message and node of the exception that ended it; ``None`` = success.
        interrupted: It was stopped.
        seconds: From queueing to the end.
    """

    outputs: dict[str, Any]
    error: tuple[str, str, str] | None
    interrupted: bool
    seconds: float


class RealHost:
    """A running ComfyUI with its own folder.

    Args:
        base: Its folder.
        packs: What lies in ``custom_nodes``, by name; linked, or copied with ``copy``.
        copy: Copy the packs instead of linking them.
        installed: Folders of packages that Python finds as if they were installed.
        arguments: Further arguments of ``main.py``.
    """

    def __init__(
        self,
        base: Path,
        packs: dict[str, Path],
        *,
        copy: bool = False,
        installed: tuple[Path, ...] = (),
        arguments: tuple[str, ...] = (),
    ) -> None:
        self.base = base
        models = Path(os.environ["COMFYUI_PATH"], "comfy/supported_models.py").read_text(encoding="utf-8")
        self.newest = "flux2" if "Flux2" in models else "flux"
        """The newest tiny model that this ComfyUI can make."""
        self.log = base / "server.log"
        for folder in FOLDERS:
            (base / folder).mkdir(parents=True, exist_ok=True)
        for name, source in packs.items():
            place = base / "custom_nodes" / name
            if copy:
                shutil.copytree(source, place, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", ".*"))
            else:
                place.symlink_to(source, target_is_directory=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        command = [os.environ.get("COMFYUI_PYTHON", sys.executable), "main.py", "--cpu", "--disable-auto-launch"]
        command += ["--listen", "127.0.0.1", "--port", str(self.port), "--base-directory", str(base)]
        command += ["--database-url", "sqlite:///:memory:", "--use-pytorch-cross-attention", *arguments]
        with self.log.open("wb") as sink:
            self.process = subprocess.Popen(
                command,
                cwd=os.environ["COMFYUI_PATH"],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, installed))},
                stdout=sink,
                stderr=subprocess.STDOUT,
            )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the server."""
        self.process.terminate()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def text(self) -> str:
        """What the server has logged."""
        return self.log.read_text(errors="replace")

    def get(self, path: str) -> Any:
        """Fetch JSON."""
        return json.loads(self.fetch(path))

    def post(self, path: str, body: object) -> Any:
        """Send JSON, receive JSON or nothing."""
        content = self.fetch(path, body)
        return json.loads(content) if content else None

    def fetch(self, path: str, body: object = None) -> bytes:
        """Fetch a page; an answer other than 200 is an error."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request("GET" if body is None else "POST", path, None if body is None else json.dumps(body))
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        assert answer.status == 200, content.decode(errors="replace")
        return content

    def queue(self, prompt: Prompt) -> str:
        """Queue a prompt and return its id."""
        nodes = {name: {"class_type": node, "inputs": inputs} for name, (node, inputs) in prompt.items()}
        found: str = self.post("/prompt", {"prompt": nodes})["prompt_id"]
        return found

    def wait(self, prompt_id: str, timeout: float = 240) -> Outcome:
        """Wait until a prompt has ended."""
        start = time.monotonic()
        while time.monotonic() - start < timeout:
            history = self.get(f"/history/{prompt_id}").get(prompt_id)
            if history:
                return _outcome(history, time.monotonic() - start)
            time.sleep(0.1)
        raise AssertionError(f"the prompt did not end within {timeout} s:\n{self.text()[-3000:]}")

    def run(self, prompt: Prompt) -> dict[str, Any]:
        """Run a prompt that must succeed; return what each output node showed."""
        outcome = self.wait(self.queue(prompt))
        assert outcome.error is None, (outcome.error, self.text()[-2000:])
        return outcome.outputs

    def error(self, prompt: Prompt) -> tuple[str, str, str]:
        """Run a prompt that must fail; return type, message and node of the exception."""
        outcome = self.wait(self.queue(prompt))
        assert outcome.error is not None
        return outcome.error

    def _wait(self) -> None:
        for _ in range(720):
            assert self.process.poll() is None, self.text()[-3000:]
            try:
                self.fetch("/system_stats")
            except OSError:
                time.sleep(0.25)
            else:
                return
        raise AssertionError(f"ComfyUI did not answer:\n{self.text()[-3000:]}")


def _outcome(history: dict[str, Any], seconds: float) -> Outcome:
    error, interrupted = None, False
    for kind, facts in history["status"]["messages"]:
        if kind == "execution_error":
            error = (facts["exception_type"], facts["exception_message"].strip(), facts["node_id"])
        interrupted |= kind == "execution_interrupted"
    return Outcome(history["outputs"], error, interrupted, seconds)
