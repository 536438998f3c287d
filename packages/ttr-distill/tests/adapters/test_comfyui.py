"""Distilling behind ComfyUI's hooks, in the stand-in of the host; node packs test it in the real one."""

import copy
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch
from attn_dispatch.adapters.comfyui import install
from attn_dispatch.adapters.comfyui_fake import FakeFlux, FakeGuider, FakeModelPatcher
from attn_dispatch.adapters.comfyui_layout import LAYOUTS
from torch import Tensor
from ttr_distill import CaptureConfig, CheckpointError, DistillConfig, ReadinessConfig, preset
from ttr_distill.adapters.comfyui import DistillHandler, check_writable, open_session
from ttr_distill.adapters.comfyui_model import ComfyModel, describe_model
from ttr_distill.adapters.comfyui_session import (
    METRICS,
    SessionPlan,
    checkpoint_stamp,
    mean_loss,
    read_metrics,
    saved_student,
    with_layers,
)
from ttr_distill.training.reservation import training_bytes

CONFIG = DistillConfig(capture=CaptureConfig(query_cap=16), min_swap_layers=64)


class Flux(FakeFlux):
    def __init__(self) -> None:
        super().__init__()
        self.double_blocks, self.single_blocks = self.tiny.transformer_blocks, self.tiny.single_transformer_blocks
        self.num_heads, self.hidden_size = 2, 32

    def _name(self, options: dict[str, Any], kind: str, index: int) -> None:
        options["block_type"], options["block_index"] = kind, index


class Silent(Flux):
    """Older releases do not name their blocks."""

    def _name(self, options: dict[str, Any], kind: str, index: int) -> None:
        """Say nothing."""


def described(patcher: FakeModelPatcher) -> ComfyModel:
    return describe_model(SimpleNamespace(model=SimpleNamespace(diffusion_model=patcher.network)))


@pytest.fixture
def model() -> FakeModelPatcher:
    return FakeModelPatcher(Flux())


def plan(model: FakeModelPatcher, path: Path, **changes: Any) -> SessionPlan:
    teacher = described(model)
    given: dict[str, Any] = {
        "path": path, "model": teacher, "layers": teacher.range(), "student": preset("hkr"), "distill": CONFIG,
        "readiness": ReadinessConfig(9.0, 9.0, minimum_updates=1), **changes,
    }  # fmt: skip
    return SessionPlan(**given)


def sample(model: FakeModelPatcher, handler: Any = None, on_step: Any = None) -> Tensor:
    if handler is not None:
        model = install(model, handler, layouts=MappingProxyType({**LAYOUTS, "Silent": LAYOUTS["Flux"]}))
    random = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 4, 16, 16, generator=random)
    text = torch.randn(1, 5, 8, generator=random)
    with torch.inference_mode():
        return FakeGuider(model).sample(noise, torch.tensor([1.0, 0.7, 0.4, 0.0]), text, text, None, on_step)


def test_a_run_learns_saves_and_tells(model: FakeModelPatcher, tmp_path: Path) -> None:
    exact = sample(model)
    session = open_session(model, plan(model, tmp_path / "students"))
    before = copy.deepcopy(session.bank.state_dict())
    told: list[str] = []
    freed: list[int] = []
    assert torch.equal(sample(model, DistillHandler(session, 100, tell=told.append, reserve=freed.append)), exact)
    assert any(not torch.equal(value, before[name]) for name, value in session.bank.state_dict().items())
    assert saved_student(tmp_path / "students") == preset("hkr")
    assert told[0] == "1 updates, 0 of 3 layers ready", "while it goes on"
    assert told[-1].startswith(f"{session.distiller.updates} updates, 3 of 3 layers ready, loss ")
    assert session.loss == mean_loss(read_metrics(tmp_path / "students" / METRICS))
    assert freed == [training_bytes(session.bank, None, session.distiller.config.update)], (
        "once, before the run, when no call was seen yet"
    )
    sample(model, DistillHandler(session, 100, reserve=freed.append))
    assert freed[0] > freed[1] > 12 * sum(value.numel() for value in before.values()) / 3
    assert len(freed) == 2


