"""Where checkpoints are, older files, and students that serve."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from attn_dispatch import AttentionCall
from torch import Tensor
from ttr_controller.legacy import LegacyController, write_legacy_controller
from ttr_controller.policy import PolicyConfig, RoutingPolicy
from ttr_distill.legacy import write_legacy_students


def _modules() -> Any:
    import comfy_nodes.nodes.controller as controller
    import comfy_nodes.nodes.distill as distill
    import comfy_nodes.nodes.distill_checkpoint as checkpoint

    return distill, controller, checkpoint


def _handler(model: Any) -> Any:
    from attn_dispatch.adapters.comfyui import installed

    return installed(model)["ttr"]


def test_names_of_checkpoints(host: Any, models: Path) -> None:
    place = _modules()[2].CheckpointPlace
    models.mkdir(parents=True)
    assert place.named("", "flux2_ttr.pt") == place(models / "flux2_ttr")
    assert place.named("new.name") == place(models / "new.name")
    (models / "old.pt").write_bytes(b"old")
    assert place.named("old.pt") == place(models / "old", models / "old.pt")
    before = place.named("old.pt").fingerprint()
    (models / "old").mkdir()
    (models / "old" / "LATEST").write_text("newer")
    assert place.named("old.pt") == place(models / "old"), "what was learned since goes before the old file"
    assert place.named("old.pt").fingerprint() != before
    (models / "folder.pt").mkdir()
    assert place.named("folder.pt") == place(models / "folder.pt")
    with pytest.raises(ValueError, match=r"leads out of"):
        place.named("../x")


def _old_file(studio: Any, model: Any, models: Path) -> Any:
    """Train hkr students, and save them as older versions did."""
    trainer = studio.run(_modules()[0].Flux2TTRTrainer, model=model, checkpoint_path="made", student="hkr")[0]
    studio.sample(trainer)
    session = _handler(trainer).session
    state = session.distiller.state_dict(include_replay=False)
    write_legacy_students(models / "old.pt", session.bank, session.readiness, state)
    return session


def test_an_old_file_serves_and_its_training_goes_on(fake_studio: Any, models: Path) -> None:
    distill, controller, _ = _modules()
    model = fake_studio.model()
    made = _old_file(fake_studio, model, models)
    served = fake_studio.run(
        distill.Flux2TTRTrainer, model=model, checkpoint_path="old.pt", training=False, readiness_threshold=9.9,
        readiness_min_updates=1,
    )[0]  # fmt: skip
    for name, weight in _handler(served).students.bank.state_dict().items():
        assert torch.equal(weight, made.bank.state_dict()[name])
    fake_studio.sample(served)
    assert _handler(served).report.counts()["student"] == 12
    trainer = fake_studio.run(distill.Flux2TTRTrainer, model=model, checkpoint_path="old.pt")[0]
    assert _handler(trainer).session.distiller.updates == made.distiller.updates
    assert (models / "old" / "LATEST").is_file()
    assert (models / "old.pt").is_file()
    policy = RoutingPolicy(3, PolicyConfig.legacy(), seed=0)
    write_legacy_controller(models / "controller.pt", LegacyController(policy, {}))
    routed = fake_studio.run(
        controller.Flux2TTRController, model=model, ttr_checkpoint_path="old.pt", readiness_threshold=9.9,
        controller_checkpoint_path="controller.pt",
    )[0]  # fmt: skip
    fake_studio.sample(routed)
    assert set(_handler(routed).report.counts()) == {"native", "student"}


def test_an_old_file_of_another_model_is_refused(fake_studio: Any, models: Path) -> None:
    distill = _modules()[0]
    model = fake_studio.model()
    _old_file(fake_studio, model, models)
    model.network.num_heads = 4
    with pytest.raises(ValueError, match=r"old.pt belongs to another model: it has 2 heads of width 16"):
        fake_studio.run(distill.Flux2TTRTrainer, model=model, checkpoint_path="old.pt")
    (models / "old.pt").write_bytes((models / "old.pt").read_bytes()[:-99])
    with pytest.raises(ValueError, match=r"old\.pt"):
        fake_studio.run(distill.Flux2TTRTrainer, model=fake_studio.model(), checkpoint_path="old.pt", training=False)


class Wide:
    name = "wide"

    def __init__(self) -> None:
        self.seen: list[AttentionCall] = []

    def refuses(self, call: AttentionCall) -> str | None:
        return None if call.layer is None else "named"

    def __call__(self, call: AttentionCall) -> Tensor:
        self.seen.append(call)
        return call.v + 0.0


def test_full_precision(host: Any) -> None:
    inner = Wide()
    backend = _modules()[2].FullPrecision(inner)
    q = torch.randn(1, 2, 3, 4).bfloat16()
    call = AttentionCall(q, q, q)
    assert torch.equal(backend(call), q)
    assert backend(call).dtype == torch.bfloat16
    assert inner.seen[0].q.dtype == inner.seen[0].k.dtype == inner.seen[0].v.dtype == torch.float32
    assert backend.name == "wide"
    assert backend.refuses(call) is None
    from attn_dispatch import LayerKey

    assert backend.refuses(replace(call, layer=LayerKey("single", 0))) == "named"


def test_comet_is_asked_for_only_where_it_is_wanted(host: Any, tmp_path: Path) -> None:
    from comfy_nodes.nodes.distill_sinks import sink_maker
    from comfy_nodes.nodes.training_config import TrainingParameters

    assert sink_maker(TrainingParameters(), "distill", tmp_path) is None
    for phase in ("distill", "controller"):
        make = sink_maker(TrainingParameters(comet_enabled=True), phase, tmp_path)
        assert make is not None


def test_a_metric_that_needs_the_prompt_is_refused(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy_nodes.nodes.controller_quality as quality
    from comfy_nodes.nodes.training_config import TrainingParameters

    assert not quality.needs_images(TrainingParameters())
    assert quality.needs_images(TrainingParameters(lpips_weight=0.1))
    objective = quality.quality_objective(TrainingParameters(rmse_weight=2.0, cosine_weight=0.0))
    teacher = torch.ones(1, 4, 2, 2)
    pictures = torch.zeros(1, 3, 2, 2)
    assert float(objective(2 * teacher, teacher, pictures, pictures).error) == pytest.approx(2.0)
    monkeypatch.setattr(quality.QualityObjective, "needs_prompts", True)
    with pytest.raises(ValueError, match=r"hps_weight judges by the text of the prompt"):
        quality.quality_objective(TrainingParameters())


def _call(tokens: int, layer: Any) -> AttentionCall:
    from attn_dispatch import TokenLayout
    from attn_kernels import TokenGrid

    edge = int((tokens - 5) ** 0.5)
    q = torch.empty(1, 2, tokens, 16, device="meta")
    return AttentionCall(q, q, q, layer=layer, layout=TokenLayout(tokens, ((0, 5),), (TokenGrid(5, edge, edge),)))


@pytest.mark.parametrize("student", ["hkr", "near_far"])
def test_students_are_kept_from_calls_that_they_would_slow_down(host: Any, student: str) -> None:
    from attn_dispatch import LayerKey
    from comfy_nodes.nodes.distill_gate import faster
    from ttr_distill import StudentBank, preset

    layer = LayerKey("single", 0)
    guard = faster(StudentBank.for_layers(preset(student), [layer], 2, 16))
    small = replace(_call(5 + 16**2, layer), q=torch.zeros(1, 2, 261, 16), k=torch.zeros(1, 2, 261, 16))
    assert guard(replace(small, v=small.k)) is not None
    assert guard(replace(small, v=small.k, layout=None)) == "the cost of this call is not known"
    large = 5 + 256**2 if student == "hkr" else 5 + 96**2
    q = torch.zeros(1, 1, 1, 1).expand(1, 2, large, 16)
    assert guard(replace(_call(large, layer), q=q, k=q, v=q)) is None


def test_the_gate_of_the_nodes(fake_studio: Any) -> None:
    distill = _modules()[0]
    model = fake_studio.model()
    exact = fake_studio.sample(model)
    given = {"model": model, "student": "hkr", "readiness_threshold": 9.9, "readiness_min_updates": 1}
    fake_studio.sample(fake_studio.run(distill.Flux2TTRTrainer, **given)[0])
    served = fake_studio.run(distill.Flux2TTRTrainer, training=False, only_where_faster=True, **given)[0]
    assert torch.equal(fake_studio.sample(served), exact)
    assert any("times as fast as exact attention" in reason for reason in _handler(served).report.declines())
