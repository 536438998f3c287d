import logging
from types import ModuleType
from typing import Any

import pytest

ORDER = [
    "rmse_weight",
    "cosine_weight",
    "lpips_weight",
    "dreamsim_weight",
    "hps_weight",
    "biqa_quality_weight",
    "biqa_aesthetic_weight",
    "reward_baseline_quality_floor",
    "huber_beta",
    "learning_rate",
    "grad_clip_norm",
    "alpha_lr_multiplier",
    "phi_lr_multiplier",
    "target_ttr_ratio",
    "lambda_eff",
    "lambda_entropy",
    "gumbel_temperature_start",
    "gumbel_temperature_end",
    "warmup_steps",
    "comet_enabled",
    "comet_api_key",
    "comet_project_name",
    "comet_workspace",
    "comet_experiment",
    "log_every",
]
DEFAULTS = [
    1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, -0.3, 0.05, 1e-4, 1.0, 5.0, 1.0, 0.7, 1.0, 0.1, 1.0, 0.5, 0, False, "",
    "ttr-distillation", "", "", 10,
]  # fmt: skip


@pytest.fixture
def module(host: Any) -> ModuleType:
    import comfy_nodes.nodes.training_config

    return comfy_nodes.nodes.training_config


def test_inputs_and_output_are_those_of_saved_workflows(module: ModuleType) -> None:
    schema = module.Flux2TTRTrainingParameters.define_schema()
    assert [one.id for one in schema.inputs] == ORDER
    assert [one.default for one in schema.inputs] == DEFAULTS
    assert [(one.label, one.type) for one in schema.outputs] == [("training_config", "TTR_TRAINING_CONFIG")]


def test_four_sections(module: ModuleType) -> None:
    config = module.Flux2TTRTrainingParameters.execute(**dict(zip(ORDER, DEFAULTS, strict=True)))[0]
    assert set(config) == {"loss_config", "optimizer_config", "schedule_config", "logging_config"}
    assert config["loss_config"]["huber_beta"] == 0.05
    assert config["schedule_config"]["target_ttr_ratio"] == 0.7
    names = {name for section in config.values() for name in section}
    assert names == set(ORDER) - {"comet_api_key"}
    assert module.unpack(config) == module.TrainingParameters()


def test_a_key_goes_nowhere_and_warns(module: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    key = next(one for one in module.Flux2TTRTrainingParameters.define_schema().inputs if one.id == "comet_api_key")
    assert key.socketless
    assert key.default == ""
    with caplog.at_level(logging.DEBUG):
        config = module.Flux2TTRTrainingParameters.execute(comet_api_key="abcdef123")[0]
    assert "COMET_API_KEY" in caplog.text
    assert "abcdef123" not in caplog.text
    assert "abcdef123" not in str(config)


def test_reading_is_tolerant(module: ModuleType) -> None:
    old = {
        "loss_config": {"huber_beta": "0.2", "lpips_weight": "many", "hps_prompt": "x"},
        "optimizer_config": None,
        "schedule_config": {"lambda_eff": float("nan"), "warmup_steps": 3.0},
        "elsewhere": 1,
    }
    read = module.unpack(old, learning_rate=0.5)
    assert (read.huber_beta, read.lpips_weight, read.lambda_eff, read.warmup_steps) == (0.2, 0.0, 1.0, 3)
    assert read.learning_rate == 0.5
    assert module.unpack(None) == module.unpack("text") == module.TrainingParameters()
