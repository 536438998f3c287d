"""Distillation and controller in a running ComfyUI, through its own KSampler and its stop button."""

import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.comfyui, pytest.mark.enable_socket]

PARAMETERS = {
    "rmse_weight": 1.0, "cosine_weight": 1.0, "lpips_weight": 0.0, "dreamsim_weight": 0.0, "hps_weight": 0.0,
    "biqa_quality_weight": 0.0, "biqa_aesthetic_weight": 0.0, "reward_baseline_quality_floor": -0.3,
    "huber_beta": 0.05, "learning_rate": 1e-4, "grad_clip_norm": 1.0, "alpha_lr_multiplier": 5.0,
    "phi_lr_multiplier": 1.0, "target_ttr_ratio": 0.7, "lambda_eff": 1.0, "lambda_entropy": 0.1,
    "gumbel_temperature_start": 1.0, "gumbel_temperature_end": 0.5, "warmup_steps": 0, "comet_enabled": False,
    "comet_api_key": "", "comet_project_name": "ttr-distillation", "comet_workspace": "", "comet_experiment": "",
    "log_every": 10,
}  # fmt: skip
TRAINER = {
    "model": ["flux", 0], "steps": 512, "training": True, "training_preview_ttr": False, "checkpoint_path": "students",
    "feature_dim": 256, "query_chunk_size": 256, "key_chunk_size": 1024, "landmark_fraction": 0.08, "landmark_min": 64,
    "landmark_max": 0, "text_tokens_guess": 77, "alpha_init": 0.1, "training_query_token_cap": 16,
    "replay_buffer_size": 8, "replay_offload_cpu": True, "replay_max_mb": 768, "train_steps_per_call": 1,
    "readiness_threshold": 0.12, "readiness_min_updates": 2, "enable_memory_reserve": False, "layer_start": -1,
    "layer_end": -1, "cfg_scale": 1.0, "min_swap_layers": 64, "max_swap_layers": -1, "inference_mixed_precision": True,
    "controller_checkpoint_path": "",
}  # fmt: skip


def _sampler(model: str, seed: int = 1, steps: int = 2) -> tuple[str, dict[str, Any]]:
    inputs = {"model": [model, 0], "positive": ["flux", 1], "negative": ["flux", 2], "latent_image": ["flux", 3]}
    inputs |= {"seed": seed, "steps": steps, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    return "KSampler", inputs


def _flow(comfyui: Any, **trainer: Any) -> dict[str, Any]:
    return {
        "flux": ("TestFlux", {"variant": comfyui.newest, "size": 256}),
        "exact": _sampler("flux"),
        "ttr": ("Flux2TTRTrainer", {**TRAINER, **trainer}),
        "sampled": _sampler("ttr"),
        "compare": ("TestCompare", {"a": ["exact", 0], "b": ["sampled", 0]}),
    }


def test_phase_one_inference_and_controller(comfyui: Any) -> None:
    """The whole way, as a user walks it: two samplings train, students serve, a controller learns and is used."""
    flow = _flow(comfyui)
    flow["second"] = _sampler("ttr", seed=2)
    flow["exact second"] = _sampler("flux", seed=2)
    flow["compare second"] = ("TestCompare", {"a": ["exact second", 0], "b": ["second", 0]})
    outputs = comfyui.run(flow)
    assert outputs["compare"]["equal"] == outputs["compare second"]["equal"] == [True], "the image is the exact one"
    folder = Path(comfyui.base, "models/approximate_attention/students")
    assert (folder / "LATEST").is_file()
    assert (folder / "metrics.jsonl").is_file()
    outputs = comfyui.run(_flow(comfyui, training=False) | {"loss": ("PreviewAny", {"source": ["ttr", 1]})})
    assert 0.0 < outputs["compare"]["relative"][0] < 0.2, "students answered"
    assert float(outputs["loss"]["text"][0]) != 0.0
    learn = {
        "model_original": ["flux", 0], "model_ttr": ["ttr", 0], "positive": ["flux", 1], "negative": ["flux", 2],
        "latent": ["flux", 3], "vae": ["flux", 4], "training_config": ["parameters", 0], "steps": 2, "seed": 3,
        "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "checkpoint_path": "controller",
        "training_iterations": 2, "denoise": 1.0, "sigma_aware_training": True, "rollouts": 2,
    }  # fmt: skip
    use = {
        "model": ["flux", 0], "ttr_checkpoint_path": "students", "controller_checkpoint_path": "", "quality_speed": 0.5,
        "policy_mode": "threshold", "policy_temperature": 1.0, "controller": ["learn", 2],
    }  # fmt: skip
    flow = _flow(comfyui, training=False) | {
        "parameters": ("Flux2TTRTrainingParameters", PARAMETERS),
        "learn": ("Flux2TTRControllerTrainer", learn),
        "show": ("PreviewImage", {"images": ["learn", 1]}),
        "use": ("Flux2TTRController", use),
        "routed": _sampler("use"),
        "report": ("AttentionReport", {"model": ["use", 0], "after": ["routed", 0]}),
    }
    outputs = comfyui.run(flow)
    assert outputs["show"]["images"]
    assert "the policy chose full attention" in outputs["report"]["text"][0]
    assert "student" in outputs["report"]["text"][0]


def test_stop_button_while_training(comfyui: Any) -> None:
    flow = _flow(comfyui, checkpoint_path="stopped", student="hkr", blocks="all")
    flow["sampled"] = _sampler("ttr", steps=200)
    prompt = comfyui.queue({name: flow[name] for name in ("flux", "ttr", "sampled")} | {
        "show": ("TestCompare", {"a": ["sampled", 0], "b": ["sampled", 0]})
    })  # fmt: skip
    folder = Path(comfyui.base, "models/approximate_attention/stopped")
    for _ in range(200):
        if (folder / "metrics.jsonl").exists():
            break
        time.sleep(0.1)
    time.sleep(3.0)
    pressed = time.monotonic()
    comfyui.post("/interrupt", {})
    outcome = comfyui.wait(prompt)
    assert time.monotonic() - pressed < 2.0
    assert outcome.interrupted
    assert (folder / "LATEST").is_file(), "what was learned is saved"
    trained = comfyui.run({"flux": flow["flux"], "ttr": flow["ttr"], "loss": ("PreviewAny", {"source": ["ttr", 1]})})
    assert float(trained["loss"]["text"][0]) != 0.0


def test_bad_days_are_said_on_the_node(comfyui: Any) -> None:
    kind, message, node = comfyui.error(_flow(comfyui, training=False, checkpoint_path="nowhere"))
    assert (kind, node) == ("FileNotFoundError", "ttr")
    assert "there is no checkpoint at" in message
    Path(comfyui.base, "models/approximate_attention").mkdir(parents=True, exist_ok=True)
    Path(comfyui.base, "models/approximate_attention/blocked").write_text("")
    kind, message, node = comfyui.error(_flow(comfyui, checkpoint_path="blocked/inside"))
    assert (kind, node) == ("ValueError", "ttr")
    assert "choose another checkpoint_path" in message
