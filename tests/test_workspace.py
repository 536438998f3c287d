"""The packages declare what they use, agree with each other, and stay light to import."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from importlib.metadata import entry_points, packages_distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("attn-kernels", "value-utils", "attn-dispatch", "ttr-distill", "ttr-controller", "comfy-nodes")

# Provided by the host that loads the package, or standing for a distribution of another name.
FROM_THE_HOST = {"comfy", "comfy_api", "comfy_execution", "folder_paths", "nodes", "server"}
DISTRIBUTIONS = {
    "PIL": "pillow",
    "comet_ml": "comet-ml",
    "open_clip": "open-clip-torch",
    "resvg_py": "resvg-py",
    "triton": "triton",
}

# Declared though no line of the package imports it, and why.
NOT_IMPORTED = {
    "attn-kernels": {
        "numpy": "torch warns without it, and Triton's interpreter needs it",
        "triton": "the fast kernels of this package are written in it",
        "triton-windows": "the same for Windows",
    },
    "ttr-controller": {"numpy": "Tensor.numpy() needs it, and torch does not bring it"},
}

# What importing a package must not load: seconds of start-up, or not installed everywhere.
HEAVY = {
    "attn-kernels": ("triton", "matplotlib"),
    "value-utils": ("torch", "numpy"),
    "attn-dispatch": ("triton", "diffusers", "transformers"),
    "ttr-distill": ("triton", "diffusers", "transformers", "comet_ml", "trackio", "resvg_py"),
    "ttr-controller": ("matplotlib", "diffusers", "transformers", "lpips", "pyiqa", "PIL", "typer"),
    "comfy-nodes": ("matplotlib", "diffusers", "transformers", "typer"),
}


@cache
def project(package: str) -> dict[str, Any]:
    text = (ROOT / "packages" / package / "pyproject.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(one).name) for one in requirements}


def declared(package: str) -> set[str]:
    """Distributions that the package or one of its extras requires."""
    table = project(package)["project"]
    extras = table.get("optional-dependencies", {}).values()
    return names(table["dependencies"]).union(*map(names, extras))


def top_level_imports(folder: Path) -> set[str]:
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(str(node.module).partition(".")[0])
    return found


def imported(package: str) -> set[str]:
    """Distributions that the package's sources import, its own and the standard library left out."""
    module = package.replace("-", "_")
    known = packages_distributions()
    foreign = (
        top_level_imports(ROOT / "packages" / package / "src") - set(sys.stdlib_module_names) - FROM_THE_HOST - {module}
    )
    return {canonicalize_name(DISTRIBUTIONS.get(name) or known.get(name, [name])[0]) for name in foreign}


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_are_declared(package: str) -> None:
    assert imported(package) <= declared(package)


@pytest.mark.parametrize("package", [package for package in PACKAGES if package != "comfy-nodes"])
def test_required_packages_are_imported(package: str) -> None:
    required = names(project(package)["project"]["dependencies"])
    assert required - imported(package) <= set(NOT_IMPORTED.get(package, {}))


def test_reading_imports_finds_those_in_functions(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        "import b.c\n\ndef f():\n    from d.e import g\n    from . import h\n", encoding="utf-8"
    )
    assert top_level_imports(tmp_path) == {"b", "d"}


