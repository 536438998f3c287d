"""Distilling in a host: what trains, what serves, and that an image is never lost."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

QUICK = {"readiness_min_updates": 2, "min_swap_layers": 64, "training_query_token_cap": 16}


def _nodes() -> Any:
    import comfy_nodes.nodes.distill

    return comfy_nodes.nodes.distill


def _train(studio: Any, model: Any, **values: Any) -> Any:
    return studio.run(_nodes().Flux2TTRTrainer, model=model, **{**QUICK, "training_preview_ttr": False, **values})[0]


def _serve(studio: Any, model: Any, **values: Any) -> Any:
    return studio.run(_nodes().Flux2TTRTrainer, model=model, training=False, **{**QUICK, **values})


def _handler(model: Any) -> Any:
    from attn_dispatch.adapters.comfyui import installed

    return installed(model)["ttr"]


def _error(output: Tensor, exact: Tensor) -> float:
    return float((output - exact).norm() / exact.norm())


def test_training_then_serving(studio: Any, models: Path) -> None:
    model = studio.model()
    exact = studio.sample(model)
    trainer = _train(studio, model, student="hkr")
    weights = {k: v.clone() for k, v in _handler(trainer).session.bank.state_dict().items()}
    assert torch.equal(studio.sample(trainer), exact), "a training image is the exact one"
    learned = _handler(trainer).session.bank.state_dict()
    assert any(not torch.equal(learned[name], value) for name, value in weights.items())
    assert (models / "flux2_ttr" / "LATEST").is_file()
    rows = [json.loads(line) for line in (models / "flux2_ttr" / "metrics.jsonl").read_text().splitlines()]
    assert {row["layer"] for row in rows} == {"single:0", "single:1", "single:2"}
    served, loss = _serve(studio, model, readiness_threshold=9.9)
    assert loss == pytest.approx(sum(row["loss"] for row in rows) / len(rows))
    approximate = studio.sample(served)
    counts = _handler(served).report.counts()
    assert counts["student"] == 12
    assert 0 < _error(approximate, exact) < 2
    assert torch.equal(studio.sample(model), exact), "the input model is as it was"
    some = _serve(studio, model, readiness_threshold=9.9, layer_start=1, layer_end=1)[0]
    studio.sample(some)
    assert _handler(some).report.counts()["student"] == 4


def test_an_older_host_names_no_blocks_and_its_students_learn_and_serve_all_the_same(fake_studio: Any) -> None:
    old, new = fake_studio.old_model(), fake_studio.model()
    exact = fake_studio.sample(old)
    for model in (old, new):
        trainer = _train(fake_studio, model, blocks="all")
        assert torch.equal(fake_studio.sample(trainer), exact)
        served, _ = _serve(fake_studio, model, readiness_threshold=9.9)
        fake_studio.sample(served)
        answered = {str(row.layer) for row in _handler(served).report.rows() if row.ran == "student"}
        assert answered == {"double:0", "double:1", "single:0", "single:1", "single:2"}


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"cfg": 2.0},
        {"batch": 2},
        {"cfg": 2.0, "batch": 2, "references": True},
        {"references": True, "masked": True},
    ],
    ids=["plain", "cfg", "batch", "all", "masks"],
)
def test_near_far_serves_close_to_exact(studio: Any, case: dict[str, Any]) -> None:
    model = studio.model()
    exact = studio.sample(model, **case)
    studio.sample(_train(studio, model, blocks="all"), **case)
    served, _ = _serve(studio, model)
    output = studio.sample(served, **case)
    handler = _handler(served)
    assert handler.report.counts()["student"] > 0
    assert _error(output, exact) < 0.1
    assert not {reason for reason in handler.report.declines() if "layout" in reason}


def test_two_samplings_on_one_patched_model(studio: Any) -> None:
    trainer = _train(studio, studio.model(), student="hkr")
    session = _handler(trainer).session
    studio.sample(trainer)
    first = session.distiller.updates
    studio.sample(trainer, seed=5)
    assert session.distiller.updates > first > 0


def test_a_list_of_prompts_trains_one_set_of_students(studio: Any, models: Path) -> None:
    """A host runs the trainer once for each prompt before it samples the first."""
    model = studio.model()
    trainers = [_train(studio, model, student="hkr") for _ in range(3)]
    for trainer in trainers:
        studio.sample(trainer)
    sessions = {id(_handler(trainer).session) for trainer in trainers}
    assert len(sessions) == 1
    from ttr_distill.checkpoint import load_checkpoint

    layers = load_checkpoint(models / "flux2_ttr").manifest["training"]["layers"]
    saved = sum(one["updates"] for one in layers.values())
    assert saved == _handler(trainers[0]).session.distiller.updates
    assert min(512 - _handler(trainer).left for trainer in trainers) > 0
    assert saved == sum(512 - _handler(trainer).left for trainer in trainers)


def test_a_newer_checkpoint_is_taken_over(studio: Any, models: Path) -> None:
    first, second = studio.model(), studio.model()
    trainer = _train(studio, first, student="hkr")
    studio.sample(trainer)
    done = _handler(trainer).session.distiller.updates
    studio.sample(_train(studio, second, student="hkr"))
    studio.sample(trainer)
    assert _handler(trainer).session.distiller.updates > 2 * done > 0


def test_steps_are_a_budget(studio: Any) -> None:
    trainer = _train(studio, studio.model(), student="hkr", steps=5)
    studio.sample(trainer)
    studio.sample(trainer)
    assert _handler(trainer).session.distiller.updates == 5
    assert "steps are used up" in "\n".join(_handler(trainer)._hints(0))


def test_stop_while_training(studio: Any, models: Path) -> None:
    trainer = _train(studio, studio.model(), student="hkr")
    pressed = 0.0

    def press(step: int) -> None:
        nonlocal pressed
        if step == 1:
            pressed = time.perf_counter()
            studio.press_stop()

    with pytest.raises(studio.stop):
        studio.sample(trainer, on_step=press)
    assert time.perf_counter() - pressed < 2.0
    done = _handler(trainer).session.distiller.updates
    assert done > 0
    again = _train(studio, studio.model(), student="hkr")
    assert _handler(again).session.distiller.updates == done, "what was learned is on disk"


def test_out_of_memory_in_a_student_falls_back(studio: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = studio.model()
    exact = studio.sample(model)
    studio.sample(_train(studio, model))
    served, _ = _serve(studio, model)
    from ttr_distill.student.near_far import NearFarStudent

    def exhausted(*_: Any, **__: Any) -> Tensor:
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(NearFarStudent, "forward", exhausted)
    assert torch.equal(studio.sample(served), exact)
    assert _handler(served).report.declines()["out of memory"] == 12


def test_out_of_memory_while_training_keeps_the_image(studio: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from ttr_distill.student.hkr import HkrStudent

    model = studio.model()
    exact = studio.sample(model)
    trainer = _train(studio, model, student="hkr")

    def exhausted(*_: Any, **__: Any) -> Tensor:
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(HkrStudent, "forward", exhausted)
    assert torch.equal(studio.sample(trainer), exact)


def test_an_error_while_training_is_shown_and_keeps_the_image(
    studio: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from ttr_distill.student.hkr import HkrStudent

    model = studio.model()
    exact = studio.sample(model)
    trainer = _train(studio, model, student="hkr")

    def broken(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("injected fault")

    monkeypatch.setattr(HkrStudent, "forward", broken)
    assert torch.equal(studio.sample(trainer), exact)
    assert "training stopped: injected fault" in _handler(trainer).session.summary()


def test_first_version_runs_on_the_same_students(studio: Any, models: Path) -> None:
    model = studio.model()
    node = _nodes().Flux2TTR
    assert node.define_schema().is_deprecated
    trainer, loss = studio.run(node, model=model, comet_enabled=False, **{"readiness_min_updates": 2})
    assert loss == 0.0
    studio.sample(trainer)
    _, loss = studio.run(node, model=model, comet_enabled=False, training=False, checkpoint_path="flux2_ttr.pt",
                         readiness_threshold=9.9, readiness_min_updates=1)  # fmt: skip
    assert loss != 0.0


def test_bad_days(studio: Any, models: Path, tmp_path: Path) -> None:
    model = studio.model()
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint at .*flux2_ttr; train one"):
        _serve(studio, model)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ValueError, match=r"checkpoints cannot be written to .*; choose another checkpoint_path"):
        _train(studio, model, checkpoint_path=str(blocked / "inside"))
    with pytest.raises(ValueError, match=r"does not name the blocks of NamelessFlux"):
        _train(studio, studio.nameless())
    with pytest.raises(ValueError, match=r"no block of Flux lies in the layers 7 to 9; it has"):
        _train(studio, model, layer_start=7, layer_end=9)
    studio.sample(_train(studio, model, student="hkr", readiness_min_updates=24))
    with pytest.raises(ValueError, match=r"no student of .*flux2_ttr is ready: .* is needed; train longer"):
        _serve(studio, model, readiness_min_updates=24)
    with pytest.raises(ValueError, match=r"belongs to another model"):
        _serve(studio, studio.model(seed=1))
    with pytest.raises(ValueError, match=r"holds 'hkr' students and the setting asks for 'near_far'"):
        _train(studio, model, student="near_far")
    weights = next((models / "flux2_ttr").glob("save-*/model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"is damaged"):
        _serve(studio, model)


def test_a_disk_that_refuses_costs_no_image(studio: Any, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ttr_distill.adapters.comfyui_session as session

    model = studio.model()
    exact = studio.sample(model)
    trainer = _train(studio, model, student="hkr")

    def full(*_: Any, **__: Any) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(session, "save_students", full)
    assert torch.equal(studio.sample(trainer), exact)
    assert "could not be saved to" in _handler(trainer).session.summary()
    monkeypatch.undo()


def test_paths_and_fingerprints(fake_studio: Any, models: Path) -> None:
    node = _nodes().Flux2TTRTrainer
    assert node.validate_inputs(checkpoint_path="flux2.pt") is True
    assert node.validate_inputs(checkpoint_path=None) is True
    assert "leads out of" in node.validate_inputs(checkpoint_path="../elsewhere")
    before = node.fingerprint_inputs(checkpoint_path="", controller_checkpoint_path="", steps=3)
    fake_studio.sample(_train(fake_studio, fake_studio.model()))
    after = node.fingerprint_inputs(checkpoint_path="", controller_checkpoint_path="", steps=3)
    assert before != after
    linked = node.fingerprint_inputs(checkpoint_path=None, controller_checkpoint_path="")
    assert linked != linked


def test_the_node_tells_what_it_learned(fake_studio: Any, host: Any) -> None:
    fake_studio.sample(_train(fake_studio, fake_studio.model(), readiness_threshold=0.12))
    texts = [text for text, node in host.shown if node == "7"]
    assert "0.12, the old default, is read as 0.005" in texts[0]
    assert "updates, " in texts[-1]
    assert "of 3 layers ready" in texts[-1]
