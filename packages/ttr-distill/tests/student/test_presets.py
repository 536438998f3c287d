import json

import pytest
import torch
from attn_dispatch import TokenLayout
from attn_kernels import NearFarConfig, TokenGrid
from ttr_distill.student.attention import StudentAttention
from ttr_distill.student.hkr import HkrConfig, HkrStudent
from ttr_distill.student.joint import JointConfig, JointStudent
from ttr_distill.student.near_far import NearFarStudent
from ttr_distill.student.presets import PRESETS, StudentConfig, build_student, preset


def test_every_name_makes_its_student_and_survives_json() -> None:
    assert PRESETS == ("hkr", "hkr-joint", "near_far", "local-kernel", "hedgehog")
    kinds = (HkrStudent, JointStudent, NearFarStudent, JointStudent, JointStudent)
    for name, kind in zip(PRESETS, kinds, strict=True):
        config = preset(name)
        student: StudentAttention = build_student(config, 2, 16, generator=torch.Generator().manual_seed(0))
        assert isinstance(student, kind)
        assert StudentConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_overrides_reach_the_settings_and_are_checked() -> None:
    assert preset("hkr", landmark_maximum=512).settings == HkrConfig(landmark_maximum=512)
    pair = preset("near_far", tile=(2, 4), top_k=1)
    assert StudentConfig.from_dict(json.loads(json.dumps(pair.to_dict()))) == pair
    with pytest.raises(ValueError, match="multiple of 256"):
        preset("hkr", feature_dim=100)
    with pytest.raises(ValueError, match="student 'near_far' has no setting feature_dim; it has"):
        preset("near_far", feature_dim=256)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match="must be one of 'hkr', 'hkr-joint', 'near_far', 'local-kernel', 'hedgehog', got 'hrk'"
    ):
        preset("hrk")
    with pytest.raises(ValueError, match="must be one of"):
        StudentConfig.from_dict({})


def test_settings_must_fit_the_preset_and_be_complete() -> None:
    with pytest.raises(ValueError, match="takes a HkrConfig, got a NearFarConfig"):
        StudentConfig("hkr", NearFarConfig())
    data = preset("hkr").to_dict()
    del data["gamma"]
    with pytest.raises(ValueError, match="lacks the settings gamma"):
        StudentConfig.from_dict(data)
    with pytest.raises(ValueError, match="has no setting colour"):
        StudentConfig.from_dict({**preset("hkr").to_dict(), "colour": 1})


def test_hkr_joint_does_no_more_operations_than_hkr() -> None:
    for heads, width, text, side in ((4, 32, 12, 16), (4, 32, 12, 32), (4, 32, 12, 64), (24, 128, 512, 64)):
        layout = TokenLayout(text + side**2, ((0, text),), (TokenGrid(text, side, side),))
        hkr, joint = (
            build_student(preset(name), heads, width).flops(layout, 1, heads, width) for name in ("hkr", "hkr-joint")
        )
        assert joint <= hkr, (width, side)


def test_local_kernel_has_neither_landmarks_nor_a_large_map() -> None:
    settings = preset("local-kernel").settings
    assert isinstance(settings, JointConfig)
    assert settings.landmark_fraction == settings.landmark_minimum == 0
    assert 32 <= settings.feature_dim <= 64
    assert settings.radius
