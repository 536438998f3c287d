"""Everything that is checked about this workspace, one session each: ``uv run nox`` runs what CI runs.

``uv run nox -l`` lists the sessions. The six packages are tested one at a time, each in an environment that holds only
that package and what it declares, so an undeclared import fails as a missing module.
"""

import os
import shutil
import time
from pathlib import Path
from xml.etree import ElementTree

import nox

nox.needs_version = ">=2025.5.1"
nox.options.default_venv_backend = "uv"
nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_missing_interpreters = True
nox.options.sessions = ["lint", "types", "contracts", "test", "workspace", "wheels", "summary"]

ROOT = Path(__file__).parent
PACKAGES = ("attn-kernels", "value-utils", "attn-dispatch", "ttr-distill", "ttr-controller", "comfy-nodes")
EXTRAS = {"ttr-distill": ("diffusers", "teacher"), "ttr-controller": ("quickstart",)}
PYTHONS = ("3.11", "3.12", "3.13")

# Results of this run of nox only, so that the count never contains an older run.
REPORTS = ROOT / ".nox" / "junit"
RUN = REPORTS / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"

ENVIRONMENT = {
    # Empty means off: where it is set, every process compiles torch's Python files again (9 s instead of 2.5 s).
    "PYTHONDONTWRITEBYTECODE": "",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "MPLBACKEND": "Agg",
    # What is compiled for the GPUs that are not here is compiled once.
    "TRITON_CACHE_DIR": str(ROOT / ".nox" / "triton"),
}
# The tests' tensors are small: a second thread saves nothing, and where another process wants the cores, every
# operation waits for it (ttr-distill: 854 s instead of 40 s).
THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def sync(session: nox.Session, *arguments: str) -> None:
    """Make the session's environment what the lock says, exactly."""
    session.env.update(ENVIRONMENT)
    session.run_install(
        "uv",
        "sync",
        "--quiet",
        "--locked",
        f"--python={session.virtualenv.location}",
        *arguments,
        env={"UV_PROJECT_ENVIRONMENT": session.virtualenv.location},
    )


def pytest(session: nox.Session, *arguments: str | Path) -> None:
    """Run tests with the root's settings and leave the counts for ``summary``."""
    name = session.name.replace("(", "-").replace(")", "")
    report = f"--junit-xml={RUN / name}.xml"
    settings = ("-c", ROOT / "pyproject.toml", f"--rootdir={ROOT}", report)
    session.run("pytest", "-q", *settings, *arguments, *session.posargs, env=THREADS)


def sources() -> list[str]:
    """Source folders of all packages."""
    return [f"packages/{package}/src" for package in PACKAGES]