def test_the_workspace_has_these_packages() -> None:
    assert {path.parent.name for path in (ROOT / "packages").glob("*/pyproject.toml")} == set(PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_is_complete(package: str) -> None:
    folder, table = ROOT / "packages" / package, project(package)["project"]
    root = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module = folder / "src" / package.replace("-", "_")
    assert table["name"] == package
    assert re.fullmatch(r"\d+\.\d+\.\d+", table["version"])
    assert (table["requires-python"], table["license"]) == (root["requires-python"], root["license"])
    assert (folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert (module / "py.typed").is_file()
    assert len((folder / "README.md").read_text(encoding="utf-8").splitlines()) > 5
    assert list((folder / "tests").rglob("test_*.py"))


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_accept_each_other(package: str) -> None:
    """uv does not compare bounds inside a workspace; an installed wheel would find it too late."""
    table = project(package)["project"]
    lines = [
        *table["dependencies"],
        *(one for extra in table.get("optional-dependencies", {}).values() for one in extra),
    ]
    for requirement in map(Requirement, lines):
        if requirement.name in PACKAGES:
            assert str(requirement.specifier), f"{package} needs a bound on {requirement.name}"
            assert project(requirement.name)["project"]["version"] in requirement.specifier
            extras = set(project(requirement.name)["project"].get("optional-dependencies", {}))
            assert requirement.extras <= extras
            assert project(package)["tool"]["uv"]["sources"][requirement.name] == {"workspace": True}


def test_the_extras_are_these() -> None:
    extras = {package: set(project(package)["project"].get("optional-dependencies", {})) for package in PACKAGES}
    assert {package: found for package, found in extras.items() if found} == {
        "ttr-distill": {"comet", "diffusers", "pipelines", "teacher", "trackio"},
        "ttr-controller": {"biqa", "dreamsim", "hps", "lpips", "quickstart"},
        "comfy-nodes": {"rewards"},
    }


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_is_light(package: str) -> None:
    module = package.replace("-", "_")
    code = f"import sys, {module}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    run = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True, timeout=120)
    loaded = run.stdout.split()
    assert module in loaded
    assert not set(HEAVY[package]).intersection(loaded)
    assert run.stderr == ""


def test_entry_points_resolve() -> None:
    (nodes,) = (point for point in entry_points(group="comfyui.custom_nodes") if point.name == "approximate-attention")
    (command,) = (point for point in entry_points(group="console_scripts") if point.name == "ttr")
    assert nodes.load().__name__ == "comfy_nodes"
    assert callable(command.load())


def test_the_lock_is_current() -> None:
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("uv is not on PATH")
    run = subprocess.run(
        [uv, "lock", "--check", "--offline"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("folder", ["approximate-attention", "a clone.2", "main"])
def test_tests_run_whatever_the_clone_is_called(folder: str, tmp_path: Path) -> None:
    """The root's __init__.py is a door for ComfyUI; pytest must not take the clone for a Python package."""
    clone = tmp_path / folder
    tests = clone / "packages" / "comfy-nodes" / "tests"
    tests.mkdir(parents=True)
    for name in ("__init__.py", "conftest.py", "pyproject.toml", "packages/comfy-nodes/__init__.py"):
        shutil.copy(ROOT / name, clone / name)
    source = clone / "packages" / "comfy-nodes" / "src" / "comfy_nodes"
    shutil.copytree(ROOT / "packages" / "comfy-nodes" / "src" / "comfy_nodes", source)
    (tests / "test_nothing.py").write_text("def test_nothing() -> None: ...\n", encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", str(tests)]
    run = subprocess.run(command, cwd=clone, capture_output=True, text=True, check=False, timeout=120)
    assert (run.returncode, "1 passed" in run.stdout) == (0, True), run.stdout


def readme_commands() -> list[str]:
    """Lines of the shell blocks of README.md, ``&&`` taken apart."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.splitlines()]
    return [part.partition("#")[0].strip() for line in lines for part in line.split("&&")]


def test_the_readme_names_the_two_commands() -> None:
    commands = readme_commands()
    assert "pip install uv" in commands
    assert "uv run ttr quickstart" in commands
    assert "uv run nox" in commands


def test_ci_runs_the_test_command_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert re.search(r"^uv run nox\b(?! -)", script, re.MULTILINE)
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_sessions_named_in_texts_exist() -> None:
    tree = ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8"))
    sessions = {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and any("session" in ast.unparse(one) for one in node.decorator_list)
    }
    places = ("README.md", "CONTRIBUTING.md", ".github/workflows/ci.yml")
    texts = [(ROOT / place).read_text(encoding="utf-8") for place in places]
    named = {
        name
        for text in texts
        for names in re.findall(r"nox -s ((?:\"?[a-z]+[\w.()-]*\"? ?)+)", text)
        for name in names.split()
    }
    bases = {re.split(r"[(-]", name.strip('"'))[0] for name in named}
    assert bases
    assert bases <= sessions
    assert {
        "lint",
        "types",
        "contracts",
        "test",
        "workspace",
        "wheels",
        "matrix",
        "gpu",
        "bench",
        "comfyui",
    } <= sessions
