"""Studios in which nodes train and sample: the stand-in always, a real ComfyUI where COMFYUI_PATH names one."""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Protocol

import pytest
import torch
from attn_dispatch.adapters.comfyui_fake import FakeFlux, FakeGuider, FakeModelPatcher, copy_options
from torch import Tensor

Conditioning = list[list[Any]]


class Interrupted(Exception):
    """The stop button of the stand-in; in older releases of the host it is an ordinary exception too."""


class OldFlux(FakeFlux):
    """The stand-in's network with the names that tell ComfyUI's Flux family, as older releases have it.

    They do not name blocks, but let a node replace them.
    """

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__(seed=seed, named=False)
        self.double_blocks, self.single_blocks = self.tiny.transformer_blocks, self.tiny.single_transformer_blocks
        attention = self.tiny.transformer_blocks[0].attn
        self.num_heads, self.hidden_size = attention.heads, attention.heads * attention.head_dim


OldFlux.__name__ = "Flux"


class Flux(OldFlux):
    """As newer releases have it."""

    def _name(self, options: dict[str, Any], kind: str, index: int) -> None:
        options["block_type"] = kind
        options["block_index"] = index


class NamelessFlux(torch.nn.Module):
    """Has blocks, does not name them, and nobody can."""

    def __init__(self) -> None:
        super().__init__()
        self.double_blocks, self.single_blocks = torch.nn.ModuleList(), torch.nn.ModuleList()
        self.num_heads, self.hidden_size = 2, 32


class Patcher(FakeModelPatcher):
    """The stand-in's patcher with the attributes that nodes read."""

    load_device = torch.device("cpu")

    @property
    def model(self) -> Any:
        return SimpleNamespace(diffusion_model=self.network)

    def clone(self) -> "Patcher":
        other = Patcher(self.network)
        other.model_options = copy_options(self.model_options)
        other.wrappers = copy_options(self.wrappers)
        return other


@dataclass
class Bar:
    """A progress bar that remembers."""

    total: int
    values: list[int] = field(default_factory=list)
    previews: list[Any] = field(default_factory=list)

    def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
        self.total = total or self.total
        self.values.append(value)
        if preview is not None:
            self.previews.append(preview)


class Studio(Protocol):
    """What the tests need of a host."""

    name: str
    bars: list[Any]
    stop: type[BaseException]

    def model(self, seed: int = 0) -> Any: ...

    def nameless(self) -> Any: ...

    def run(self, node: Any, **values: Any) -> Any: ...

    def prompt(self, seed: int = 2, *, references: bool = False) -> Conditioning: ...

    def latent(self, batch: int = 1, *, masked: bool = False) -> dict[str, Any]: ...

    def sample(self, model: Any, *, on_step: Callable[[int], None] | None = None, **settings: Any) -> Tensor: ...

    def press_stop(self) -> None: ...

    @property
    def vae(self) -> Any: ...


def _randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Vae:
    """Turns four channels into colours."""

    def decode(self, samples: Tensor) -> Tensor:
        return torch.sigmoid(samples[:, :3]).movedim(1, -1)


class _Shared:
    """What both studios do alike."""

    bars: list[Any]

    def run(self, node: Any, **values: Any) -> Any:
        """Run a node as the host does: defaults of required widgets, in inference mode; returns its results."""
        for one in node.define_schema().inputs:
            default = getattr(one, "default", None)
            if default is not None and not one.optional:
                values.setdefault(one.id, default)
        with torch.inference_mode():
            return self._call(node, values)

    def sample(self, model: Any, *, on_step: Callable[[int], None] | None = None, **settings: Any) -> Tensor:
        """Sample four steps, or as ``settings`` say: cfg, batch, references, masked, seed, steps."""
        import comfy.sample

        latent = self.latent(settings.get("batch", 1), masked=settings.get("masked", False))
        noise = _randn(settings.get("seed", 1), *latent["samples"].shape)
        references = settings.get("references", False)

        def callback(step: int, *_: Any) -> None:
            if on_step is not None:
                on_step(step)

        with torch.inference_mode():
            out: Tensor = comfy.sample.sample(
                model, noise, settings.get("steps", 4), settings.get("cfg", 1.0), "euler", "simple",
                self.prompt(2, references=references), self.prompt(3, references=references), latent["samples"],
                noise_mask=latent.get("noise_mask"), callback=callback, disable_pbar=True, seed=0,
            )  # fmt: skip
        return out.clone()


