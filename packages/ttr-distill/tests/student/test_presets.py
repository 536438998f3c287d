import json

import pytest
import torch
from attn_kernels import NearFarConfig
from ttr_distill.student.attention import StudentAttention
from ttr_distill.student.hkr import HkrConfig, HkrStudent
from ttr_distill.student.near_far import NearFarStudent
from ttr_distill.student.presets import PRESETS, StudentConfig, build_student, preset


def test_every_name_makes_its_student_and_survives_json() -> None:
    assert PRESETS == ("hkr", "near_far")
    for name, kind in zip(PRESETS, (HkrStudent, NearFarStudent), strict=True):
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
    with pytest.raises(ValueError, match="must be one of 'hkr', 'near_far', got 'hrk'"):
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
