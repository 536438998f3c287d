import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from attn_dispatch import AttentionCall, LayerKey, StepContext, TokenLayout
from attn_dispatch.backends import HybridBackend, HybridBackendConfig, options_of
from attn_kernels import TokenGrid, softmax_attention
from attn_kernels.testing import make_qkv

CONFIG = HybridBackendConfig(local_window=16, global_P=3, global_weight=1.0, log_quality_stats=True, log_steps=False)


def make_call(layout: TokenLayout | None = None) -> AttentionCall:
    q, k, v = make_qkv(1, 2, 151, 16, dtype=torch.float32, seed=0)
    return AttentionCall(q, k, v, layer=LayerKey("single", 3), step=StepContext(0.5), layout=layout)


def run(backend: HybridBackend, *calls: AttentionCall) -> list[torch.Tensor]:
    backend.begin_run()
    outputs = [backend(call) for call in calls]
    backend.end_run()
    return outputs


def test_each_run_appends_one_line(tmp_path: Path) -> None:
    path = tmp_path / "results" / "hybrid-attention-results.jsonl"
    backend = HybridBackend(CONFIG, record_path=path, meta={"model_class": "Flux"})
    for _ in range(2):
        run(backend, make_call(), make_call())
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 2
    assert set(lines[0]) == {"timestamp", "quality", "config", "meta"}
    assert lines[0]["quality"]["calls"] == 2
    assert lines[0]["quality"]["samples"] == 2 * 8 * 2 * 16
    assert lines[0]["quality"] == lines[1]["quality"]
    assert lines[1]["meta"]["run_start_ts"] > lines[0]["meta"]["run_start_ts"]
    assert lines[0]["timestamp"] >= lines[0]["meta"]["run_start_ts"]


def test_config_and_meta_say_what_ran(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    layout = TokenLayout(151, ((0, 7),), (TokenGrid(7, 9, 16),))
    config = replace(CONFIG, local_window=12, radius=0)
    run(HybridBackend(config, record_path=path, meta={"model_class": "Flux", "steps": 4}), make_call(layout))
    record = json.loads(path.read_text())
    names = {one.name for one in options_of(HybridBackendConfig)} - {"log_steps", "log_quality_stats"}
    assert set(record["config"]) == names
    assert record["config"]["local_window"] == 12
    meta = record["meta"]
    assert (meta["model_class"], meta["steps"]) == ("Flux", 4)
    expected = {
        "batch": 1,
        "heads": 2,
        "head_dim": 16,
        "token_dim": 32,
        "q_len": 151,
        "k_len": 151,
        "is_cross": False,
        "dtype": "float32",
        "device": "cpu",
        "sigma": 0.5,
        "block_type": "single",
        "block_index": 3,
        "latent_h": 9,
        "latent_w": 16,
        "effective_local_window": 12,
        "effective_global_weight": 1.0,
    }
    assert {key: meta[key] for key in expected} == expected


def test_quality_is_the_distance_from_attention_with_its_own_scale() -> None:
    backend = HybridBackend(replace(CONFIG, local_window=3))
    call = make_call()
    (output,) = run(backend, call)
    assert backend.quality is not None
    exact = softmax_attention(call.q, call.k, call.v).out
    whole = float((output - exact).norm() / exact.norm())
    assert backend.quality.relative_l2 == pytest.approx(whole, rel=0.5)
    # Nearly all keys near: what is left is next to nothing, which a reference of another scale would not show.
    wide = HybridBackend(replace(CONFIG, local_window=149, local_chunk=1))
    run(wide, call)
    assert wide.quality is not None
    assert wide.quality.relative_l2 < 0.02


def test_nothing_measured_nothing_written(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    backend = HybridBackend(replace(CONFIG, log_quality_stats=False), record_path=path)
    run(backend, make_call())
    run(HybridBackend(CONFIG, record_path=path))
    assert not path.exists()
    assert backend.quality is None


def test_a_file_that_cannot_be_written_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    backend = HybridBackend(CONFIG, record_path=tmp_path / "file" / "record.jsonl")
    with caplog.at_level(logging.WARNING):
        run(backend, make_call())
    assert "could not be written" in caplog.text
    assert backend.quality is not None
