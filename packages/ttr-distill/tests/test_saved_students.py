import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from attn_dispatch import AttentionCall, LayerKey
from torch import Tensor
from ttr_distill.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from ttr_distill.saved_students import load_students, save_students
from ttr_distill.student.backend import StudentBackend
from ttr_distill.student.bank import StudentBank
from ttr_distill.student.feature_map_catalog import FeatureMaps, make_exp
from ttr_distill.student.presets import PRESETS, preset
from ttr_distill.student.readiness import ReadinessConfig, ReadinessTracker
from ttr_distill.training.capture import CaptureConfig
from ttr_distill.training.distiller import DistillConfig, Distiller

CallMaker = Callable[..., AttentionCall]
Native = Callable[[AttentionCall], Tensor]
LAYERS = tuple(LayerKey("single", index) for index in range(2))
CONFIG = DistillConfig(capture=CaptureConfig(query_cap=8, heldout_cap=8), min_swap_layers=2)


def trained(name: str, make_call: CallMaker, native: Native, runs: int = 2) -> Distiller:
    bank = StudentBank.for_layers(preset(name), LAYERS, 2, 16, seed=3)
    distiller = Distiller(bank, ReadinessTracker(ReadinessConfig(minimum_updates=1)), CONFIG, seed=5)
    more(distiller, make_call, native, 0, runs)
    return distiller


def more(distiller: Distiller, make_call: CallMaker, native: Native, first: int, last: int) -> None:
    with torch.inference_mode():
        for run in range(first, last):
            distiller.begin_run()
            for layer in LAYERS:
                distiller(make_call(run, layer=layer), native)
            distiller.end_run()
    distiller.raise_pending()


@pytest.mark.parametrize("name", PRESETS)
def test_saved_students_answer_alike_also_in_inference_mode(
    make_call: CallMaker, native: Native, tmp_path: Path, name: str
) -> None:
    distiller = trained(name, make_call, native)
    save_students(tmp_path, distiller.bank, distiller.readiness, fingerprint="teacher")
    with torch.inference_mode():
        saved = load_students(tmp_path, fingerprint="teacher", readiness=distiller.readiness.config)
    bank, readiness = saved.bank, saved.readiness
    assert saved.training is None
    assert saved.changed == ()
    assert bank.config == distiller.bank.config
    assert readiness.state_dict() == distiller.readiness.state_dict()
    assert not any(parameter.is_inference() for parameter in bank.parameters())
    for layer in LAYERS:
        call = make_call(50, layer=layer)
        assert torch.equal(StudentBackend(bank)(call), StudentBackend(distiller.bank)(call))


def test_training_goes_on_exactly_from_the_file(make_call: CallMaker, native: Native, tmp_path: Path) -> None:
    whole = trained("hkr", make_call, native, runs=4)
    half = trained("hkr", make_call, native, runs=2)
    save_students(tmp_path, half.bank, half.readiness, half, fingerprint="teacher")
    saved = load_students(tmp_path, fingerprint="teacher", readiness=half.readiness.config, training=True)
    assert saved.training is not None
    resumed = Distiller(saved.bank, saved.readiness, CONFIG)
    resumed.load_state_dict(saved.training)
    more(resumed, make_call, native, 2, 4)
    left, right = whole.bank.state_dict(), resumed.bank.state_dict()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert whole.readiness.state_dict() == resumed.readiness.state_dict()
    assert whole.state_dict().facts == resumed.state_dict().facts


def test_serving_reads_neither_optimiser_nor_replay(make_call: CallMaker, native: Native, tmp_path: Path) -> None:
    distiller = trained("near_far", make_call, native)
    folder = save_students(tmp_path, distiller.bank, distiller.readiness, distiller, fingerprint="teacher")
    assert {file.stem for file in folder.glob("*.safetensors")} == {"model", "optim", "replay"}
    (folder / "optim.safetensors").unlink()
    (folder / "replay.safetensors").unlink()
    assert load_students(tmp_path, fingerprint="teacher").training is None
    with pytest.raises(CheckpointError, match=r"optim.safetensors cannot be read"):
        load_students(tmp_path, fingerprint="teacher", training=True)


