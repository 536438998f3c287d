"""A stand-in for the part of ComfyUI that describes nodes: names, ids and options, nothing of what runs them."""

import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from attn_dispatch.adapters.comfyui_fake import FakeModelPatcher
    from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[3]

_INPUT = ("display_name", "optional", "tooltip", "lazy")
_WIDGET = (*_INPUT, "default", "socketless", "force_input")
_NEW = ("advanced", "raw_link", "extra_dict")
_NUMBER = (*_WIDGET, "min", "max", "step", "display_mode")
_WIDGETS = {
    "BOOLEAN": (*_WIDGET, "label_on", "label_off"),
    "COMBO": (*(one for one in _WIDGET if one != "force_input"), "options", "control_after_generate"),
    "FLOAT": (*_NUMBER, "round"),
    "INT": (*_NUMBER, "control_after_generate"),
    "STRING": (*_WIDGET, "multiline", "placeholder", "dynamic_prompts"),
}


class Input:
    """One input; options that the real class does not know are a TypeError, as there."""

    def __init__(self, id: str, type: str, known: tuple[str, ...], options: dict[str, Any]) -> None:
        unknown = set(options) - set(known)
        if unknown:
            raise TypeError(f"{type} input {id!r} got an unexpected keyword argument {sorted(unknown)}")
        self.id = id
        self.type = type
        self.said = options

    def __getattr__(self, name: str) -> Any:
        """An option that was not given is None, or False where it is a switch."""
        if name.startswith("__"):
            raise AttributeError(name)
        return self.said.get(name, False if name in ("optional", "multiline", "advanced") else None)


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
    hidden: list[object] = field(default_factory=list)
    description: str = ""
    is_input_list: bool = False
    is_output_node: bool = False
    is_deprecated: bool = False
    is_experimental: bool = False
    not_idempotent: bool = False

    def __post_init__(self) -> None:
        ids = [item.id for item in (*self.inputs, *self.outputs) if item.id is not None]
        if len(ids) != len(set(ids)):
            raise ValueError(f"{self.node_id}: two inputs or outputs share an id: {ids}")


@dataclass
class NewSchema(Schema):
    search_aliases: list[str] = field(default_factory=list)


class NodeOutput(tuple):
    """What a node answers: its results, with what the page shows in ``ui``."""

    ui: Any

    def __new__(cls, *results: object, ui: object = None) -> "NodeOutput":
        made = super().__new__(cls, results)
        made.ui = ui
        return made


class Hidden(StrEnum):
    unique_id = "UNIQUE_ID"
    prompt = "PROMPT"
    extra_pnginfo = "EXTRA_PNGINFO"


class NumberDisplay(StrEnum):
    number = "number"
    slider = "slider"


class ComfyNode:
    hidden = SimpleNamespace(unique_id="7", prompt=None, extra_pnginfo=None)


def _typed(name: str, known: tuple[str, ...]) -> SimpleNamespace:
    def make(id: str, **options: Any) -> Input:
        return Input(id, name, known, options)

    parameters = [inspect.Parameter("id", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    parameters += [inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY) for option in known]
    make.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return SimpleNamespace(io_type=name, Input=make, Output=lambda *args, **kwargs: Output(*args, type=name, **kwargs))


def fake_io(*, new: bool) -> Any:
    """The module ``comfy_api.latest.io`` of a new ComfyUI, or of one that does not know the later options."""
    later = _NEW if new else ()
    links = {
        "AnyType": "*",
        "Clip": "CLIP",
        "Conditioning": "CONDITIONING",
        "Guider": "GUIDER",
        "Image": "IMAGE",
        "Latent": "LATENT",
        "Model": "MODEL",
        "Noise": "NOISE",
        "Sampler": "SAMPLER",
        "Sigmas": "SIGMAS",
        "Vae": "VAE",
    }
    types = {name: _typed(type, (*_INPUT, *later)) for name, type in links.items()}
    types |= {type.title(): _typed(type, (*known, *later)) for type, known in _WIDGETS.items()}

    def several(widget: Input, accepted: list[Any]) -> Input:
        widget.type = ",".join([widget.type, *(one.io_type for one in accepted)])
        return widget

    return SimpleNamespace(
        **types,
        ComfyNode=ComfyNode,
        Custom=lambda name: _typed(name, (*_INPUT, *later)),
        Hidden=Hidden,
        Input=Input,
        MultiType=SimpleNamespace(Input=several),
        NodeOutput=NodeOutput,
        NumberDisplay=NumberDisplay,
        Output=Output,
        Schema=NewSchema if new else Schema,
    )


class PreviewImage:
    """Counts images and keeps their size, as the page would show them."""

    def __init__(self, image: Any, animated: bool = False, cls: object = None) -> None:
        self.shape = tuple(image.shape)

    def as_dict(self) -> dict[str, Any]:
        return {"images": [{"filename": "preview.png", "size": self.shape}], "animated": (False,)}


@dataclass
class Host:
    """The stand-in as a test sees it.

    Attributes:
        extension: Base class of a pack's extension.
        input_folder: Where ComfyUI keeps files that nodes read.
        output_folder: Where ComfyUI keeps what nodes produce.
        models_folder: Where ComfyUI keeps models.
        shown: Texts that nodes showed, with the node's id.
    """

    extension: type
    input_folder: Path
    output_folder: Path
    models_folder: Path
    shown: list[tuple[str, str]] = field(default_factory=list)

    def send_progress_text(self, text: str, node_id: str) -> None:
        self.shown.append((text, node_id))


def _run(monkeypatch: pytest.MonkeyPatch, folder: Path, io: Any) -> Iterator[Host]:
    folders = [folder / name for name in ("input", "output", "models")]
    for one in folders:
        one.mkdir()
    here = Host(type("ComfyExtension", (), {}), *folders)
    modules = {name: ModuleType(name) for name in ("comfy_api", "comfy_api.latest", "folder_paths", "server")}
    ui = SimpleNamespace(PreviewImage=PreviewImage)
    vars(modules["comfy_api.latest"]).update(ComfyExtension=here.extension, io=io, ui=ui)
    vars(modules["folder_paths"]).update(
        get_input_directory=lambda: str(here.input_folder),
        get_output_directory=lambda: str(here.output_folder),
        get_temp_directory=lambda: str(folder),
        models_dir=str(here.models_folder),
    )
    vars(modules["server"]).update(PromptServer=SimpleNamespace(instance=here))
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    before = set(sys.modules)
    yield here
    for name in set(sys.modules) - before:
        if "comfy_nodes" in name or name.startswith(str(REPOSITORY)):
            del sys.modules[name]


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Host]:
    """Make ``comfy_api.latest``, ``folder_paths`` and ``server`` importable for one test."""
    yield from _run(monkeypatch, tmp_path, fake_io(new=True))


