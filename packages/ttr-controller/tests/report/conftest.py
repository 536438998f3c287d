"""A made-up run: every phase, plausible figures, small real PNGs. Tests change what they need before writing it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

LAYERS = ("double:0", "double:1", "single:0", "single:1", "single:2", "single:3")
PROMPTS = [
    "red apple on blue",
    "fox face",
    "strawberry on pink",
    "dog face on green",
    "hamburger",
    "a <b>bold</b> & cat",
]
SETTINGS = (
    ("teacher", "exact attention"),
    ("policy, 75 % full", "PSNR 40.1 dB"),
    ("policy, 50 % full", "PSNR 35.6 dB"),
    ("first steps, 50 % full", "PSNR 34.0 dB"),
    ("policy, 25 % full", "PSNR 30.1 dB"),
    ("100 % student", "PSNR 26.6 dB, retrieval 1.00"),
)
STUDENT_COST = 0.33


def cost_of(share: float) -> float:
    """Attention cost of a share of full slots."""
    return share + (1 - share) * STUDENT_COST


def point(method: str, share: float, error: float, **extra: float) -> dict[str, Any]:
    """One measured point."""
    quality = {"psnr": 20 - 15 * np.log10(max(error, 0.01)), "ssim": 1 - error / 3, "retrieval": 1.0}
    time = {"attention_seconds": 0.4 + share, "seconds": 2.0 + share}
    base = {"method": method, "full_share": share, "cost": cost_of(share), "latent_rmse": error}
    return {**base, "latent_rmse_se": error / 8, **quality, **time, **extra}


def pareto_points() -> list[dict[str, Any]]:
    """All methods at three equal costs; the policy best everywhere."""
    points = [point("all student", 0.0, 0.29, psnr=26.6), point("all full", 1.0, 0.0, psnr=None, ssim=1.0)]
    scale = {"random": 1.0, "first steps full": 0.93, "last steps full": 1.2, "probe": 0.78, "policy": 0.7}
    for method, factor in scale.items():
        points += [point(method, share, factor * 0.29 * (1 - share) ** 0.8) for share in (0.25, 0.5, 0.75)]
    return points


def timing_rows() -> list[dict[str, Any]]:
    """Near-far pays from about a thousand tokens on, hkr later."""
    table = {
        "exact": [(1.9, 6.3), (18.0, 52.0), (330.0, 560.0)],
        "near_far": [(4.1, 9.0), (17.0, 50.0), (88.0, 310.0)],
        "hkr": [(6.0, 12.0), (31.0, 66.0), (210.0, 440.0)],
    }
    rows = []
    for variant, times in table.items():
        for tokens, (attention, step) in zip((256, 1024, 4096), times, strict=True):
            spread = [0.93 * attention, 1.12 * attention]
            row = {"tokens": tokens, "variant": variant, "attention_ms": attention, "step_ms": step}
            rows.append({**row, "attention_ms_spread": spread})
    return rows


def fidelity() -> dict[str, Any]:
    """Distances of near-far without chosen tiles, and with them before and after training."""
    chosen = [0.0011, 0.0019, 0.0009, 0.0012, 0.0027, 0.0008]
    plain = [0.0038, 0.0061, 0.0024, 0.0033, 0.0131, 0.0021]
    rows: list[dict[str, Any]] = []
    for layer, near, far in zip(LAYERS, plain, chosen, strict=True):
        for variant, when, value in (("near_far, no chosen tiles", "before", near), ("near_far", "before", far)):
            rows.append({"layer": layer, "variant": variant, "when": when, "cosine_distance": value})
        rows.append({**rows[-1], "when": "after", "cosine_distance": 0.9 * far, "ready": True, "updates": 120})
    for row in rows:
        row["relative_l2"] = 1.25 * row["cosine_distance"] ** 0.5
    return {"tokens": 1024, "prompts": list(PROMPTS[:3]), "rows": rows}


def distillation() -> dict[str, Any]:
    """Falling training curves."""
    rng = np.random.default_rng(0)
    updates = list(range(0, 121, 4))
    curves = [
        {
            "layer": layer,
            "update": updates,
            "loss": [0.002 * i * (0.6 + 0.4 * np.exp(-u / 40)) * (1 + 0.06 * rng.standard_normal()) for u in updates],
            "cosine_distance": [0.0006 * i * (0.7 + 0.3 * np.exp(-u / 50)) for u in updates],
        }
        for i, layer in enumerate(LAYERS, start=1)
    ]
    kept = {layer: layer != "single:3" for layer in LAYERS}
    return {"images": 8, "updates": 720, "kept_learned": kept, "curves": curves}


def controller() -> dict[str, Any]:
    """A noisy reward that rises, and a policy that spends early."""
    rng = np.random.default_rng(0)
    learning = [
        {
            "rollouts": 4 * i,
            "reward": -0.2 + 0.07 * (1 - np.exp(-i / 4)) + 0.01 * rng.standard_normal(),
            "quality": 0.17 - 0.06 * (1 - np.exp(-i / 4)) + 0.01 * rng.standard_normal(),
            "cost": 0.66 + 0.02 * rng.standard_normal(),
            "validation": 0.16 - 0.05 * (1 - np.exp(-i / 4)) if i % 2 == 0 else None,
        }
        for i in range(17)
    ]
    heat = 1 / (1 + np.exp(-(np.linspace(2.5, -2.5, 8)[:, None] + np.array([2.0, 1.0, -1.5, -1.0, 0.0, 2.5]))))
    sigmas = [1.0, 0.94, 0.87, 0.79, 0.69, 0.56, 0.4, 0.2]
    return {
        "method": "one-step probe, then leave-one-out REINFORCE",
        "rollouts": 64,
        "target_full": 0.5,
        "curve": learning,
        "heatmap": {"layers": list(LAYERS), "sigmas": sigmas, "full_probability": heat.tolist()},
    }


def sheet() -> dict[str, Any]:
    """Six prompts at six settings."""
    columns = [
        {"label": label, "detail": detail, "images": [f"images/{column}_{row}.png" for row in range(len(PROMPTS))]}
        for column, (label, detail) in enumerate(SETTINGS)
    ]
    return {"prompts": list(PROMPTS), "columns": columns}


def timing() -> dict[str, Any]:
    """Times with a break-even point of each variant."""
    points = {
        "near_far": {"attention_tokens": 960.0, "step_tokens": 940.0},
        "hkr": {"attention_tokens": 2300.0, "step_tokens": 2000.0},
    }
    return {"threads": 2, "rows": timing_rows(), "break_even": points}


def checks() -> list[dict[str, Any]]:
    """Three that hold and one that fails."""
    name = "mean cosine distance of near_far"
    return [
        {"name": f"{name} without chosen tiles", "value": 0.0051, "limit": 0.005, "passed": False},
        {"name": f"{name} with chosen tiles", "value": 0.0014, "limit": 0.002, "passed": True},
        {"name": "retrieval with students everywhere", "value": 1.0, "limit": 0.9, "passed": True},
        {"name": "policy at half of the slots no worse than the best simple baseline", "value": True, "passed": True},
    ]


def results() -> dict[str, Any]:
    """The contents of results.json of a finished run."""
    software = {"python": "3.11.7", "torch": "2.15.0", "diffusers": "0.42.1"}
    sampling = {"tokens": 1024, "text_tokens": 12, "steps": 8, "guidance": 3.0}
    seconds = {"distill": 30.1, "fidelity": 12.0, "controller": 80.0, "sampling": 50.0, "timing": 15, "total": 187.1}
    return {
        "schema": 1,
        "created": "2026-11-21T10:00:00+00:00",
        "complete": True,
        "preset": "near_far",
        "seed": 0,
        "budget_minutes": 4.0,
        "settings": {"preset": "near_far", "device": "cpu", "rows": 32, "columns": 32, "steps": 8, "guidance": 3.0},
        "plan": {"distill_images": 8, "rollouts": 64, "compare_prompts": 6},
        "machine": {"cpu": "AMD EPYC 7B13", "threads": 2, "device": "cpu", "system": "Linux", **software},
        "versions": {"attn-kernels": "0.1.0", "attn-dispatch": "0.1.0", "ttr-distill": "0.1.0"},
        "seconds": seconds,
        "teacher": {"parameters": 1_151_488, "layers": list(LAYERS), "heads": 4, "width": 32, **sampling},
        "fidelity": fidelity(),
        "distillation": distillation(),
        "controller": controller(),
        "pareto": {
            "prompts": list(PROMPTS),
            "student_cost": STUDENT_COST,
            "teacher_retrieval": 1.0,
            "points": pareto_points(),
        },
        "sheet": sheet(),
        "timing": timing(),
        "checks": checks(),
    }


def write_run(folder: Path, data: dict[str, Any], *, side: int = 16, pictures: Sequence[Image.Image] = ()) -> Path:
    """Write a run's folder: results.json and one PNG for each picture that the sheet names."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(data), encoding="utf-8")
    rng = np.random.default_rng(1)
    names = [name for column in data.get("sheet", {"columns": []})["columns"] for name in column["images"]]
    for index, name in enumerate(names):
        pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        picture = pictures[index % len(pictures)] if pictures else Image.fromarray(pixels)
        picture.save(folder / name)
    return folder


@pytest.fixture
def data() -> dict[str, Any]:
    """A fresh copy of a finished run's results."""
    return results()


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Write results into a new folder."""
    return lambda data, **options: write_run(tmp_path / "run", data, **options)


@pytest.fixture(scope="session")
def finished_run() -> Callable[[Path], Path]:
    """Write a finished run into a folder, for fixtures that outlive one test."""
    return lambda folder: write_run(folder, results())
