"""Compile Triton kernels for GPUs that are not here and report what the machine code needs.

    python packages/attn-kernels/tests/aot.py --target sm90 near_far taylor

Triton compiles for a target without its device or driver, down to machine code, and its wheel holds the disassembler.
What is read from that code: registers, spills to local memory, shared memory, tensor memory, matrix instructions, and
the bare ``trap`` that a kernel becomes when it needs more tensor memory than there is.

The kernels come from ``tests/<operator>/compile_cases.py``, whose ``cases()`` returns one dictionary per kernel:

* ``name``: unique in the file.
* ``kernel``: what ``triton.jit`` made.
* ``pointers``: ``{"Q": "*bf16", ...}``; pointers count as aligned to 16 bytes.
* ``constants``: values of the constexpr parameters, and of any other that the launch turns into a constant: ``None``
  for an absent pointer, 1 for the stride of a contiguous axis.
* ``ints``, ``floats`` (both optional): types of other parameters where they are not ``i32``, as ``{"eps": "fp32"}``.
* ``divisible`` (optional): integers that are multiples of 16, strides above all; without it there are no wide copies.
* ``options`` (optional): per target, else under ``"default"``: ``num_warps``, ``num_stages``, other options of the
  compiler, and ``constants``, which override those above.
* ``targets`` (optional): where the kernel is shipped; all of ``TARGETS`` without it.
* ``mma`` (optional): ``True`` (default) asks for matrix instructions, ``"wgmma"`` for those of a warp group where the
  target has them, ``False`` for none.

Each worker is a process of its own without ``TRITON_INTERPRET``, which Triton reads when a kernel is defined. A kernel
whose compilation fails, or takes the compiler down, ends that process; the rest of the kernels go on in a new one.
"""

import argparse
import dataclasses
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Target:
    """An architecture to compile for.

    Attributes:
        backend: Triton's name of the vendor's compiler.
        arch: What that compiler calls the architecture.
        warp: Threads per warp.
        shared: Bytes of shared memory that one block may have.
        matrix: Names of matrix instructions, any of which will do.
        group: Those among them that a whole warp group issues; empty where there are none.
    """

    backend: str
    arch: int | str
    warp: int
    shared: int
    matrix: tuple[str, ...]
    group: tuple[str, ...] = ()


_WARP = ("HMMA", "QMMA", "IMMA", "OMMA")
_SM90, _SM100 = ("HGMMA", "QGMMA", "IGMMA"), ("UTCHMMA", "UTCQMMA", "UTCIMMA", "UTCOMMA")
_CDNA = ("v_mfma",)
TARGETS = {
    "sm80": Target("cuda", 80, 32, 166_912, _WARP),
    "sm86": Target("cuda", 86, 32, 101_376, _WARP),
    "sm89": Target("cuda", 89, 32, 101_376, _WARP),
    "sm90": Target("cuda", 90, 32, 232_448, _WARP + _SM90, _SM90),
    "sm100": Target("cuda", 100, 32, 232_448, _WARP + _SM100, _SM100),
    "sm120": Target("cuda", 120, 32, 101_376, _WARP),
    "gfx942": Target("hip", "gfx942", 64, 65_536, _CDNA),
}
TENSOR_MEMORY = 512
"""Columns of tensor memory of one multiprocessor (sm100)."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What one kernel needs on one target.

    Attributes:
        file: The ``compile_cases.py`` it comes from.
        case: Its name there.
        target: Key of ``TARGETS``.
        mma: What the case asks for.
        error: Last lines of the compiler's complaint; empty if it compiled. Nothing below is known otherwise.
        registers: Registers of a thread.
        spills: Loads and stores of local memory (NVIDIA); spilled registers and bytes of scratch memory (AMD).
        shared: Bytes of shared memory of a block.
        tensor_memory: Columns of tensor memory.
        matrix: Matrix instructions in the code, by name.
        instructions: All instructions in the code.
        trap: Whether the code holds a bare ``trap``.
        warps: Warps of a block.
        stages: Stages of the software pipeline.
        seconds: Time to compile; near zero from the cache.
    """

    file: str
    case: str
    target: str
    mma: bool | str = True
    error: str = ""
    registers: int = 0
    spills: int = 0
    shared: int = 0
    tensor_memory: int = 0
    matrix: Mapping[str, int] = dataclasses.field(default_factory=dict)
    instructions: int = 0
    trap: bool = False
    warps: int = 0
    stages: int = 0
    seconds: float = 0.0

    @property
    def name(self) -> str:
        """``near_far/attend on sm90``."""
        return f"{Path(self.file).parent.name}/{self.case} on {self.target}"

    def faults(self) -> list[str]:
        """Say what is wrong with the kernel; empty if nothing is."""
        if self.error:
            return [f"{self.name}: does not compile: {self.error}"]
        target = TARGETS[self.target]
        wanted = target.group if self.mma == "wgmma" and target.group else target.matrix
        found = [
            (self.spills > 0, f"spills {self.spills} times at {self.registers} registers"),
            (self.shared > target.shared, f"needs {self.shared} bytes of shared memory, there are {target.shared}"),
            (self.tensor_memory > TENSOR_MEMORY, f"needs {self.tensor_memory} columns of tensor memory"),
            (self.trap, "holds a trap"),
            (bool(self.mma) and not any(self.matrix.get(name) for name in wanted), f"has no {' or '.join(wanted)}"),
        ]
        return [f"{self.name}: {what}" for wrong, what in found if wrong]


