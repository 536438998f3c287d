"""Time every operator against the fastest exact attention of the same run.

    python packages/attn-kernels/benchmarks/bench_operators.py
    python packages/attn-kernels/benchmarks/bench_operators.py --device cuda
    python packages/attn-kernels/benchmarks/bench_operators.py --sizes 1024,4096 --only near-far,taylor --out here.json

Every operator is first compared with its specification on sampled queries of the very tensors that are timed; one that
differs has no ratio, and the exit status is 1. On a CPU everything runs on one thread and is timed by the process's own
clock. Fidelity is the distance from exact attention on synthetic data, smooth fields plus noise; it does not say how
far a model's images move.

The table ends with the promised ratios, and with the number of tokens from which each operator is faster than exact
attention: measured, and as the cost model has it that was fitted to every other size. Results go to
``benchmarks/results/<device>-<date>.json``.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from attn_kernels import fidelity
from attn_kernels.device_model import device_model
from attn_kernels.testing import error_ratio, make_qkv
from cases import Case, Tensors, make_cases
from meters import best_seconds, device_name, extra_memory, machine_facts
from peers import exact_cases, peer_cases
from scenes import CPU_SIZES, Scene, cpu_scenes, cuda_scenes
from verdicts import BreakEven, Measured, Row, as_json, check_bars, check_model

SAMPLED = 64
"""Queries on which an operator is compared with its specification and with exact attention."""
RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"


def largest_error(case: Case, dtype: torch.dtype) -> float:
    """Relative error of an operator against its specification above which it has no ratio."""
    if case.allowed is not None:
        return case.allowed
    return 1e-5 if dtype is torch.float32 else 2e-2


def make_tensors(scene: Scene, device: torch.device) -> Tensors:
    """Draw the tensors of a scene: a field that is smooth over every frame, plus noise."""
    parts = []
    for seed, grid in enumerate(scene.grids):
        before = scene.text if seed == 0 else 0
        local = replace(grid, start=before)
        parts.append(
            make_qkv(1, scene.heads, local.stop, scene.width, logit_std=scene.logit_std, seed=seed, smooth_grid=local)
        )
    q, k, v = (torch.cat(side, dim=2).to(device, scene.dtype) for side in zip(*parts, strict=True))
    generator = torch.Generator().manual_seed(0)
    return Tensors(q, k, v, torch.randperm(scene.tokens, generator=generator)[:SAMPLED].to(device))


def runnable(cases: Sequence[Case], t: Tensors) -> tuple[list[tuple[Case, float, torch.Tensor]], dict[str, str]]:
    """Run each case once and compare it; return those that are right, and why the others are not among them."""
    right, reasons = [], {}
    for case in cases:
        try:
            output = case.run()[:, :, t.rows]
            error = error_ratio(output, case.expected())
        except (RuntimeError, ValueError, ImportError) as problem:
            # A kernel that this GPU or version lacks, or too little memory: said in the result, the others go on.
            reasons[case.name] = f"cannot run: {str(problem).splitlines()[0][:200]}"
            continue
        if error <= largest_error(case, t.q.dtype):
            right.append((case, error, output))
        else:
            reasons[case.name] = f"wrong: relative error {error:.3g}"
    return right, reasons


def measure(scene: Scene, device: torch.device) -> tuple[list[Measured], dict[str, str]]:
    """Compare and time every operator on one scene."""
    t = make_tensors(scene, device)
    baselines = exact_cases(t)
    exact = baselines[0].expected()
    right, reasons = runnable([*baselines, *make_cases(scene, t), *peer_cases(scene, t)], t)
    memory = [extra_memory(case.run, device) for case, _, _ in right]
    seconds = best_seconds([case.run for case, _, _ in right], scene.rounds, device)
    names = {case.name for case in baselines}
    fastest = min(time for (case, _, _), time in zip(right, seconds, strict=True) if case.name in names)
    found = []
    for (case, error, output), own, extra in zip(right, seconds, memory, strict=True):
        distance = fidelity(output, exact.to(output))
        row = Row(
            scene=scene.name,
            operator=case.name,
            tokens=scene.tokens,
            image=scene.tokens - scene.text,
            heads=scene.heads,
            width=scene.width,
            dtype=str(scene.dtype).removeprefix("torch."),
            keys=case.keys,
            milliseconds=1e3 * own,
            speed_up=fastest / own,
            tflops=case.work.flops / own / 1e12,
            extra_memory=extra,
            error_to_specification=error,
            relative_l2=distance.relative_l2,
            cosine_distance=distance.cosine_distance,
            cosine_p99=distance.cosine_p99,
        )
        found.append(Measured(row, t.shape, case.work))
    return found, reasons


def print_scene(scene: Scene, found: Sequence[Measured], reasons: dict[str, str]) -> None:
    """Print the table of one scene."""
    print(f"\n{scene.name}: {scene.tokens} tokens, {scene.heads} heads of width {scene.width}, {scene.dtype}")
    print(f"{'operator':24}{'keys':>8}{'ms':>10}{'speed-up':>10}{'GFLOP/s':>10}{'MiB':>8}{'rel L2':>9}{'cosine':>9}")
    for row in (one.row for one in found):
        print(
            f"{row.operator:24}{row.keys:8.0f}{row.milliseconds:10.2f}{row.speed_up:10.2f}{1e3 * row.tflops:10.0f}"
            f"{row.extra_memory:8.0f}{row.relative_l2:9.4f}{row.cosine_distance:9.4f}"
        )
    for name, reason in reasons.items():
        print(f"{name:24}{reason}")


def print_verdicts(bars: Sequence[dict[str, object]], comparisons: Sequence[BreakEven]) -> None:
    """Print promised and measured ratios, and the break-even points."""
    print("\npromised ratios" if bars else "\nno promised ratio was run")
    for bar in bars:
        verdict = "met" if bar["met"] else "MISSED"
        what = f"{bar['operator']} at {bar['image']} tokens, {bar['scene']}"
        print(f"{what:48}{bar['least']:8.2f}x promised{bar['measured']:8.2f}x measured  {verdict}")
    if comparisons:
        print("\nfaster than exact attention from ... tokens (nan: not at these sizes)")
        print(f"{'operator':40}{'measured':>9}{'model':>8}{'stored':>8}{'time off by':>12}")
    for one in comparisons:
        verdict = "" if one.agrees else "  MODEL DISAGREES"
        numbers = f"{one.measured:9.0f}{one.calibrated:8.0f}{one.stored:8.0f}{one.error:11.2f}x"
        print(f"{one.scene + ': ' + one.operator:40}{numbers}{verdict}")


def result_path(device: torch.device) -> Path:
    """``<device>-<date>.json`` in the folder of results."""
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    kind = "" if device.type == "cuda" else "cpu-"
    return RESULTS / f"{kind}{name}-{time.strftime('%Y-%m-%d')}.json"


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--sizes", type=lambda text: tuple(int(part) for part in text.split(",")), default=CPU_SIZES,
        help="image tokens on a CPU; the grid is square"
    )  # fmt: skip
    parser.add_argument("--only", help="beginnings of operators' names, with commas between; all")
    parser.add_argument("--rounds", type=int, help="times that every operator is timed; as the scene says")
    parser.add_argument("--out", type=Path, help="file of the result; with --only or --sizes nothing is written else")
    parser.add_argument("--strict", action="store_true", help="exit with 1 where a promised ratio is missed, too")
    return parser.parse_args()


def main() -> int:
    """Run the benchmark; 1 if an operator differs from its specification."""
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    torch.set_num_threads(1)
    scenes = cuda_scenes() if device.type == "cuda" else cpu_scenes(arguments.sizes)
    if arguments.only:
        kept = tuple(arguments.only.split(","))
        scenes = [replace(s, operators=tuple(name for name in s.operators if name.startswith(kept))) for s in scenes]
    found: list[Measured] = []
    reasons: dict[str, str] = {}
    with torch.inference_mode():
        for scene in (scene for scene in scenes if scene.operators):
            scene = scene if arguments.rounds is None else replace(scene, rounds=arguments.rounds)
            new, problems = measure(scene, device)
            print_scene(scene, new, problems)
            found += new
            reasons |= {f"{scene.name}, {scene.tokens} tokens: {name}": why for name, why in problems.items()}
    rows = [one.row for one in found]
    bars = check_bars(rows, device.type)
    fitted, comparisons = check_model(found, device_model(device))
    print_verdicts(bars, comparisons)
    path = arguments.out or (None if arguments.only or arguments.sizes != CPU_SIZES else result_path(device))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        result = {"facts": machine_facts(device), "promised": bars, "break_even": comparisons, "model": fitted}
        path.write_text(json.dumps(as_json({**result, "rows": rows, "left_out": reasons}), indent=1) + "\n")
        print(f"\n{path}")
    wrong = any(why.startswith("wrong") for why in reasons.values())
    missed = arguments.strict and not all(bar["met"] for bar in bars)
    return 1 if wrong or missed else 0


if __name__ == "__main__":
    sys.exit(main())