def test_the_replay_can_be_left_out(make_call: CallMaker, native: Native, tmp_path: Path) -> None:
    distiller = trained("near_far", make_call, native)
    save_students(tmp_path, distiller.bank, distiller.readiness, distiller, fingerprint="teacher", include_replay=False)
    saved = load_students(tmp_path, fingerprint="teacher", training=True)
    assert saved.training is not None
    resumed = Distiller(saved.bank, saved.readiness, CONFIG)
    resumed.load_state_dict(saved.training)
    assert resumed.updates == distiller.updates
    assert resumed.replay.nbytes == 0


def test_readiness_is_judged_by_the_thresholds_at_loading(make_call: CallMaker, native: Native, tmp_path: Path) -> None:
    distiller = trained("near_far", make_call, native)
    save_students(tmp_path, distiller.bank, distiller.readiness, fingerprint="teacher")
    for threshold, ready in ((1.0, True), (1e-9, False)):
        config = ReadinessConfig(threshold, 1.0, minimum_updates=1)
        assert load_students(tmp_path, fingerprint=None, readiness=config).readiness.ready(LAYERS[0]) is ready


def test_another_teacher_is_refused(make_call: CallMaker, native: Native, tmp_path: Path) -> None:
    distiller = trained("near_far", make_call, native)
    save_students(tmp_path, distiller.bank, distiller.readiness, fingerprint="klein")
    with pytest.raises(CheckpointError, match="saved for klein, the model here is dev"):
        load_students(tmp_path, fingerprint="dev")


def test_what_does_not_fit_is_one_clear_line(make_call: CallMaker, native: Native, tmp_path: Path) -> None:
    distiller = trained("near_far", make_call, native)
    save_students(tmp_path / "good", distiller.bank, distiller.readiness, fingerprint="t")
    tensors, facts = load_checkpoint(tmp_path / "good")
    name = "students.single:0.bias"
    cases = (
        (
            tensors | {"students.single:0.colour": torch.zeros(1)},
            facts,
            "has unknown entries: students.single:0.colour",
        ),
        ({key: value for key, value in tensors.items() if key != name}, facts, f"lacks entries: {name}"),
        (tensors | {name: torch.zeros(5)}, facts, r"bias has shape \(5,\), its settings need \(2,\)"),
        (tensors, facts | {"colour": 1}, "has unknown entries: colour"),
        (tensors, {key: value for key, value in facts.items() if key != "heads"}, "lacks entries: heads"),
        (tensors, facts | {"kind": "controller"}, "holds 'controller', not students"),
        (tensors, facts | {"student": {"preset": "near"}}, "student must be one of"),
        (tensors, facts | {"layers": ["single"]}, "a layer key looks like"),
        (tensors, facts | {"readiness": {"single:0": {}}}, "does not have the known fields"),
        (tensors, facts | {"readiness": []}, "expected an object"),
    )
    for index, (broken, manifest, message) in enumerate(cases):
        save_checkpoint(tmp_path / str(index), broken, manifest)
        with pytest.raises(CheckpointError, match=message) as error:
            load_students(tmp_path / str(index), fingerprint=None, training=True)
        assert "\n" not in str(error.value)


def test_a_student_that_answers_nan_can_be_saved(tmp_path: Path) -> None:
    readiness = ReadinessTracker(ReadinessConfig(minimum_updates=0))
    readiness.observe(LAYERS[0], math.nan, math.inf)
    readiness.flush()
    bank = StudentBank.for_layers(preset("near_far"), LAYERS, 2, 16)
    save_students(tmp_path, bank, readiness, fingerprint="t")
    loaded = load_students(tmp_path, fingerprint="t").readiness
    assert math.isnan(loaded[LAYERS[0]].ema_cosine or 0.0)
    assert not loaded.ready(LAYERS[0])