class _Worker:
    """A process that compiles; started when it is first needed, and again after a failure."""

    def __init__(self, cache: Path) -> None:
        self._environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
        self._environment.pop("TRITON_INTERPRET", None)
        self._process: subprocess.Popen[str] | None = None
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - lives as long as the worker

    def ask(self, request: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
        """Return the answer and an empty string, or nothing and the last lines of what went wrong."""
        if self._process is None:
            self._log.truncate(0)
            self._process = subprocess.Popen(
                [sys.executable, str(TESTS / "aot_worker.py")],
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if line:
            return json.loads(line), ""
        status = self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
        self._process = None
        self._log.seek(0)
        last = [text.strip() for text in self._log.read().splitlines() if text.strip()][-4:]
        return {}, " | ".join(last) or f"the compiler died with status {status}"

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.communicate()
        self._log.close()


def find(folders: Iterable[str] = ()) -> list[Path]:
    """Return the ``compile_cases.py`` of these operators, or of all."""
    chosen = set(folders)
    return [path for path in sorted(TESTS.glob("*/compile_cases.py")) if not chosen or path.parent.name in chosen]


def choose_targets(cases: Mapping[str, Mapping[str, Any]], targets: Sequence[str], every: bool) -> dict[str, list[str]]:
    """Say for which targets each case of a file is compiled: for all, or fewer as ``compile_files`` has it."""
    chosen: dict[str, list[str]] = {}
    kernels: set[str] = set()
    for place, (name, case) in enumerate(cases.items()):
        kept = [target for target in targets if case["targets"] is None or target in case["targets"]]
        first = case["kernel"] not in kernels
        kernels.add(case["kernel"])
        chosen[name] = kept if every or first or not kept else [kept[place % len(kept)]]
    return chosen


def compile_files(
    files: Sequence[Path],
    cache: Path,
    *,
    targets: Sequence[str] = tuple(TARGETS),
    processes: int = 2,
    every: bool = True,
) -> list[Report]:
    """Compile the kernels of some files.

    Args:
        files: Files with a function ``cases()``.
        cache: Folder of Triton's cache; what lies there is not compiled again.
        targets: Keys of ``TARGETS``; a case that names targets is compiled for those among them.
        processes: Compilers at a time.
        every: Compile every case for all its targets; else only the first case of each kernel, and the further ones
            for one target each, in turn.

    Returns:
        One report per kernel and target in the order of the files. A file that cannot be loaded has one with its error.
    """
    jobs: queue.SimpleQueue[tuple[int, dict[str, Any]] | None] = queue.SimpleQueue()
    reports: dict[int, Report] = {}
    first = _Worker(cache)
    count = 0
    for file in files:
        cases, error = first.ask({"file": str(file)})
        if error:
            reports[count] = Report(str(file), "cases()", "", error=error)
            count += 1
        for name, kept in choose_targets(cases, targets, every).items():
            for target in kept:
                jobs.put((count, {"file": str(file), "case": name, "target": target}))
                count += 1
    workers = [first, *(_Worker(cache) for _ in range(processes - 1))]

    def work(worker: _Worker) -> None:
        while (job := jobs.get()) is not None:
            number, request = job
            machine = TARGETS[request["target"]]
            answer, error = worker.ask({**request, "machine": (machine.backend, machine.arch, machine.warp)})
            reports[number] = Report(**{**request, **answer, "error": error})
        worker.close()

    threads = [threading.Thread(target=work, args=(worker,)) for worker in workers]
    for thread in threads:
        jobs.put(None)
        thread.start()
    for thread in threads:
        thread.join()
    return [reports[number] for number in sorted(reports)]


def main() -> int:
    """Print a table of what the kernels need; 1 if any has a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operators", nargs="*", help="folders of tests; all that have a compile_cases.py")
    parser.add_argument("--target", action="append", choices=TARGETS, help="may be repeated; all")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".triton" / "cache")
    parser.add_argument("--json", action="store_true", help="print the reports as JSON instead")
    arguments = parser.parse_args()
    targets = arguments.target or tuple(TARGETS)
    found = compile_files(find(arguments.operators), arguments.cache, targets=targets, processes=arguments.processes)
    if arguments.json:
        print(json.dumps([dataclasses.asdict(report) for report in found], indent=2))
    else:
        print(f"{'kernel':52}{'regs':>5}{'spills':>7}{'shared':>8}{'tmem':>5}{'instr':>7}{'s':>6}  matrix")
        for one in found:
            numbers = f"{one.registers:5}{one.spills:7}{one.shared:8}{one.tensor_memory:5}{one.instructions:7}"
            matrix = " ".join(f"{name} {count}" for name, count in one.matrix.items())
            print(f"{one.name:52}{numbers}{one.seconds:6.1f}  {matrix}")
    faults = [fault for report in found for fault in report.faults()]
    print(*faults, sep="\n", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
