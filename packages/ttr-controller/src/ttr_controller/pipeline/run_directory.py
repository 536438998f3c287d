"""A run's folder: settings, results phase by phase, checkpoints and pictures, always in a state that can be resumed."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from ttr_distill.files import write_atomically

from ttr_controller.pipeline.settings import Plan, QuickstartSettings, RunError

RESULTS_NAME = "results.json"
SCHEMA = 1
_PACKAGES = ("attn-kernels", "attn-dispatch", "ttr-distill", "ttr-controller")

Json = dict[str, object]


class RunDirectory:
    """The folder of one run.

    Attributes:
        path: The folder.
        results: What the report reads; ``save`` writes it atomically.
        settings: The run's settings.
        writes: Whether ``save`` writes; of several processes that work on one run only the main one does.
    """

    def __init__(self, path: Path, results: Json, settings: QuickstartSettings) -> None:
        self.path = path
        self.results = results
        self.settings = settings
        self.writes = True

    @classmethod
    def open_or_create(cls, path: Path, settings: QuickstartSettings) -> RunDirectory:
        """Open the run in ``path`` to go on with it, or start one there.

        Raises:
            RunError: The folder holds something else, a run with other settings, or cannot be written.
        """
        if (path / RESULTS_NAME).exists():
            run = cls.open(path)
            different = run.settings.differences(settings)
            if different:
                raise RunError(f"{path} holds a run with other settings ({'; '.join(different)}); choose another --out")
            return run
        try:
            path.mkdir(parents=True, exist_ok=True)
            if any(not entry.name.startswith(".") for entry in path.iterdir()):
                raise RunError(f"{path} is not empty and holds no run; choose another --out")
            run = cls(path, _new_results(settings), settings)
            run.save()
            (path / "images").mkdir(exist_ok=True)
        except OSError as error:
            raise RunError(f"cannot write to {path}: {error.strerror or error}; choose another --out") from error
        return run

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """Open an existing run.

        Raises:
            RunError: There is no run, or its results are damaged.
        """
        source = path / RESULTS_NAME
        try:
            results = json.loads(source.read_text(encoding="utf-8"))
            settings = QuickstartSettings(**results["settings"])
        except FileNotFoundError:
            raise RunError(f"no run in {path}: {RESULTS_NAME} is missing; start one with: ttr quickstart") from None
        except NotADirectoryError:
            raise RunError(f"{path} is a file; name the folder of a run") from None
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise RunError(f"{source} is damaged ({error}); start again in another folder") from error
        if results.get("schema") != SCHEMA:
            raise RunError(f"{source} has schema {results.get('schema')}, this version reads {SCHEMA}")
        return cls(path, results, settings)

    @property
    def complete(self) -> bool:
        """Whether every phase is done."""
        return bool(self.results.get("complete"))

    @property
    def plan(self) -> Plan | None:
        """The amounts of work, once they are decided."""
        plan = self.results.get("plan")
        return Plan.from_mapping(plan) if isinstance(plan, dict) else None

    @property
    def threads(self) -> int:
        """Threads of the run's tensor operations; kept, since sums depend on it in the last digit."""
        machine = self.section("machine")
        return int(str(machine["threads"]))

    @threads.setter
    def threads(self, count: int) -> None:
        """Note the number of threads; written with the next section."""
        self.section("machine")["threads"] = count

    @property
    def students(self) -> Path:
        """Folder of the student checkpoint."""
        return self.path / "students"

    @property
    def controller(self) -> Path:
        """Folder of the controller checkpoint."""
        return self.path / "controller"

    @property
    def images(self) -> Path:
        """Folder of the pictures."""
        return self.path / "images"

    def has(self, section: str) -> bool:
        """Whether a phase has written its section."""
        return section in self.results

    def section(self, name: str) -> Json:
        """A finished section.

        Raises:
            RunError: The phase has not run yet.
        """
        value = self.results.get(name)
        if not isinstance(value, dict):
            raise RunError(f"{self.path} has no {name} yet; finish the run with: ttr quickstart --out {self.path}")
        return value

    def forget(self, *sections: str) -> None:
        """Drop finished sections, so that their phases run again; written with the next section."""
        for name in sections:
            self.results.pop(name, None)

    def record(
        self, section: str, value: Mapping[str, object] | list[Json] | bool, seconds: float | None = None
    ) -> None:
        """Write a finished section and how long it took.

        Raises:
            RunError: The folder cannot be written.
        """
        self.results[section] = value if isinstance(value, bool | list) else dict(value)
        if seconds is not None:
            self._add_seconds(section, seconds)
        self.save()

    def add_seconds(self, phase: str, seconds: float) -> None:
        """Note time that belongs to no section.

        Raises:
            RunError: The folder cannot be written.
        """
        self._add_seconds(phase, seconds)
        self.save()

    def _add_seconds(self, phase: str, seconds: float) -> None:
        taken = self.results.setdefault("seconds", {})
        assert isinstance(taken, dict)
        taken[phase] = round(float(taken.get(phase, 0.0)) + seconds, 2)
        taken["total"] = round(sum(value for name, value in taken.items() if name != "total"), 2)

    def save(self) -> None:
        """Write the results.

        Raises:
            RunError: The folder cannot be written.
        """
        if not self.writes:
            return
        text = json.dumps(self.results, indent=1, allow_nan=False)
        try:
            write_atomically(self.path / RESULTS_NAME, text.encode())
        except OSError as error:
            raise RunError(f"cannot write to {self.path}: {error.strerror or error}") from error


def _new_results(settings: QuickstartSettings) -> Json:
    return {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "complete": False,
        "preset": settings.preset,
        "seed": settings.seed,
        "budget_minutes": settings.budget_minutes,
        "settings": asdict(settings),
        "machine": describe_machine(settings.device),
        "versions": {name: _version(name) for name in _PACKAGES},
        "seconds": {},
    }


def describe_machine(device: str) -> dict[str, object]:
    """Facts that a reader needs to judge the times of a run."""
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return {
        "cpu": name,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": _version("diffusers"),
    }


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"
