"""A stand-in for the part of ComfyUI that describes nodes: names, ids and options, nothing of what runs them."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]


@dataclass
class Input:
    """One input; options that the real class does not know are a TypeError, as there."""

    id: str
    type: str = ""
    default: object = None
    min: float | None = None
    max: float | None = None
    optional: bool = False
    tooltip: str | None = None
    multiline: bool = False
    placeholder: str | None = None


@dataclass
class Output:
    id: str | None = None
    display_name: str | None = None
    tooltip: str | None = None
    is_output_list: bool = False
    type: str = ""

    @property
    def label(self) -> str | None:
        return self.display_name or self.id


@dataclass
class Schema:
    node_id: str
    display_name: str | None = None
    category: str = "sd"
    inputs: list[Input] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    description: str = ""
    is_input_list: bool = False
    is_experimental: bool = False

    def __post_init__(self) -> None:
        ids = [item.id for item in (*self.inputs, *self.outputs)]
        if len(ids) != len(set(ids)):
            raise ValueError(f"{self.node_id}: two inputs or outputs share an id: {ids}")


def _typed(name: str) -> SimpleNamespace:
    return SimpleNamespace(
        Input=lambda *args, **kwargs: Input(*args, type=name, **kwargs),
        Output=lambda *args, **kwargs: Output(*args, type=name, **kwargs),
    )


def _multi_type(widget: Input, types: list[object]) -> Input:
    assert types == [fake_io.AnyType]
    widget.type += ",*"
    return widget


fake_io: Any = SimpleNamespace(
    AnyType=_typed("*"),
    ComfyNode=type("ComfyNode", (), {}),
    Float=_typed("FLOAT"),
    Input=Input,
    Int=_typed("INT"),
    MultiType=SimpleNamespace(Input=_multi_type),
    NodeOutput=lambda *results: results,
    Schema=Schema,
    String=_typed("STRING"),
)


@dataclass
class Host:
    """The stand-in as a test sees it.

    Attributes:
        extension: Base class of a pack's extension.
        input_folder: Where ComfyUI keeps files that nodes read.
    """

    extension: type
    input_folder: Path


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Host]:
    """Make ``comfy_api.latest`` and ``folder_paths`` importable for one test."""
    here = Host(type("ComfyExtension", (), {}), tmp_path / "input")
    here.input_folder.mkdir()
    modules = {name: ModuleType(name) for name in ("comfy_api", "comfy_api.latest", "folder_paths")}
    vars(modules["comfy_api.latest"]).update(ComfyExtension=here.extension, io=fake_io)
    vars(modules["folder_paths"]).update(get_input_directory=lambda: str(here.input_folder))
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    before = set(sys.modules)
    yield here
    for name in set(sys.modules) - before:
        if "comfy_nodes" in name or name.startswith(str(REPOSITORY)):
            del sys.modules[name]


@pytest.fixture
def load_pack() -> Callable[[Path], ModuleType]:
    """Load a folder the way ComfyUI loads a pack: by its path, with the path as the module's name."""

    def load(folder: Path) -> ModuleType:
        name = str(folder).replace(".", "_x_")
        spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module

    return load