def test_sessions_belong_to_the_model_and_change_with_their_plan(model: FakeModelPatcher, tmp_path: Path) -> None:
    first = open_session(model, plan(model, tmp_path / "a"))
    assert open_session(model, plan(model, tmp_path / "a")) is first
    assert open_session(model.clone(), plan(model, tmp_path / "a")) is first
    assert open_session(FakeModelPatcher(model.network), plan(model, tmp_path / "a")) is not first
    assert open_session(model, plan(model, tmp_path / "b")) is not first
    assert open_session(model, plan(model, tmp_path / "a", seed=1)) is not first


def test_resumed_training_has_learned_as_much(model: FakeModelPatcher, tmp_path: Path) -> None:
    first = open_session(model, plan(model, tmp_path))
    sample(model, DistillHandler(first, 100))
    again = open_session(FakeModelPatcher(model.network), plan(model, tmp_path))
    assert again.distiller.updates == first.distiller.updates > 0
    for name, value in first.bank.state_dict().items():
        assert torch.equal(value, again.bank.state_dict()[name])
    wider = described(model).range(streams="all")
    widened = open_session(model, plan(model, tmp_path, layers=wider))
    assert set(widened.bank.layers) == set(wider)
    assert with_layers(widened.bank, wider, seed=0) is widened.bank


def test_another_model_is_refused(model: FakeModelPatcher, tmp_path: Path) -> None:
    sample(model, DistillHandler(open_session(model, plan(model, tmp_path)), 100))
    mine = plan(model, tmp_path)
    stranger = replace(mine, model=replace(mine.model, fingerprint="other"))
    with pytest.raises(CheckpointError, match=r"another model: it was saved for .*, the model here is other"):
        open_session(model, stranger)


def test_an_interrupt_ends_the_run_and_loses_nothing(model: FakeModelPatcher, tmp_path: Path) -> None:
    session = open_session(model, plan(model, tmp_path))
    pressed = False

    def press(step: int) -> None:
        nonlocal pressed
        pressed = step == 1

    def check() -> None:
        if pressed:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(model, DistillHandler(session, 100, check=check), press)
    assert session.distiller.updates > 0
    assert open_session(FakeModelPatcher(model.network), plan(model, tmp_path)).distiller.updates == (
        session.distiller.updates
    )


def test_a_failing_begin_leaves_no_run_open(model: FakeModelPatcher, tmp_path: Path) -> None:
    session = open_session(model, plan(model, tmp_path))
    sample(model, DistillHandler(session, 100))
    stamp = checkpoint_stamp(tmp_path)
    (tmp_path / "LATEST").write_text("save-000001 torn")
    with pytest.raises(CheckpointError, match=r"LATEST is malformed"):
        sample(model, DistillHandler(session, 100))
    assert stamp is not None
    (tmp_path / "LATEST").write_bytes(stamp)
    before = session.distiller.updates
    sample(model, DistillHandler(session, 100))
    assert session.distiller.updates > before


def test_why_nothing_was_trained_is_told(tmp_path: Path) -> None:
    named, silent = FakeModelPatcher(Flux()), FakeModelPatcher(Silent())
    told: list[str] = []
    session = open_session(silent, plan(named, tmp_path / "a"))
    silent.network.named = False
    sample(silent, DistillHandler(session, 100, tell=told.append))
    assert "this ComfyUI does not name the blocks of the model" in told[-1]
    handler = DistillHandler(open_session(named, plan(named, tmp_path / "b")), 0, tell=told.append)
    sample(named, handler)
    assert "the steps are used up" in told[-1]
    assert copy.deepcopy(handler) is handler


def test_metrics_of_a_torn_file(tmp_path: Path) -> None:
    file = tmp_path / METRICS
    assert read_metrics(file) == []
    file.write_text('{"run": 1, "loss": 4.0}\n{"run": 2, "loss": 1.0}\n{"run": 2, "loss": 2.0}\n[1]\n{"run": 3, "lo')
    assert mean_loss(read_metrics(file)) == 1.5
    assert mean_loss([{"run": 1, "loss": None}]) is None


def test_an_unwritable_folder_is_said_before_the_run(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"checkpoints cannot be written to .*; choose another checkpoint_path"):
        check_writable(tmp_path / "file" / "folder")
