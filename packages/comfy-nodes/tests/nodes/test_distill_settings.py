import inspect
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from ttr_distill import preset

FIRST = [
    "model",
    "latents",
    "conditioning",
    "learning_rate",
    "steps",
    "training",
    "training_preview_ttr",
    "comet_enabled",
    "comet_project_name",
    "comet_workspace",
    "comet_api_key",
    "checkpoint_path",
    "feature_dim",
    "query_chunk_size",
    "key_chunk_size",
    "landmark_count",
    "text_tokens_guess",
    "alpha_init",
    "alpha_lr_multiplier",
    "phi_lr_multiplier",
    "training_query_token_cap",
    "replay_buffer_size",
    "replay_offload_cpu",
    "replay_max_mb",
    "train_steps_per_call",
    "huber_beta",
    "grad_clip_norm",
    "readiness_threshold",
    "readiness_min_updates",
    "enable_memory_reserve",
    "layer_start",
    "layer_end",
    "inference_mixed_precision",
]
FIRST_DEFAULTS = [
    None, None, None, 1e-4, 512, True, True, True, "ttr-distillation", "", "", "", 256, 256, 1024, 128, 77, 0.1, 5.0,
    1.0, 128, 8, True, 768, 1, 0.05, 1.0, 0.12, 24, False, -1, -1, True,
]  # fmt: skip
SECOND = [
    "model",
    "latents",
    "conditioning",
    "training_config",
    "steps",
    "training",
    "training_preview_ttr",
    "checkpoint_path",
    "feature_dim",
    "query_chunk_size",
    "key_chunk_size",
    "landmark_fraction",
    "landmark_min",
    "landmark_max",
    "text_tokens_guess",
    "alpha_init",
    "training_query_token_cap",
    "replay_buffer_size",
    "replay_offload_cpu",
    "replay_max_mb",
    "train_steps_per_call",
    "readiness_threshold",
    "readiness_min_updates",
    "enable_memory_reserve",
    "layer_start",
    "layer_end",
    "cfg_scale",
    "min_swap_layers",
    "max_swap_layers",
    "inference_mixed_precision",
    "controller_checkpoint_path",
]
SECOND_DEFAULTS = [
    None, None, None, None, 512, True, True, "flux2_ttr.pt", 256, 256, 1024, 0.08, 64, 0, 77, 0.1, 128, 8, True, 768, 1,
    0.12, 24, False, -1, -1, 1.0, 1, -1, True, "",
]  # fmt: skip
TRAINER = [
    "model_original",
    "model_ttr",
    "positive",
    "negative",
    "latent",
    "vae",
    "training_config",
    "steps",
    "seed",
    "cfg",
    "sampler_name",
    "scheduler",
    "checkpoint_path",
    "training_iterations",
    "denoise",
    "sigma_aware_training",
]
ROUTING = [
    "model",
    "ttr_checkpoint_path",
    "controller_checkpoint_path",
    "quality_speed",
    "policy_mode",
    "policy_temperature",
]


@pytest.fixture
def modules(host: Any) -> Any:
    import comfy_nodes.nodes.controller as controller
    import comfy_nodes.nodes.controller_training as controller_training
    import comfy_nodes.nodes.distill as distill
    import comfy_nodes.nodes.distill_settings as settings

    return SimpleNamespace(
        settings=settings, distill=distill, controller=controller, controller_training=controller_training
    )


@pytest.fixture
def settings(modules: Any) -> ModuleType:
    module: ModuleType = modules.settings
    return module


