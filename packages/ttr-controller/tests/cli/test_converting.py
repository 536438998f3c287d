import pytest
import torch
from attn_dispatch.call import LayerKey, StepContext
from ttr_controller.cli import main
from ttr_controller.legacy import LegacyController, read_legacy_controller, write_legacy_controller
from ttr_controller.policy import PolicyConfig, RoutingPolicy
from ttr_controller.saved_policy import load_policy, read_state
from ttr_distill.legacy import read_legacy_students, write_legacy_students
from ttr_distill.saved_students import load_students, save_students
from ttr_distill.student.bank import StudentBank
from ttr_distill.student.presets import preset
from ttr_distill.student.readiness import ReadinessTracker
from ttr_distill.training.distiller import Distiller

LAYERS = (LayerKey("single", 0), LayerKey("single", 1))


def bank(name="hkr"):
    return StudentBank.for_layers(preset(name), LAYERS, 2, 16, seed=2)


def measured():
    readiness = ReadinessTracker()
    for layer in LAYERS:
        readiness.observe(layer, 0.002, 0.05)
    readiness.flush()
    return readiness


def run(*words):
    with pytest.raises(SystemExit) as end:
        main(["convert", *map(str, words)])
    return end.value.code


def test_there_and_back_again(tmp_path, capsys):
    students, readiness = bank(), measured()
    file = write_legacy_students(tmp_path / "a.pt", students, readiness, fingerprint="klein")
    assert run(file, tmp_path / "folder") == 0
    assert "2 layers of 2 heads of width 16" in capsys.readouterr().out
    saved = load_students(tmp_path / "folder", fingerprint="klein", training=True)
    Distiller(saved.bank, saved.readiness).load_state_dict(saved.training)
    assert run(tmp_path / "folder", tmp_path / "b.pt") == 0
    found = read_legacy_students(tmp_path / "b.pt", fingerprint="klein")
    left, right = found.bank.state_dict(), students.state_dict()
    assert all(torch.equal(left[name], right[name]) for name in right)
    assert found.readiness.state_dict() == readiness.state_dict()


def test_a_controller_there_and_back_again(tmp_path, capsys):
    policy = RoutingPolicy(3, PolicyConfig.legacy(8, 16), seed=4)
    file = write_legacy_controller(tmp_path / "a.pt", LegacyController(policy, {}, -0.5, 12, fingerprint="klein"))
    assert run(file, tmp_path / "folder") == 0
    assert "controller: 3 layers" in capsys.readouterr().out
    saved = load_policy(tmp_path / "folder", fingerprint="klein")
    assert saved.layers == tuple(LayerKey("single", index) for index in range(3))
    assert saved.updates == 12
    assert read_state(tmp_path / "folder")["manifest"]["baseline"] == [-0.5, 12.0]
    assert run(tmp_path / "folder", tmp_path / "b.pt") == 0
    again = read_legacy_controller(tmp_path / "b.pt", fingerprint="klein").policy
    step = StepContext(0.5, 3.0, (64, 64))
    assert torch.equal(saved.policy(step), policy(step))
    assert torch.equal(again(step), policy(step))


def test_a_file_without_a_model_needs_one_by_name(tmp_path, capsys):
    file = write_legacy_students(tmp_path / "a.pt", bank(), measured())
    assert run(file, tmp_path / "folder") == 1
    assert "name the model's fingerprint with --model" in capsys.readouterr().err
    assert not (tmp_path / "folder").exists()
    assert run(file, tmp_path / "folder", "--model", "klein") == 0
    assert load_students(tmp_path / "folder", fingerprint="klein").bank.layers == LAYERS


def test_what_cannot_be_converted_is_one_line(tmp_path, capsys):
    save_students(tmp_path / "far", bank("near_far"), measured(), fingerprint="klein")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty").mkdir()
    write_legacy_students(tmp_path / "klein.pt", bank(), measured(), fingerprint="klein")
    cases = (
        ((tmp_path / "far", tmp_path / "a.pt"), "hold 'hkr' students only"),
        ((tmp_path / "empty", tmp_path / "a.pt"), "there is no checkpoint at"),
        ((tmp_path / "nowhere.pt", tmp_path / "folder"), "there is no checkpoint file"),
        ((tmp_path / "text.pt", tmp_path / "folder"), "text.pt"),
        ((tmp_path / "klein.pt", tmp_path / "folder", "--model", "dev"), "saved for klein, the model here is dev"),
        ((tmp_path / "klein.pt", tmp_path / "far"), "exists already"),
    )
    for words, message in cases:
        assert run(*words) == 1
        complaint = capsys.readouterr().err.strip()
        assert message in complaint
        assert len(complaint.splitlines()) == 1
    assert run(tmp_path / "klein.pt", tmp_path / "far", "--force") == 0
    assert load_students(tmp_path / "far", fingerprint="klein").bank.config.preset == "hkr"
