"""Two calls timed against each other, and the table and the file of such comparisons."""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

Call = Callable[[], Tensor]


def microseconds(call: Call, calls: int) -> float:
    """Process time of one call."""
    start = time.process_time_ns()
    for _ in range(calls):
        call()
    return (time.process_time_ns() - start) / calls / 1e3


def compare(first: tuple[str, Call], second: tuple[str, Call], rounds: int, calls: int) -> dict[str, float]:
    """Compare two named calls with equal answers; medians over paired rounds, whose order alternates.

    Returns:
        ``<name>_us`` of either and ``overhead_us``, what the second takes longer.
    """
    if not torch.equal(first[1](), second[1]()):
        raise SystemExit("the arms differ")
    pairs = []
    for one in range(rounds):
        order = (second, first) if one % 2 else (first, second)
        taken = {name: microseconds(call, calls) for name, call in order}
        pairs.append((taken[first[0]], taken[second[0]]))
    return {
        f"{first[0]}_us": statistics.median(one for one, _ in pairs),
        f"{second[0]}_us": statistics.median(two for _, two in pairs),
        "overhead_us": statistics.median(two - one for one, two in pairs),
    }


def run(description: str, target_us: float, measure: Callable[[int, int], Mapping[str, Mapping[str, float]]]) -> int:
    """Read the command line, measure, print the table and write it where asked; 1 if a row is above the target.

    Args:
        description: Of the command.
        target_us: Most overhead of a call, in microseconds.
        measure: Takes rounds and calls; returns what ``compare`` returned, by row.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--calls", type=int, default=100)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():
        rows = measure(arguments.rounds, arguments.calls)
    columns = list(next(iter(rows.values())))
    sys.stdout.write(f"{'':<22}{''.join(f'{name:>15}' for name in columns)}{'target':>8}\n")
    for name, row in rows.items():
        sys.stdout.write(f"{name:<22}{''.join(f'{row[column]:>15.2f}' for column in columns)}{target_us:>8.0f}\n")
    if arguments.json is not None:
        machine = {"platform": platform.platform(), "processor": platform.processor(), "cpus": os.cpu_count()}
        versions = {"torch": torch.__version__, "python": platform.python_version()}
        arguments.json.write_text(json.dumps({"rows": rows, "target_us": target_us, **machine, **versions}, indent=1))
    return int(any(row["overhead_us"] > target_us for row in rows.values()))
