"""The pack in a real ComfyUI: COMFYUI_PATH names a checkout, COMFYUI_PYTHON the Python with its requirements."""

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PACKAGE = Path(__file__).resolve().parents[1]
COMFYUI = os.environ.get("COMFYUI_PATH")

pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.enable_socket,
    pytest.mark.skipif(not COMFYUI, reason="COMFYUI_PATH names no ComfyUI checkout"),
]

FLOW: dict[str, Any] = {
    "seeds": ("RandomSeedBatch", {"seed": 42, "count": 2}),
    "prompts": ("LoadPromptListFromJSON", {"json_path": "prompts.json"}),
    "sweep": ("ClockedSweepValues", {"clock": "5", "values": "1, 2, 3"}),
    "pairs": ("Combinations", {"a": "1, 2", "b": ["sweep", 0]}),
}
EXPECTED = {
    ("seeds", 0): ["2053695854357871005", "5073395517033431291"],
    ("prompts", 0): ["a red apple", "a blue house"],
    ("sweep", 0): ["1.0", "1.0", "2.0", "2.0", "3.0"],
    ("pairs", 0): ["1.0", "2.0"] * 5,
    ("pairs", 1): ["1.0", "1.0", "2.0", "2.0", "3.0"] * 2,
}


def _fetch(port: int, path: str, body: object = None) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET" if body is None else "POST", path, None if body is None else json.dumps(body))
        answer = connection.getresponse()
        content = answer.read()
    finally:
        connection.close()
    assert answer.status == 200, content
    return content


@pytest.fixture(params=[PACKAGE.parents[1], PACKAGE, PACKAGE / "src/comfy_nodes"], ids=["clone", "folder", "installed"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[int]:
    """A running ComfyUI whose only pack is a link to one of the three folders."""
    for folder in ("custom_nodes", "input", "models", "output", "temp", "user"):
        (tmp_path / folder).mkdir()
    (tmp_path / "custom_nodes/approximate-attention").symlink_to(request.param, target_is_directory=True)
    (tmp_path / "input/prompts.json").write_text('["a red apple", "a blue house"]', encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [os.environ.get("COMFYUI_PYTHON", sys.executable), "main.py", "--cpu", "--disable-auto-launch"]
    command += ["--listen", "127.0.0.1", "--port", str(port), "--base-directory", str(tmp_path)]
    command += ["--database-url", "sqlite:///:memory:"]
    log = tmp_path / "server.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(command, cwd=str(COMFYUI), stdout=sink, stderr=subprocess.STDOUT)
        try:
            _wait(port, process, log)
            yield port
        finally:
            process.terminate()
            process.wait(timeout=20)


def _wait(port: int, process: "subprocess.Popen[bytes]", log: Path) -> None:
    for _ in range(480):
        assert process.poll() is None, log.read_text(errors="replace")[-3000:]
        try:
            _fetch(port, "/system_stats")
        except OSError:
            time.sleep(0.25)
        else:
            return
    raise AssertionError(f"ComfyUI did not answer:\n{log.read_text(errors='replace')[-3000:]}")


def test_the_nodes_run(server: int) -> None:
    known = json.loads(_fetch(server, "/object_info"))
    assert {node for node, _ in FLOW.values()} <= set(known)
    prompt = {name: {"class_type": node, "inputs": inputs} for name, (node, inputs) in FLOW.items()}
    for name, slot in EXPECTED:
        prompt[f"{name}-{slot}"] = {"class_type": "PreviewAny", "inputs": {"source": [name, slot]}}
    prompt_id = json.loads(_fetch(server, "/prompt", {"prompt": prompt}))["prompt_id"]
    for _ in range(240):
        history = json.loads(_fetch(server, f"/history/{prompt_id}")).get(prompt_id)
        if history:
            break
        time.sleep(0.25)
    assert history["status"]["status_str"] == "success", history["status"]
    shown = {node: output["text"] for node, output in history["outputs"].items()}
    assert shown == {f"{name}-{slot}": texts for (name, slot), texts in EXPECTED.items()}
    page = _fetch(server, "/extensions/approximate-attention/docs/Combinations.md")
    assert page.startswith(b"# Combinations")
