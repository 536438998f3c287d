"""Training a controller in a host, and sampling with it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

NAMES = ("controller", "controller_files", "controller_runs", "controller_training", "distill", "training_config")


def _nodes() -> Any:
    from importlib import import_module

    return SimpleNamespace(**{name: import_module(f"comfy_nodes.nodes.{name}") for name in NAMES})


def _trained(studio: Any, model: Any, **values: Any) -> Any:
    """A model with ready near-far students in all layers."""
    trainer = studio.run(
        _nodes().distill.Flux2TTRTrainer,
        model=model,
        blocks="all",
        readiness_min_updates=2,
        min_swap_layers=64,
        training_preview_ttr=False,
        **values,
    )[0]
    studio.sample(trainer)
    return trainer


def _learn(studio: Any, model: Any, trainer: Any, **values: Any) -> Any:
    nodes = _nodes()
    config = studio.run(nodes.training_config.Flux2TTRTrainingParameters, **values.pop("config", {}))[0]
    latent = studio.latent(values.pop("batch", 1))
    given = {"steps": 2, "training_iterations": 2, "rollouts": 2, "seed": 3, **values}
    return studio.run(
        nodes.controller_training.Flux2TTRControllerTrainer,
        model_original=model,
        model_ttr=trainer,
        positive=studio.prompt(2),
        negative=studio.prompt(3),
        latent=latent,
        vae=studio.vae,
        training_config=config,
        **given,
    )


def _handler(model: Any) -> Any:
    from attn_dispatch.adapters.comfyui import installed

    return installed(model)["ttr"]


def test_two_iterations_and_use(studio: Any, models: Path) -> None:
    nodes, model = _nodes(), studio.model()
    exact = studio.sample(model)
    trainer = _trained(studio, model)
    original, patched, controller = _learn(studio, model, trainer, sampler_name="euler")
    assert original.shape == patched.shape
    assert original.shape[0] == 1
    assert original.shape[-1] == 3
    assert 0 <= float(original.min()) <= float(original.max()) <= 1
    assert (models / "flux2_ttr_controller" / "LATEST").is_file()
    assert len((models / "flux2_ttr_controller" / "metrics.jsonl").read_text().splitlines()) == 2
    node = nodes.controller.Flux2TTRController
    given = {"model": model, "ttr_checkpoint_path": "flux2_ttr.pt", "quality_speed": 0.5}
    by_file = studio.run(node, controller_checkpoint_path="flux2_ttr_controller.pt", policy_mode="threshold", **given)[
        0
    ]
    by_link = studio.run(node, controller=controller, policy_mode="threshold", **given)[0]
    first = studio.sample(by_file)
    assert torch.equal(first, studio.sample(by_link)), "file and link are the same controller"
    assert not torch.equal(first, exact)
    report = _handler(by_file).report
    assert report.counts()["student"] > 0
    assert report.declines()["the policy chose full attention"] > 0
    assert torch.equal(studio.sample(model), exact), "the input model is as it was"


def test_progress_and_previews(fake_studio: Any) -> None:
    model = fake_studio.model()
    _learn(fake_studio, model, _trained(fake_studio, model))
    bar = fake_studio.bars[-1]
    assert bar.values == sorted(bar.values)
    assert max(bar.values) == bar.total
    assert len(bar.previews) >= 2
    kind, picture, _ = bar.previews[0]
    assert kind == "JPEG"
    assert picture.size == (2 * fake_studio.size, fake_studio.size), "teacher and student side by side"


def test_stop_keeps_the_training_and_it_goes_on(studio: Any, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = studio.model()
    trainer = _trained(studio, model)
    runs = _nodes().controller_runs
    step, seen = runs.ControllerTrainer.step, []

    def stop_after_two(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(seen) == 2:
            studio.press_stop()
        seen.append(1)
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(runs.ControllerTrainer, "step", stop_after_two)
        with pytest.raises(studio.stop):
            _learn(studio, model, trainer, training_iterations=6)
    found = _nodes().controller_files.CheckpointPlace(models / "flux2_ttr_controller")
    fingerprint = _handler(trainer).session.plan.model.fingerprint
    assert _nodes().controller_files.load_training(found, fingerprint)["manifest"]["updates"] == 2
    _learn(studio, model, trainer, training_iterations=1)
    assert _nodes().controller_files.load_training(found, fingerprint)["manifest"]["updates"] == 3


def test_one_mask_for_a_whole_image(fake_studio: Any) -> None:
    model = fake_studio.model()
    trainer = _trained(fake_studio, model)
    nodes = _nodes()
    made = []
    start = nodes.controller_runs._Work.start

    def keep(self: Any, eligible: Tensor) -> None:
        start(self, eligible)
        made.append(self.trainer)

    nodes.controller_runs._Work.start = keep
    _learn(fake_studio, model, trainer, sigma_aware_training=False, steps=3)
    assert len(made[0].contexts) == 1
    nodes.controller_runs._Work.start = start


def test_the_same_seed_makes_the_same_image(fake_studio: Any) -> None:
    nodes, model = _nodes(), fake_studio.model()
    _trained(fake_studio, model)
    from ttr_controller.policy import RoutingPolicy

    trainer = fake_studio.run(nodes.distill.Flux2TTRTrainer, model=model, blocks="all")[0]
    layers = _handler(trainer).session.plan.layers
    controller = nodes.controller_files.TrainedController(RoutingPolicy(5, seed=0), layers, None, "here")
    node = nodes.controller.Flux2TTRController
    given = {"model": model, "ttr_checkpoint_path": "flux2_ttr.pt", "controller": controller}
    drawn = [fake_studio.run(node, policy_seed=seed, **given)[0] for seed in (1, 1, 2)]
    images = [fake_studio.sample(one) for one in drawn]
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[0], fake_studio.sample(drawn[0])), "a second sampling draws the same"
    assert not torch.equal(images[0], images[2])


def test_bad_days(fake_studio: Any, models: Path, tmp_path: Path) -> None:
    nodes, model = _nodes(), fake_studio.model()
    node = nodes.controller.Flux2TTRController
    with pytest.raises(ValueError, match=r"the checkpoint path is empty"):
        fake_studio.run(node, model=model)
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint at .*students; train one"):
        fake_studio.run(node, model=model, ttr_checkpoint_path="students")
    with pytest.raises(ValueError, match=r"model_ttr has no students; link the model output of Flux2TTRTrainer"):
        _learn(fake_studio, model, model)
    fresh = fake_studio.run(nodes.distill.Flux2TTRTrainer, model=model, checkpoint_path="fresh")[0]
    with pytest.raises(ValueError, match=r"no student of .*fresh is ready: none was measured"):
        _learn(fake_studio, model, fresh)
    trainer = _trained(fake_studio, model)
    with pytest.raises(ValueError, match=r"the sampler has no steps: 2 steps at denoise 0.3; raise steps or denoise"):
        _learn(fake_studio, model, trainer, denoise=0.3)
    with pytest.raises(FileNotFoundError, match=r"there is no controller at .*nowhere; train one"):
        fake_studio.run(node, model=model, ttr_checkpoint_path="flux2_ttr.pt", controller_checkpoint_path="nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"checkpoints cannot be written to"):
        _learn(fake_studio, model, trainer, checkpoint_path=str(tmp_path / "file" / "inside"))
    with pytest.raises(ValueError, match=r"at least one quality weight must be positive"):
        _learn(fake_studio, model, trainer, config={"rmse_weight": 0.0, "cosine_weight": 0.0})
    _learn(fake_studio, model, trainer)
    other = fake_studio.model(seed=1)
    _trained(fake_studio, other, checkpoint_path="other")
    with pytest.raises(ValueError, match=r"controller .*flux2_ttr_controller belongs to another model"):
        fake_studio.run(
            node, model=other, ttr_checkpoint_path="other", controller_checkpoint_path="flux2_ttr_controller"
        )
    weights = next((models / "flux2_ttr_controller").glob("save-*/*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"is damaged"):
        fake_studio.run(
            node, model=model, ttr_checkpoint_path="flux2_ttr", controller_checkpoint_path="flux2_ttr_controller"
        )
    with pytest.raises(ValueError, match=r"holds 'students', not a controller"):
        fake_studio.run(node, model=model, ttr_checkpoint_path="flux2_ttr", controller_checkpoint_path="flux2_ttr")


def test_fingerprints_follow_the_files(fake_studio: Any) -> None:
    model = fake_studio.model()
    node = _nodes().controller.Flux2TTRController
    given = {"ttr_checkpoint_path": "flux2_ttr.pt", "controller_checkpoint_path": "", "quality_speed": 0.5}
    before = node.fingerprint_inputs(**given)
    _trained(fake_studio, model)
    assert node.fingerprint_inputs(**given) != before
    assert "leads out of" in node.validate_inputs(ttr_checkpoint_path="../x", controller_checkpoint_path="")
    assert node.validate_inputs(ttr_checkpoint_path="", controller_checkpoint_path=None) is True