@nox.session
def lint(session: nox.Session) -> None:
    """Style and formatting (ruff), and a lock that matches the project files."""
    sync(session, "--only-group", "lint")
    session.run("uv", "lock", "--check", external=True)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Strict mypy over the six source trees."""
    sync(session, "--no-default-groups", "--group", "types")
    session.run("mypy", *sources())


@nox.session
def contracts(session: nox.Session) -> None:
    """Who may import whom (import-linter), the rules of scripts/architecture, and figures in documents."""
    # Both only read the sources: no package, and so no torch, is installed.
    sync(session, "--only-group", "contracts", "--only-group", "test")
    session.run("lint-imports", "--no-cache", env={"PYTHONPATH": os.pathsep.join(sources())})
    pytest(session, "tests/test_architecture.py")
    session.run("python", "scripts/check_docs.py")


@nox.session
@nox.parametrize("package", [nox.param(package, id=package) for package in PACKAGES])
def test(session: nox.Session, package: str) -> None:
    """Tests of one package, installed alone."""
    extras = [f"--extra={extra}" for extra in EXTRAS.get(package, ())]
    sync(session, "--package", package, "--group", "test", *extras)
    pytest(session, f"packages/{package}/tests")


@nox.session
def workspace(session: nox.Session) -> None:
    """Tests of the whole: packages together, entry points, the command line."""
    sync(session, "--no-default-groups", "--group", "test")
    pytest(session, "tests", "--ignore=tests/test_architecture.py")


@nox.session(reuse_venv=False)
def wheels(session: nox.Session) -> None:
    """Build all wheels, check what they hold and say, install them elsewhere and use each once."""
    session.env.update(ENVIRONMENT)
    temporary = Path(session.create_tmp())
    built, constraints = temporary / "dist", temporary / "constraints.txt"
    shutil.rmtree(built, ignore_errors=True)
    session.run_install("uv", "build", "--quiet", "--all-packages", "--out-dir", str(built))
    session.run("python", "-I", "scripts/check_wheels.py", str(built))
    # Metadata as a package index reads it; twine stays out of the environment that the wheels go to.
    twine = ("uv", "run", "--quiet", "--locked", "--isolated", "--only-group", "release", "twine", "check", "--strict")
    session.run_install(*twine, *(str(path) for path in sorted(built.glob("*-*"))))
    export = ("uv", "export", "--quiet", "--locked", "--all-packages", "--all-extras", "--no-default-groups")
    export += ("--no-emit-workspace", "--no-hashes")
    session.run_install(*export, "--output-file", str(constraints), silent=True)
    requirements = []
    for package in PACKAGES:
        (wheel,) = built.glob(f"{package.replace('-', '_')}-*.whl")
        extras = f"[{','.join(EXTRAS[package])}]" if package in EXTRAS else ""
        requirements.append(f"{package}{extras} @ {wheel.resolve().as_uri()}")
    session.install("--no-sources", "--constraint", str(constraints), *requirements)
    for package in PACKAGES:
        session.run("python", "-I", "-c", f"import {package.replace('-', '_')}")
        session.run("python", "-I", "scripts/smoke.py", package)


@nox.session(python=PYTHONS)
def matrix(session: nox.Session) -> None:
    """Tests of all packages on every supported Python."""
    sync(session, "--no-default-groups", "--group", "test")
    pytest(session, *(f"packages/{package}/tests" for package in PACKAGES))


@nox.session
def gpu(session: nox.Session) -> None:
    """Tests that need a CUDA device, on kernels compiled for it instead of interpreted."""
    sync(session, "--no-default-groups", "--group", "test")
    session.env["TRITON_INTERPRET"] = "0"
    answer = session.run("python", "-c", "import torch; print(torch.cuda.is_available())", silent=True)
    if "True" not in str(answer):
        session.skip("no CUDA device")
    pytest(session, "-m", "gpu", "packages", "tests")


@nox.session
def kernels(session: nox.Session) -> None:
    """Every case of every kernel, compiled for all GPUs; ``test(attn-kernels)`` takes a part of them."""
    sync(session, "--package", "attn-kernels", "--group", "test")
    session.env["COMPILE_EVERY_TARGET"] = "1"
    pytest(session, "packages/attn-kernels/tests/test_compile.py")


@nox.session
def hardening(session: nox.Session) -> None:
    """Fuzz and fault tests at length; ``workspace`` runs them in short."""
    sync(session, "--no-default-groups", "--group", "test")
    session.env["HARDENING"] = "long"
    pytest(session, "--timeout=1800", "tests/hardening")


@nox.session
def bench(session: nox.Session) -> None:
    """Benchmarks: those named behind ``--``, else all of them."""
    patterns = ("packages/*/benchmarks/bench_*.py", "benchmarks/bench_*.py")
    found = sorted(path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern))
    chosen = session.posargs or found
    sync(session, "--no-default-groups", "--group", "test")
    for script in chosen:
        session.run("python", script)


@nox.session
def comfyui(session: nox.Session) -> None:
    """Tests against a real ComfyUI checkout."""
    checkout = os.environ.get("COMFYUI_PATH", "")
    if not Path(checkout, "nodes.py").is_file():
        session.skip("COMFYUI_PATH does not name a ComfyUI checkout")
    folders = ("packages/attn-dispatch", "packages/comfy-nodes")
    python = os.environ.get("COMFYUI_PYTHON")
    if python:
        # The environment that runs ComfyUI already; it needs pytest, pytest-timeout, pytest-socket and hypothesis.
        paths = os.pathsep.join(str(ROOT / source) for source in sources())
        command = ("-m", "pytest", "-q", "-c", ROOT / "pyproject.toml", f"--rootdir={ROOT}", "-m", "comfyui", *folders)
        session.run(python, *command, *session.posargs, env={**THREADS, "PYTHONPATH": paths}, external=True)
        return
    sync(session, "--no-default-groups", "--group", "test")
    session.install("--requirement", str(Path(checkout, "requirements.txt")), "transformers<5")
    session.env["COMFYUI_PYTHON"] = str(Path(session.bin, "python"))
    pytest(session, "-m", "comfyui", *folders)


@nox.session(venv_backend="none")
def summary(session: nox.Session) -> None:
    """Count the tests of all sessions of this run."""
    counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    reports = sorted(RUN.glob("*.xml"))
    for report in reports:
        for suite in ElementTree.parse(report).getroot().iter("testsuite"):
            for key in counts:
                counts[key] += int(suite.get(key, "0"))
    failed = counts["failures"] + counts["errors"]
    passed = counts["tests"] - failed - counts["skipped"]
    line = f"{passed} tests passed, {failed} failed, {counts['skipped']} skipped in {len(reports)} suites"
    for older in REPORTS.glob("*"):
        if older != RUN:
            shutil.rmtree(older) if older.is_dir() else older.unlink()
    REPORTS.mkdir(parents=True, exist_ok=True)
    (REPORTS / "summary.txt").write_text(f"{line}\n", encoding="utf-8")
    session.log(line)
    if failed or not passed:
        session.error("no test passed" if not failed else f"{failed} tests failed")
