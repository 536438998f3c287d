import builtins
import subprocess
import sys
from pathlib import Path
from typing import Any

import comfy_nodes
import pytest
from comfy_nodes import _bootstrap


def test_import_is_light_and_needs_no_host() -> None:
    code = (
        "import comfy_nodes, sys; "
        "print(*({'torch', 'numpy', 'comfy_api', 'value_utils', 'attn_kernels'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == []


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(_bootstrap, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return sys.path


def _package(folder: Path, name: str) -> Path:
    source = folder / name / "src"
    module = source / name.replace("-", "_")
    module.mkdir(parents=True)
    (module / "__init__.py").touch()
    return source


def test_siblings_are_added_behind_everything_else(nothing_installed: list[str], tmp_path: Path) -> None:
    before = list(sys.path)
    values, kernels = _package(tmp_path, "value-utils"), _package(tmp_path, "attn-kernels")
    _package(tmp_path, "somebody-elses-pack")
    assert _bootstrap.add_sibling_packages(tmp_path) == ("attn-dispatch", "ttr-distill", "ttr-controller")
    assert sys.path == [*before, str(kernels), str(values)]


def test_installed_packages_are_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = list(sys.path)
    _package(tmp_path, "value-utils")
    assert "value-utils" not in _bootstrap.add_sibling_packages(tmp_path)
    assert sys.path == before


def test_siblings_lie_where_the_pack_looks() -> None:
    packages = Path(comfy_nodes.__file__).resolve().parents[3]
    if packages.name != "packages":
        pytest.skip("the package stands alone here")
    assert all((packages / name / "src" / name.replace("-", "_")).is_dir() for name in _bootstrap.SIBLINGS)


def test_a_missing_package_is_named(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without_values(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "value_utils":
            raise ModuleNotFoundError("No module named 'value_utils'", name="value_utils")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_values)
    with pytest.raises(ModuleNotFoundError):
        comfy_nodes.comfy_entrypoint()
    monkeypatch.setattr(comfy_nodes, "add_sibling_packages", lambda packages: ("value-utils",))
    with pytest.raises(ImportError, match="the nodes need the package value-utils; install it with pip"):
        comfy_nodes.comfy_entrypoint()
