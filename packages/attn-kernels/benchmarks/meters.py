"""Time, memory, and the facts about a machine that a number means nothing without."""

import ctypes
import importlib.metadata
import math
import platform
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

Run = Callable[[], Tensor]
PACKAGES = ("torch", "triton", "comfy-kitchen", "flash-attn", "numpy")


def best_seconds(runs: Sequence[Run], rounds: int, device: torch.device) -> list[float]:
    """Fastest of several rounds of each run, which take turns so that a slow spell of the machine meets all of them.

    On a CPU this is the process's own time on one thread, on a GPU the time between events on its stream.
    """
    best = [math.inf] * len(runs)
    for _ in range(rounds):
        for place, run in enumerate(runs):
            best[place] = min(best[place], _cuda_seconds(run) if device.type == "cuda" else _cpu_seconds(run))
    return best


def _cpu_seconds(run: Run) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def _cuda_seconds(run: Run) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    stop.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(stop)) / 1e3


def extra_memory(run: Run, device: torch.device) -> float:
    """How far memory rises above its level during a run, in MiB, output included; NaN where it cannot be told."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_kib("VmRSS")
        run()
        return (_status_kib("VmHWM") - before) / 1024
    except (OSError, AttributeError):
        return math.nan


def _status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def machine_facts(device: torch.device) -> dict[str, str]:
    """Device, driver and versions; nothing that names the machine itself."""
    facts = {"device": device_name(device), "python": platform.python_version(), "system": platform.system()}
    if device.type == "cuda":
        facts["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
        facts["cuda"] = str(torch.version.cuda or torch.version.hip)
        facts["driver"] = _driver()
    else:
        facts["instructions"] = torch.backends.cpu.get_cpu_capability()
        facts["threads"] = str(torch.get_num_threads())
    for package in PACKAGES:
        facts[package] = _version(package)
    return facts


def device_name(device: torch.device) -> str:
    """``AMD EPYC``, ``NVIDIA H100 80GB HBM3``."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _driver() -> str:
    try:
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
