from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from ttr_distill.tiny import TinySampler, load_teacher, retrieval_accuracy
from ttr_distill.tiny.data import PictureSet
from ttr_distill.tiny.store import LOG_FILE
from ttr_distill.tiny.train import measure_steps, schedule
from ttr_distill.tiny.train import train as train_any
from ttr_distill.tiny.trainer import ARCHITECTURE, Stage, TrainConfig

SMALL = {
    **ARCHITECTURE,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "axes_dims_rope": (4, 6, 6),
}
STAGES = (Stage(((4, 16),), 0.7), Stage(((8, 4), (4, 8)), 0.3))


train = partial(train_any, architecture=SMALL)


def rows_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / LOG_FILE).read_text(encoding="utf-8").splitlines()]


def test_loss_falls_and_the_result_samples(shapes: PictureSet, tmp_path: Path) -> None:
    progress = train(shapes, TrainConfig(stages=STAGES, steps=(110, 30), warmup=10), tmp_path)
    rows = rows_of(tmp_path)
    assert progress.done == len(rows) == 140
    first = sum(row["loss"] for row in rows[:10]) / 10
    last = sum(row["loss"] for row in rows[100:110]) / 10
    assert last < 0.5 * first
    validation = [row["validation_loss"] for row in rows if "validation_loss" in row]
    assert validation[-1] < 0.7 * validation[0]

    taught = load_teacher(directory=tmp_path)
    assert taught.concepts == shapes.concepts
    prompts = [f"{name} on pink" for name in shapes.concepts]
    images = TinySampler(taught, rows=8, columns=8, steps=8, guidance=1.5).sample(prompts, range(6)).images
    assert retrieval_accuracy(images, prompts, directory=tmp_path) >= 0.5

    facts = json.loads((tmp_path / "training.json").read_text(encoding="utf-8"))
    assert facts["steps"] == [110, 30]
    assert facts["samples_by_side"] == {"4": 110 * 16 + 15 * 8, "8": 15 * 4}
    assert facts["training_loss"][-1]["step"] == 139


def test_resumed_run_equals_an_uninterrupted_one(shapes: PictureSet, tmp_path: Path) -> None:
    config = TrainConfig(stages=STAGES, steps=(4, 3), seed=3)
    train(shapes, config, tmp_path / "whole")
    train(shapes, config, tmp_path / "parts", stop_after=5)
    assert not (tmp_path / "parts" / "transformer.safetensors").exists()
    # A crash after the checkpoint may have logged further steps, the last one half.
    with (tmp_path / "parts" / LOG_FILE).open("a", encoding="utf-8") as file:
        file.write('{"step": 5, "loss": 9.0}\n{"step": 6, "lo')
    train(shapes, config, tmp_path / "parts")
    whole, parts = ([row["loss"] for row in rows_of(tmp_path / name)] for name in ("whole", "parts"))
    assert whole == parts
    one, other = (load_teacher(directory=tmp_path / name) for name in ("whole", "parts"))
    assert one.fingerprint == other.fingerprint


def test_seed_decides_the_run(shapes: PictureSet, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(shapes, TrainConfig(stages=STAGES, steps=(2, 1), seed=seed), tmp_path / name)
    a, b, c = (load_teacher(directory=tmp_path / name).fingerprint for name in "abc")
    assert a == b != c
    assert torch.equal(before, torch.get_rng_state())


def test_other_options_do_not_continue_a_run(shapes: PictureSet, tmp_path: Path) -> None:
    train(shapes, TrainConfig(stages=STAGES, steps=(2, 1)), tmp_path, stop_after=1)
    with pytest.raises(ValueError, match="other options"):
        train(shapes, TrainConfig(stages=STAGES, steps=(2, 1), seed=1), tmp_path)


def test_schedule_walks_the_stages() -> None:
    config = TrainConfig(stages=STAGES, steps=(100, 40), warmup=10)
    plan = list(schedule(config, config.steps))
    assert [(side, batch) for side, batch, _, _ in plan[98:103]] == [(4, 16), (4, 16), (8, 4), (4, 8), (8, 4)]
    rates = [rate for _, _, rate, _ in plan]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9]
    assert rates[100] == pytest.approx(0.3)
    assert rates[-1] < 0.05
    assert {round(decay, 3) for *_, decay in plan[:100]} == {0.9}


def test_budget_is_measured(shapes: PictureSet) -> None:
    few, many = (measure_steps(shapes, TrainConfig(stages=STAGES, minutes=minutes), SMALL) for minutes in (1.0, 10.0))
    assert min(few) >= 1
    assert all(4 < large / small < 25 for small, large in zip(few, many, strict=True))


def test_wrong_options(shapes: PictureSet, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one a stage"):
        TrainConfig(stages=STAGES, steps=(3,))
    with pytest.raises(ValueError, match="minutes"):
        TrainConfig(minutes=0)
    with pytest.raises(ValueError, match="share"):
        Stage(((4, 16),), 0.0)
    with pytest.raises(ValueError, match="128 are needed"):
        train(shapes, TrainConfig(steps=(1, 1, 1)), tmp_path)