@pytest.fixture
def old_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Host]:
    """The same of an older ComfyUI: no search aliases, no folded inputs."""
    assert "search_aliases" not in {one.name for one in fields(Schema)}
    yield from _run(monkeypatch, tmp_path, fake_io(new=False))


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


@dataclass
class Sampling:
    """A run of the tiny Flux that stands in for ComfyUI's.

    Attributes:
        cfg: Guidance scale.
        batch: Images at once.
        references: Number of reference latents.
        masked: The last text token is masked in every attention.
        size: Rows and columns of the latent.
        steps: Number of steps.
    """

    cfg: float = 1.0
    batch: int = 1
    references: int = 0
    masked: bool = False
    size: int = 48
    steps: int = 3

    def model(self) -> "FakeModelPatcher":
        """A model whose network has the name that tells where its tokens lie."""
        import torch
        from attn_dispatch.adapters.comfyui_fake import FakeFlux, FakeModelPatcher

        image = (self.size // 2) ** 2
        tokens = 5 + image * (1 + self.references)
        keep = torch.ones(1, 1, 1, tokens, dtype=torch.bool)
        keep[..., 4] = False
        extra = {"attention_mask": keep} if self.masked else {}

        class Flux(FakeFlux):
            def forward(self, *args: Any, **kwargs: Any) -> "Tensor":
                return super().forward(*args, **kwargs, **extra)

        return FakeModelPatcher(Flux())

    def run(self, model: "FakeModelPatcher") -> "Tensor":
        """Sample ``[B, 4, size, size]``."""
        import torch
        from attn_dispatch.adapters.comfyui_fake import FakeGuider

        random = torch.Generator().manual_seed(0)
        noise = torch.randn(self.batch, 4, self.size, self.size, generator=random)
        positive, negative = torch.randn(2, 1, 5, 8, generator=random).unbind()
        references = [torch.randn(1, 4, self.size, self.size, generator=random) for _ in range(self.references)]
        sigmas = torch.linspace(1.0, 0.0, self.steps + 1)
        with torch.inference_mode():
            return FakeGuider(model, self.cfg).sample(noise, sigmas, positive, negative, references or None)


@pytest.fixture
def sampling() -> type[Sampling]:
    """Make models and sample them without ComfyUI."""
    return Sampling


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def start_comfyui() -> Any:
    """The class ``RealHost``, which starts a real ComfyUI where COMFYUI_PATH names one."""
    if not Path(os.environ.get("COMFYUI_PATH", ""), "nodes.py").is_file():
        pytest.skip("COMFYUI_PATH names no ComfyUI checkout")
    return _load("real_host").RealHost


@pytest.fixture(scope="session")
def comfyui(start_comfyui: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One running ComfyUI for all tests, with this pack and one that makes tiny models."""
    packs = {"approximate-attention": REPOSITORY / "packages/comfy-nodes", "tiny": Path(__file__).parent / "tiny_pack"}
    host = start_comfyui(tmp_path_factory.mktemp("comfyui"), packs)
    yield host
    host.stop()
