"""Time one denoising step of a Flux transformer with exact attention and with each approximation.

    python benchmarks/bench_forward.py
    python benchmarks/bench_forward.py --scenes "narrow, 1K" --out here.json
    python benchmarks/bench_forward.py --scenes "" --fidelity
    python benchmarks/bench_forward.py --device cuda

The model is a diffusers ``FluxTransformer2DModel`` of Flux.1-dev's sizes with random weights: what it draws is noise,
what it costs is real. On a GPU it is the whole model in bfloat16, on a CPU a narrow cut and one block of full width in
float32, on one thread, timed by the process's own clock. Exact attention is the fastest backend of ``attn_dispatch``;
every approximation stands behind ``PaysOff``, so that exact attention answers where the cost model foretells no gain.
Beside time and memory stands each method's distance from exact attention on the embedded teacher's own queries, keys
and values: without it a speed-up means nothing. The learned student is distilled for it on eight images first.

Results go to ``benchmarks/results/forward-<device>.json``. A run of some scenes replaces those scenes in the file and
keeps the others, if they are of the same machine and versions.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from attn_dispatch import set_backend
from forward_fidelity import Distance, distances
from forward_meters import Row, Share, measure
from forward_methods import methods
from forward_scenes import Cut, Scene, build, cpu_scenes, cuda_scenes, inputs
from meters import device_name, machine_facts
from verdicts import as_json

RESULTS = Path(__file__).parent / "results"

TARGETS = (
    # Scene, method, least speed-up of the whole forward.
    ("Flux.1-dev, 2K", "near-far", 1.6),
    ("Flux.1-dev, 4K", "near-far", 3.5),
)
SLOWEST = 1.01
"""Most time that a forward may take where an approximation is offered, as a multiple of exact attention's."""


