"""Where a number was measured, and how long something takes there."""

import importlib.metadata
import json
import platform
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"


def facts() -> dict[str, str]:
    """Processor and versions; nothing that names the machine itself."""
    return {
        "device": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": importlib.metadata.version("diffusers"),
    }


def processor() -> str:
    """``AMD EPYC``."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    names = re.findall(r"model name\s*:\s*(.+)", text)
    return names[0].strip() if names else platform.machine()


def best_milliseconds(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Fastest process CPU time of each run; they take turns, so that a slow spell meets all of them."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.process_time()
            run()
            best[name] = min(best[name], 1e3 * (time.process_time() - start))
    return best


def result_path(stem: str) -> Path:
    """``<stem>-cpu-<processor>-<date>.json`` in the folder of results."""
    slug = re.sub(r"[^a-z0-9]+", "-", processor().lower()).strip("-")
    return RESULTS / f"{stem}-cpu-{slug}-{time.strftime('%Y-%m-%d')}.json"


def write(stem: str, result: Mapping[str, object]) -> Path:
    """Write a result, with the facts of the machine, to its place in the folder of results."""
    path = result_path(stem)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"facts": facts(), **result}, indent=1) + "\n")
    return path