class FakeStudio(_Shared):
    """ComfyUI's samplers, services and progress bars, in so far as nodes touch them."""

    name = "fake"
    stop = Interrupted
    size = 32

    def __init__(self) -> None:
        self.bars = []
        self.interrupted = False
        self.vae = Vae()

    def modules(self) -> dict[str, ModuleType]:
        names = ("comfy", "comfy.model_management", "comfy.utils", "comfy.samplers", "comfy.sample")
        modules = {name: ModuleType(name) for name in names}
        vars(modules["comfy.model_management"]).update(
            throw_exception_if_processing_interrupted=self.check, current_loaded_models=[], free_memory=lambda *_: None
        )
        vars(modules["comfy.utils"]).update(ProgressBar=self.bar)
        vars(modules["comfy.samplers"]).update(KSampler=SimpleNamespace(SAMPLERS=["euler"], SCHEDULERS=["normal"]))
        vars(modules["comfy.sample"]).update(
            fix_empty_latent_channels=lambda model, latent: latent,
            prepare_noise=lambda latent, seed, inds=None: _randn(seed % 2**31, *latent.shape),
            sample=self.comfy_sample,
        )
        for name in names[1:]:
            setattr(modules["comfy"], name.partition(".")[2], modules[name])
        return modules

    def check(self) -> None:
        if self.interrupted:
            self.interrupted = False
            raise Interrupted

    def bar(self, total: int) -> Bar:
        self.bars.append(Bar(total))
        return self.bars[-1]

    def comfy_sample(
        self, model: Any, noise: Tensor, steps: int, cfg: float, sampler: str, scheduler: str, positive: Conditioning,
        negative: Conditioning, latent: Tensor, *, denoise: float = 1.0, noise_mask: Tensor | None = None,
        callback: Any = None, disable_pbar: bool = False, seed: int | None = None,
    ) -> Tensor:  # fmt: skip
        sigmas = torch.linspace(1.0, 0.0, steps + 1)

        def after(step: int) -> None:
            callback(step, latent, latent, steps)
            self.check()

        return FakeGuider(model, cfg).sample(
            noise, sigmas, positive[0][0], negative[0][0], positive[0][1].get("reference_latents"), after
        )

    def model(self, seed: int = 0) -> Any:
        return Patcher(Flux(seed=seed))

    def old_model(self) -> Any:
        return Patcher(OldFlux())

    def nameless(self) -> Any:
        return Patcher(NamelessFlux())

    def prompt(self, seed: int = 2, *, references: bool = False) -> Conditioning:
        extra = {"reference_latents": [_randn(4, 1, 4, 24, 20)]} if references else {}
        return [[_randn(seed, 1, 5, 8), extra]]

    def latent(self, batch: int = 1, *, masked: bool = False) -> dict[str, Any]:
        return {"samples": torch.zeros(batch, 4, self.size, self.size)}

    def press_stop(self) -> None:
        self.interrupted = True

    def _call(self, node: Any, values: dict[str, Any]) -> Any:
        return node.execute(**values)


class RealStudio(_Shared):
    """A ComfyUI checkout with a tiny random Flux2."""

    name = "comfyui"
    size = 16

    def __init__(self) -> None:
        import comfy.model_management
        import comfy.utils

        self.management = comfy.model_management
        self.stop = comfy.model_management.InterruptProcessingException
        self.bars = []
        self.vae = Vae()
        spec = importlib.util.spec_from_file_location("tiny_pack", Path(__file__).parents[1] / "tiny_pack/__init__.py")
        assert spec is not None
        assert spec.loader is not None
        self.pack: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.pack)

    def model(self, seed: int = 0) -> Any:
        with torch.inference_mode():
            return self.pack._patcher("flux2", seed, 1, 3)

    def nameless(self) -> Any:
        model = self.model().clone()
        return SimpleNamespace(model=SimpleNamespace(diffusion_model=NamelessFlux()), load_device=model.load_device)

    def prompt(self, seed: int = 2, *, references: bool = False) -> Conditioning:
        extra: dict[str, Any] = {"guidance": 3.5, "pooled_output": _randn(seed + 10, 1, 64)}
        if references:
            extra["reference_latents"] = [_randn(4, 1, 128, 6, 8)]
        return [[_randn(seed, 1, 12, 64), extra]]

    def latent(self, batch: int = 1, *, masked: bool = False) -> dict[str, Any]:
        made = {"samples": torch.zeros(batch, 128, self.size, self.size)}
        if masked:
            made["noise_mask"] = (_randn(9, 1, 1, self.size, self.size) > 0).float()
        return made

    def press_stop(self) -> None:
        self.management.interrupt_current_processing()

    def _call(self, node: Any, values: dict[str, Any]) -> Any:
        return node.PREPARE_CLASS_CLONE(None).EXECUTE_NORMALIZED(**values).args


def _forget_pack() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "comfy_nodes"]:
        del sys.modules[name]


def _fake(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeStudio:
    _forget_pack()
    request.getfixturevalue("host")
    studio = FakeStudio()
    for name, module in studio.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    return studio


def _real(monkeypatch: pytest.MonkeyPatch, folder: Path) -> RealStudio:
    checkout = os.environ.get("COMFYUI_PATH", "")
    if not Path(checkout, "nodes.py").is_file():
        pytest.skip("COMFYUI_PATH names no ComfyUI checkout")
    if checkout not in sys.path:
        sys.path.insert(0, checkout)
    _forget_pack()
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    comfy.cli_args.args.use_pytorch_cross_attention = True
    import comfy.supported_models
    import folder_paths

    if not hasattr(comfy.supported_models, "Flux2"):
        pytest.skip("this ComfyUI has no Flux2")
    monkeypatch.setattr(folder_paths, "models_dir", str(folder / "models"))
    return RealStudio()


@pytest.fixture(params=["fake", pytest.param("comfyui", marks=pytest.mark.comfyui)])
def studio(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Studio]:
    """A host with a tiny Flux; nodes are imported within it."""
    if request.param == "fake":
        yield _fake(request, monkeypatch)
    else:
        yield _real(monkeypatch, tmp_path)
    _forget_pack()


@pytest.fixture
def fake_studio(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeStudio]:
    """The stand-in alone."""
    yield _fake(request, monkeypatch)
    _forget_pack()


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Where checkpoints are."""
    return tmp_path / "models" / "approximate_attention"