def run_scenes(scenes: Sequence[Scene], device: torch.device) -> tuple[list[Row], list[Share]]:
    """Measure the scenes, models of one cut after the other."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows: list[Row] = []
    shares: list[Share] = []
    for cut in dict.fromkeys(scene.cut for scene in scenes):
        of_cut = [scene for scene in scenes if scene.cut == cut]
        found = _run_cut(cut, of_cut, device, dtype)
        rows += found[0]
        shares += found[1]
    return rows, shares


def _run_cut(
    cut: Cut, scenes: Sequence[Scene], device: torch.device, dtype: torch.dtype
) -> tuple[list[Row], list[Share]]:
    model = build(cut, device, dtype)
    offered = methods(model)
    rows: list[Row] = []
    shares: list[Share] = []
    with torch.inference_mode():
        for scene in scenes:
            found, share = measure(scene, model, offered, inputs(scene, device, dtype))
            print_scene(share, found)
            rows += found
            shares.append(share)
    return rows, shares


def print_scene(share: Share, rows: Sequence[Row]) -> None:
    """Print the table of one scene."""
    print(f"\n{share.scene}: {share.tokens} tokens, {share.cut}")
    print(f"declining every call takes {share.declining:.4%} of the time")
    print(f"attention {share.profiled:.1%} of the time, at most {share.ceiling:.2f} times as fast without it")
    print(f"the whole Flux.1-dev: {share.whole:.1%} of the operations, at most {share.whole_ceiling:.2f} times")
    print(f"{'method':20}{'answered':>9}{'ms':>11}{'speed-up':>10}{'peak MiB':>10}{'foretold':>10}")
    for row in rows:
        if row.milliseconds is None or row.speed_up is None or row.peak_memory is None:
            print(f"{row.method:20}{'declined':>9}{'':31}{row.foretold:10.2f}")
            continue
        numbers = f"{row.milliseconds:11.1f}{row.speed_up:10.2f}{row.peak_memory:10.0f}{row.foretold:10.2f}"
        print(f"{row.method:20}{row.answered:9.0%}{numbers}", flush=True)


def verdicts(rows: Sequence[Row], shares: Sequence[Share]) -> list[dict[str, object]]:
    """Say what was asked for and what was measured; ``None`` where nothing was."""
    found: list[dict[str, object]] = []
    for scene, method, least in TARGETS:
        speeds = [r.speed_up for r in rows if r.scene == scene and r.method.startswith(method) and r.speed_up]
        best = max(speeds, default=None)
        found.append({"what": f"{method}, {scene}", "least": least, "measured": best, "met": best and best >= least})
    found.append(_time_verdict(rows, shares))
    found.append(_memory_verdict(rows))
    return found


def _time_verdict(rows: Sequence[Row], shares: Sequence[Share]) -> dict[str, object]:
    """Find the longest forward where an approximation answered, or what declining costs, whichever is more.

    A forward whose calls were all declined computes what exact attention computes; two timings of it differ by more
    than what declining takes, which is therefore timed alone.
    """
    found = [(1.0 / row.speed_up, f"{row.method}, {row.scene}") for row in rows if row.speed_up and row.answered]
    found += [(1.0 + share.declining, f"declining, {share.scene}") for share in shares]
    most, where = max(found, default=(None, "nowhere"))
    what = f"longest forward as a multiple of exact attention's ({where})"
    return {"what": what, "most": SLOWEST, "measured": most, "met": most and most <= SLOWEST}


def _memory_verdict(rows: Sequence[Row]) -> dict[str, object]:
    """Compare the peaks with that of exact attention in the same scene."""
    exact = {row.scene: row.peak_memory for row in rows if row.method == "exact"}
    ratios = [row.peak_memory / exact[row.scene] for row in rows if row.peak_memory and exact.get(row.scene)]  # type: ignore[operator]
    most = max(ratios, default=None)
    what = "highest peak of memory as a multiple of exact attention's"
    return {"what": what, "most": SLOWEST, "measured": most, "met": most and most <= SLOWEST}


def merged(
    before: dict[str, object], facts: dict[str, str], rows: Sequence[Row], shares: Sequence[Share]
) -> list[list]:  # type: ignore[type-arg]
    """Put new scenes in the place of old ones.

    Returns:
        Rows and shares, as dictionaries.

    Raises:
        ValueError: The older results are of another machine or other versions.
    """
    kept: list[list[dict[str, object]]] = [[], []]
    if before:
        if before["facts"] != facts:
            raise ValueError("the result file is of another machine or other versions; give another --out")
        new = {share.scene for share in shares}
        kept = [[one for one in before[key] if one["scene"] not in new] for key in ("rows", "shares")]  # type: ignore[attr-defined]
    return [old + [asdict(one) for one in found] for old, found in zip(kept, (rows, shares), strict=True)]


def print_verdicts(found: Sequence[dict[str, object]], fidelity: Sequence[dict[str, object]]) -> None:
    """Print distances, and what was asked for beside what was measured."""
    print("\ndistance from exact attention on the embedded teacher")
    for one in fidelity:
        print(f"{one['method']:20}{one['cosine_distance']:12.4f} cosine{one['relative_l2']:10.4f} relative L2")
    print()
    for one in found:
        bound = f"at least {one['least']}" if "least" in one else f"at most {one['most']}"
        measured = "not measured" if one["measured"] is None else f"{one['measured']:.3f}"
        verdict = "" if one["measured"] is None else "  met" if one["met"] else "  MISSED"
        print(f"{one['what']:90}{bound:>16}{measured:>14}{verdict}")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--scenes", help="names of scenes, with semicolons between; all")
    parser.add_argument("--out", type=Path, help="file of the result")
    parser.add_argument("--fidelity", action="store_true", help="measure the distances again where the file has them")
    return parser.parse_args()


def main() -> int:
    """Run the benchmark; 1 if a bound on time or memory is broken."""
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    torch.set_num_threads(1)
    scenes = cuda_scenes() if device.type == "cuda" else cpu_scenes()
    if arguments.scenes is not None:
        names = [name.strip() for name in arguments.scenes.split(";") if name.strip()]
        unknown = set(names) - {scene.name for scene in scenes}
        if unknown:
            print(f"no scene {', '.join(sorted(unknown))}; there are {'; '.join(scene.name for scene in scenes)}")
            return 2
        scenes = [scene for scene in scenes if scene.name in names]
    facts = machine_facts(device) | {"exact attention": set_backend("auto")}
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    path = arguments.out or RESULTS / f"forward-{'' if device.type == 'cuda' else 'cpu-'}{name}.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    merged(before, facts, (), ())  # Before the long part: does the file fit this machine?
    rows, shares = run_scenes(scenes, device)
    everything, all_shares = merged(before, facts, rows, shares)
    known: list[dict[str, object]] = [] if arguments.fidelity else before.get("fidelity") or []
    fidelity = known or [asdict(one) for one in distances()]
    asked = verdicts([Row(**one) for one in everything], [Share(**one) for one in all_shares])
    print_verdicts(asked, fidelity)
    result = {"facts": facts, "asked": asked, "shares": all_shares, "rows": everything, "fidelity": fidelity}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(as_json(result), indent=1) + "\n")
    print(f"\n{path}")
    return 0 if all(one["met"] is not False for one in asked[len(TARGETS) :]) else 1


__all__ = ["Distance", "main", "merged", "verdicts"]

if __name__ == "__main__":
    sys.exit(main())
