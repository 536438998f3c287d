"""Seconds per step of a real ComfyUI with these nodes, against its own attention.

The tests' tiny Flux.2 (2 heads of width 128, 2 double and 4 single blocks, 512 text tokens, random weights) is sampled
by ComfyUI's KSampler on the CPU with SDPA as its own attention, as on GPUs. The arms of a scene are sampled in turn in
one process; a time is process time per step, the median over the rounds, and a ratio the median of the ratios to exact
attention within a round. The error is the relative L2 distance of the final latent from that of exact attention after
four steps. ``share`` is the part of the attention calls that were not exact.

Run: ``COMFYUI_PATH=/path/to/ComfyUI PYTHON packages/comfy-nodes/benchmarks/bench_comfyui.py [--json FILE]`` with the
Python that runs ComfyUI. Without COMFYUI_PATH it says so and does nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[3]
SMALL, LARGE = 256, 1024
"""Edges of the pictures, in pixels: 768 and 4,608 tokens."""

Row = dict[str, float]


@dataclass
class Scene:
    """A picture to sample.

    Attributes:
        model: ComfyUI's ``ModelPatcher``.
        positive: Conditioning.
        negative: Conditioning.
        latent: What is filled.
    """

    model: Any
    positive: Any
    negative: Any
    latent: dict[str, Tensor]

    def sample(self, model: Any, steps: int, seed: int = 7) -> tuple[float, Tensor]:
        """Sample once; process seconds per step, and the latent."""
        from nodes import common_ksampler

        prompts = self.positive, self.negative
        with torch.inference_mode():
            start = time.process_time()
            out = common_ksampler(model, seed, steps, 1.0, "euler", "simple", *prompts, self.latent)[0]["samples"]
            return (time.process_time() - start) / steps, out


def start_comfyui(checkout: str, models: str) -> None:
    """Make ComfyUI and this workspace importable: on the CPU, with SDPA."""
    sys.path[:0] = [checkout, *(str(path) for path in REPOSITORY.glob("packages/*/src"))]
    sys.argv = sys.argv[:1]
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    comfy.cli_args.args.use_pytorch_cross_attention = True
    import folder_paths

    folder_paths.models_dir = models
    logging.disable(logging.WARNING)
    os.environ["TQDM_DISABLE"] = "1"


def make_scene(pixels: int) -> Scene:
    """Make the tiny Flux.2 and what its sampler wants."""
    spec = importlib.util.spec_from_file_location(
        "tiny", REPOSITORY / "packages/comfy-nodes/tests/tiny_pack/__init__.py"
    )
    if spec is None or spec.loader is None:
        raise SystemExit("the tests' tiny pack is missing")
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    with torch.inference_mode():
        model, positive, negative, latent, _ = tiny.TestFlux().make("flux2", pixels, double=2, single=4)
        for name, weight in model.model.diffusion_model.named_parameters():
            if weight.ndim >= 2 and ("mod" in name or "final_layer" in name):
                weight.mul_(0.5)
    return Scene(model, positive, negative, latent)


def run_node(node: Any, **values: Any) -> Any:
    """Run a node as ComfyUI does and return its first result."""
    for one in node.define_schema().inputs:
        default = getattr(one, "default", None)
        if default is not None and not one.optional:
            values.setdefault(one.id, default)
    with torch.inference_mode():
        return node.PREPARE_CLASS_CLONE(None).EXECUTE_NORMALIZED(**values).args[0]


def share(model: Any) -> float:
    """Part of the attention calls of the latest run that were not exact."""
    from attn_dispatch.adapters.comfyui import installed

    counts = [getattr(handler, "report", None) for handler in installed(model).values()]
    found = [report.counts() for report in counts if report is not None]
    calls = sum(sum(one.values()) for one in found)
    return 1.0 - sum(one.get("native", 0) for one in found) / calls if calls else 0.0


def compare(scene: Scene, arms: Mapping[str, Any], rounds: int, steps: int) -> dict[str, Row]:
    """Measure all arms against exact attention."""
    arms = {"exact": scene.model, **arms}
    _, exact = scene.sample(scene.model, 4)
    rows: dict[str, Row] = {}
    for name, model in arms.items():
        _, latent = scene.sample(model, 4)
        rows[name] = {"error": float((latent - exact).norm() / exact.norm()), "share": share(model)}
    taken: list[dict[str, float]] = []
    for one in range(rounds):
        order = list(arms) if one % 2 else list(arms)[::-1]
        taken.append({name: scene.sample(arms[name], steps)[0] for name in order})
    for name, row in rows.items():
        row["seconds_per_step"] = statistics.median(one[name] for one in taken)
        row["times_exact"] = statistics.median(one[name] / one["exact"] for one in taken)
    return rows


def students(scene: Scene, student: str) -> tuple[Any, Callable[..., Any]]:
    """Train students for some steps; returns the model that trains, and what makes one that serves."""
    from comfy_nodes.nodes.distill import Flux2TTRTrainer

    common = {"model": scene.model, "student": student, "checkpoint_path": student, "readiness_min_updates": 1}
    trainer = run_node(Flux2TTRTrainer, steps=100_000, min_swap_layers=64, training_preview_ttr=False, **common)
    for seed in (0, 1):
        scene.sample(trainer, 8, seed)

    def serve(scene: Scene, **settings: Any) -> Any:
        options = {**common, "model": scene.model, **settings}
        return run_node(Flux2TTRTrainer, training=False, readiness_threshold=9.9, **options)

    return trainer, serve


def measure(rounds: int) -> dict[str, Row]:
    """Both sizes, all arms."""
    from comfy_nodes.nodes.approximate import ApproximateAttention

    def near_far(scene: Scene, *, gated: bool) -> Any:
        return run_node(ApproximateAttention, model=scene.model, only_if_faster=gated)

    small, large = make_scene(SMALL), make_scene(LARGE)
    hkr_trains, hkr = students(small, "hkr")
    near_far_trains, tiles = students(small, "near_far")
    found = {
        "768 tokens": compare(
            small,
            {
                "hkr trains": hkr_trains,
                "hkr": hkr(small),
                "hkr, float32": hkr(small, inference_mixed_precision=False),
                "hkr, only where faster": hkr(small, only_where_faster=True),
                "near_far trains": near_far_trains,
                "near_far": tiles(small),
                "near_far, only where faster": tiles(small, only_where_faster=True),
                "Approximate Attention": near_far(small, gated=True),
            },
            rounds,
            steps=2,
        ),
        "4,608 tokens": compare(
            large,
            {
                "hkr, only where faster": hkr(large, only_where_faster=True),
                "near_far, only where faster": tiles(large, only_where_faster=True),
                "Approximate Attention": near_far(large, gated=True),
            },
            rounds,
            steps=2,
        ),
    }
    return {f"{name}, {size}": row for size, rows in found.items() for name, row in rows.items()}


def main() -> int:
    """Read the command line, measure, print, and write where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    checkout = os.environ.get("COMFYUI_PATH", "")
    if not Path(checkout, "nodes.py").is_file():
        sys.stdout.write("COMFYUI_PATH does not name a ComfyUI checkout: nothing is measured\n")
        return 0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as models:
        start_comfyui(checkout, models)
        rows = measure(arguments.rounds)
    columns = list(next(iter(rows.values())))
    sys.stdout.write(f"{'':<46}{''.join(f'{name:>18}' for name in columns)}\n")
    for name, row in rows.items():
        sys.stdout.write(f"{name:<46}{''.join(f'{row[column]:>18.4f}' for column in columns)}\n")
    if arguments.json is not None:
        from comfyui_version import __version__ as comfyui

        facts = {"comfyui": comfyui, "torch": torch.__version__, "threads": 1, "rounds": arguments.rounds}
        arguments.json.write_text(json.dumps({"rows": rows, **facts}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