def test_what_the_caller_sets_wins_and_the_file_supplies_what_is_learned(
    make_call: CallMaker, native: Native, tmp_path: Path
) -> None:
    distiller = trained("hkr", make_call, native)
    save_students(tmp_path, distiller.bank, distiller.readiness, distiller, fingerprint="t")
    wanted = preset("hkr", landmark_fraction=0.5, landmark_minimum=1, alpha_max=0.4)
    saved = load_students(tmp_path, fingerprint="t", config=wanted, training=True)
    assert saved.bank.config == wanted
    assert {sentence.split(" is ")[0] for sentence in saved.changed} == {
        "landmark_fraction",
        "landmark_minimum",
        "alpha_max",
    }
    left, right = saved.bank.state_dict(), distiller.bank.state_dict()
    assert all(torch.equal(left[name], right[name]) for name in right)
    call = make_call(50, layer=LAYERS[0], rows=12, columns=12)
    assert not torch.equal(StudentBackend(saved.bank)(call), StudentBackend(distiller.bank)(call))
    resumed = Distiller(saved.bank, saved.readiness, CONFIG)
    assert saved.training is not None
    resumed.load_state_dict(saved.training)
    assert resumed.updates == distiller.updates > 0
    more(resumed, make_call, native, 2, 3)


def test_a_setting_that_changes_answers_makes_every_layer_unready(
    make_call: CallMaker, native: Native, tmp_path: Path
) -> None:
    distiller = trained("near_far", make_call, native)
    save_students(tmp_path, distiller.bank, distiller.readiness, distiller, fingerprint="t")
    lenient = ReadinessConfig(1.0, 1.0, minimum_updates=1)
    for overrides, ready in (({}, True), ({"top_k": 2}, False)):
        saved = load_students(
            tmp_path, fingerprint="t", config=preset("near_far", **overrides), readiness=lenient, training=True
        )
        assert saved.readiness.ready(LAYERS[0]) is ready
        assert saved.training is not None
        assert (saved.training.facts["replay"] is not None) is ready
        resumed = Distiller(saved.bank, saved.readiness, CONFIG)
        resumed.load_state_dict(saved.training)
        more(resumed, make_call, native, 2, 3)
        assert resumed.readiness[LAYERS[0]].updates > 0


def test_a_setting_that_only_changes_how_answers_are_computed_keeps_readiness(
    make_call: CallMaker, native: Native, tmp_path: Path
) -> None:
    distiller = trained("hkr", make_call, native)
    save_students(tmp_path, distiller.bank, distiller.readiness, fingerprint="t")
    saved = load_students(tmp_path, fingerprint="t", config=preset("hkr", workspace_bytes=2**20))
    assert saved.changed == (f"workspace_bytes is {2**20}, the checkpoint was saved with {512 * 2**20}",)
    assert saved.readiness[LAYERS[0]].updates == distiller.readiness[LAYERS[0]].updates


def test_a_setting_that_cannot_apply_is_named(make_call: CallMaker, native: Native, tmp_path: Path) -> None:
    distiller = trained("hkr", make_call, native)
    save_students(tmp_path, distiller.bank, distiller.readiness, fingerprint="t")
    with pytest.raises(CheckpointError) as error:
        load_students(tmp_path, fingerprint="t", config=preset("hkr", feature_dim=512, gamma=1.0))
    assert "feature_dim is 512, the checkpoint was saved with 256" in str(error.value)
    assert "gamma" not in str(error.value)
    with pytest.raises(CheckpointError, match="split_qk is False, the checkpoint was saved with True"):
        load_students(tmp_path, fingerprint="t", config=preset("hkr", split_qk=False))
    with pytest.raises(CheckpointError, match="holds 'hkr' students and the setting asks for 'near_far'"):
        load_students(tmp_path, fingerprint="t", config=preset("near_far"))


def test_students_with_a_custom_feature_map_are_loaded_with_it(make_call: CallMaker, tmp_path: Path) -> None:
    maps = FeatureMaps().with_map("mine", make_exp)
    config = preset("local-kernel", feature_map="mine")
    bank = StudentBank.for_layers(config, LAYERS, 2, 16, seed=3, feature_maps=maps)
    save_students(tmp_path, bank, ReadinessTracker(), fingerprint="t")
    call = make_call(50, layer=LAYERS[0])
    found = load_students(tmp_path, fingerprint="t", config=config, feature_maps=maps)
    assert torch.equal(found.bank[LAYERS[0]](call), bank[LAYERS[0]](call))
    with pytest.raises(CheckpointError, match=r"got 'mine'; add it with FeatureMaps.with_map"):
        load_students(tmp_path, fingerprint="t")