def test_inputs_are_those_of_saved_workflows_and_new_ones_stand_at_the_end(modules: Any) -> None:
    nodes = {
        modules.distill.Flux2TTR: (FIRST, FIRST_DEFAULTS),
        modules.distill.Flux2TTRTrainer: (SECOND, SECOND_DEFAULTS),
        modules.controller_training.Flux2TTRControllerTrainer: (
            TRAINER,
            [*[None] * 7, 20, 0, 1.0, "euler", "normal", "flux2_ttr_controller.pt", 100, 1.0, True],
        ),
        modules.controller.Flux2TTRController: (ROUTING, [None, "", "", 0.5, "stochastic", 1.0]),
    }
    for node, (order, defaults) in nodes.items():
        inputs = node.define_schema().inputs
        assert [one.id for one in inputs[: len(order)]] == order, node
        assert [one.default for one in inputs[: len(order)]] == defaults, node
        assert all(one.optional for one in inputs[len(order) :]), node
        assert len(inspect.getsource(node.execute).splitlines()) <= 25, node


def test_ranges_of_the_old_inputs(modules: Any) -> None:
    inputs = {one.id: one for one in modules.distill.Flux2TTRTrainer.define_schema().inputs}
    ranges = {
        "steps": (0, 200_000), "feature_dim": (256, 8192), "query_chunk_size": (1, 4096), "landmark_min": (1, 1024),
        "landmark_fraction": (0.01, 0.5), "landmark_max": (0, 2048), "replay_max_mb": (64, 65536),
        "train_steps_per_call": (1, 32), "readiness_threshold": (0, 10), "layer_start": (-1, 512),
    }  # fmt: skip
    assert {name: (inputs[name].min, inputs[name].max) for name in ranges} == ranges
    # The page moves a number to minimum + n * step: 256 must be one of these.
    assert (inputs["feature_dim"].min, inputs["feature_dim"].step) == (256, 256)
    assert inputs["latents"].optional
    assert inputs["conditioning"].optional


def test_the_student_of_a_checkpoint_is_kept_and_settings_of_the_node_win(settings: ModuleType) -> None:
    chosen = settings.DistillSettings(landmark_min=5)
    assert settings.student_config(None, chosen).preset == settings.RECOMMENDED
    saved = preset("hkr", gamma=3.0, landmark_minimum=9)
    config = settings.student_config(saved, chosen)
    assert (config.preset, config.settings.gamma, config.settings.landmark_minimum) == ("hkr", 3.0, 5)
    other = settings.student_config(saved, settings.DistillSettings(student="near_far"))
    assert other == preset("near_far")


def test_the_old_threshold_is_read_as_the_measured_one_and_warns(settings: ModuleType) -> None:
    old = settings.DistillSettings()
    assert settings.readiness_config(old).threshold == 0.005
    assert "is read as 0.005" in old.warning
    loose = settings.DistillSettings(readiness_threshold=0.3)
    assert settings.readiness_config(loose).threshold == 0.3
    assert "can destroy a picture" in loose.warning
    assert settings.DistillSettings(readiness_threshold=0.004).warning is None


def test_training_settings_reach_the_distiller(settings: ModuleType) -> None:
    from comfy_nodes.nodes.training_config import TrainingParameters

    node = settings.DistillSettings(
        replay_max_mb=64, train_steps_per_call=3, min_swap_layers=2, max_swap_layers=1, training_query_token_cap=7
    )
    parameters = TrainingParameters(
        learning_rate=0.002, phi_lr_multiplier=2.0, alpha_lr_multiplier=6.0, huber_beta=0.1, grad_clip_norm=0.5
    )
    config = settings.distill_config(node, parameters)
    assert config.replay_bytes == 64 * 2**20
    assert (config.train_steps_per_call, config.min_swap_layers, config.max_swap_layers) == (3, 2, 2)
    assert config.capture.query_cap == 7
    assert config.update.learning_rate == 0.004
    assert config.update.learning_rate * config.update.alpha_rate_factor == pytest.approx(0.012)
    assert (config.update.huber_beta, config.update.clip_norm) == (0.1, 0.5)
    assert settings.distill_config(settings.DistillSettings(), parameters).max_swap_layers is None


def test_landmark_count_of_the_first_version(settings: ModuleType) -> None:
    found = settings.settings_from({"landmark_count": 40, "comet_enabled": True})
    assert (found.landmark_min, found.landmark_max) == (40, 40)
