"""Error against cost of every operator on real queries, keys and values: every layer of the embedded teacher.

    uv run scripts/operator_fidelity.py

The teacher samples held-out prompts at 1,024 image tokens; each of its attention calls is answered by every operator
too, and the answers are compared with the teacher's. Cost is the operations of matrix products, as a share of those of
exact attention, from ``attn_kernels.cost``. Writes ``benchmarks/results/operator-fidelity.json`` and draws
``docs/img/operators.svg``.
"""

import argparse
import importlib.metadata
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from attn_dispatch import AttentionCall, NativeAttention, TokenLayout
from attn_kernels import (
    NearFarConfig,
    cosine_distance,
    fit_projection,
    hybrid_attention,
    kernel_regression,
    landmark_attention,
    near_far_attention,
    pooled_landmark_attention,
    strided_landmarks,
    taylor_attention,
    window_attention_2d,
)
from attn_kernels.cost import (
    AttentionShape,
    attend_work,
    exact_work,
    hybrid_work,
    kernel_regression_work,
    near_far_work,
    taylor_work,
    window_keys_2d,
)
from attn_kernels.device_model import Work
from attn_kernels.fidelity import upper_quantile
from torch import Tensor
from torch.nn import functional as F
from ttr_distill.tiny import TinySampler, heldout_prompts, load_teacher

ROOT = Path(__file__).parents[1]
RANK = 16
"""Width to which hybrid attention projects queries and keys."""


@dataclass(frozen=True)
class Setting:
    """An operator with one setting.

    Attributes:
        family: Name of its line in the picture.
        label: The setting, beside its point.
        run: Answers a call.
        work: What it costs.
    """

    family: str
    label: str
    run: Callable[[AttentionCall, TokenLayout], Tensor]
    work: Callable[[AttentionShape, TokenLayout], Work]


def near_far(tile: int, top_k: int) -> Setting:
    """Near-far attention with neighbours of one tile."""
    config = NearFarConfig(tile, 1, top_k)
    return Setting(
        "near-far, chosen tiles of 4" if top_k else "near-far, no chosen tiles",
        f"top {top_k}" if top_k else f"tile {tile}",
        lambda call, layout: near_far_attention(call.q, call.k, call.v, grids=layout.grids, config=config).out,
        lambda shape, layout: near_far_work(shape, grids=layout.grids, config=config),
    )


def window(radius: int) -> Setting:
    """Exact attention to the tokens near by, and to all text."""
    return Setting(
        "window",
        f"radius {radius}",
        lambda call, layout: window_attention_2d(call.q, call.k, call.v, grids=layout.grids, radius=radius).out,
        lambda shape, layout: attend_work("window", shape, window_keys_2d(shape.keys, layout.grids, radius)),
    )


def strided(fraction: float) -> Setting:
    """Exact attention to evenly spaced tokens, and to all text."""

    def index(layout: TokenLayout) -> Tensor:
        return strided_landmarks(layout.length, layout.text, fraction=fraction, minimum=1, maximum=0)

    return Setting(
        "strided landmarks",
        f"{fraction:.0%}",
        lambda call, layout: landmark_attention(call.q, call.k, call.v, index(layout)).out,
        lambda shape, layout: attend_work("landmark", shape, index(layout).numel()),
    )


def pooled(tile: int) -> Setting:
    """Attention to the means of tiles, and to all text."""

    def keys(layout: TokenLayout) -> int:
        tiles = sum(-(-grid.rows // tile) * -(-grid.columns // tile) for grid in layout.grids)
        return layout.length - sum(grid.tokens for grid in layout.grids) + tiles

    return Setting(
        "pooled landmarks",
        f"tile {tile}",
        lambda call, layout: pooled_landmark_attention(call.q, call.k, call.v, grids=layout.grids, tile=tile).out,
        lambda shape, layout: attend_work("landmark", shape, keys(layout)),
    )


def taylor(terms: int) -> Setting:
    """The truncated series, centred."""
    return Setting(
        "Taylor",
        f"P = {terms}",
        lambda call, layout: taylor_attention(call.q, call.k, call.v, terms=terms).out,
        lambda shape, layout: taylor_work(shape, terms=terms),
    )


def hybrid(radius: int, combine: Literal["shared", "additive"]) -> Setting:
    """A window, and the series of low rank for the other keys; the projection is fitted to each call."""

    def run(call: AttentionCall, layout: TokenLayout) -> Tensor:
        projection = fit_projection(call.q, call.k, rank=RANK)
        return hybrid_attention(
            call.q, call.k, call.v, projection, grids=layout.grids, radius=radius, terms=3, combine=combine
        ).out

    def work(shape: AttentionShape, layout: TokenLayout) -> Work:
        keys = window_keys_2d(shape.keys, layout.grids, radius)
        return hybrid_work(shape, near_keys=keys, rank=RANK, terms=3)

    name = "hybrid, one denominator" if combine == "shared" else "hybrid, additive"
    return Setting(name, f"radius {radius}", run, work)


def untrained_map() -> Setting:
    """Kernel regression on ELU + 1 of the queries and keys themselves."""

    def run(call: AttentionCall, layout: TokenLayout) -> Tensor:
        return kernel_regression(F.elu(call.q) + 1.0, F.elu(call.k) + 1.0, call.v).out

    return Setting(
        "ELU + 1 features, untrained",
        "",
        run,
        lambda shape, layout: kernel_regression_work(shape, features=shape.width),
    )


def settings() -> list[Setting]:
    """Everything in the picture."""
    return [
        *(near_far(tile, top_k) for tile, top_k in ((8, 0), (4, 0), (2, 0), (4, 2), (4, 4), (4, 8), (4, 16))),
        *(window(radius) for radius in (1, 2, 4, 8)),
        *(strided(fraction) for fraction in (0.02, 0.05, 0.1, 0.2)),
        *(pooled(tile) for tile in (8, 4, 2)),
        *(taylor(terms) for terms in (2, 3, 4)),
        *(hybrid(radius, "shared") for radius in (1, 2, 4)),
        *(hybrid(radius, "additive") for radius in (1, 2, 4)),
        untrained_map(),
    ]


@dataclass
class Meter:
    """An attention handler that returns the teacher's answer and measures every operator on the same call."""

    chosen: list[Setting]
    distances: dict[int, list[Tensor]] = field(default_factory=dict)
    costs: dict[int, float] = field(default_factory=dict)

    def begin_run(self) -> None:
        """Part of the handler's protocol."""

    def end_run(self) -> None:
        """Part of the handler's protocol."""

    def __call__(self, call: AttentionCall, native: NativeAttention) -> Tensor:
        """Answer as the teacher."""
        teacher = native(call)
        if call.layout is None:
            raise ValueError("the host gives no token layout")
        shape = AttentionShape.of(call.q, call.k, call.v)
        for place, setting in enumerate(self.chosen):
            distance = cosine_distance(setting.run(call, call.layout), teacher)
            self.distances.setdefault(place, []).append(distance.flatten())
            self.costs[place] = setting.work(shape, call.layout).flops / exact_work(shape).flops
        return teacher

    def rows(self) -> list[dict[str, str | float]]:
        """One row per setting; a query without an answer counts in ``undefined`` and in no distance."""
        rows: list[dict[str, str | float]] = []
        for place, setting in enumerate(self.chosen):
            every = torch.cat(self.distances[place])
            some = every[every.isfinite()]
            rows.append(
                {
                    "operator": setting.family,
                    "setting": setting.label,
                    "cost": round(self.costs[place], 5),
                    "cosine_distance": float(f"{some.mean().item():.4g}"),
                    "cosine_p95": float(f"{upper_quantile(some, 0.95).item():.4g}"),
                    "cosine_p99": float(f"{upper_quantile(some, 0.99).item():.4g}"),
                    "undefined": float(f"{1 - some.numel() / every.numel():.4g}"),
                }
            )
        return rows


def measure(prompts: int, steps: int) -> dict[str, object]:
    """Sample from the teacher and measure every operator on the way."""
    meter = Meter(settings())
    sampler = TinySampler(load_teacher(), rows=32, columns=32, steps=steps, guidance=3.0)
    with torch.inference_mode():
        sampler.sample(heldout_prompts()[:prompts], [2000 + i for i in range(prompts)], meter)
    calls = {len(found) for found in meter.distances.values()}
    facts = {"torch": importlib.metadata.version("torch"), "image_tokens": 1024, "heads": sampler.heads}
    facts |= {"width": sampler.width, "layers": len(sampler.layers), "calls": calls.pop()}
    return {"facts": {**facts, "prompts": prompts, "steps": steps}, "rows": meter.rows()}


def draw(result: dict[str, object], path: Path) -> None:
    """Draw error against cost, one line per operator."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "operators", "font.family": "sans-serif", "font.size": 9}
    from matplotlib import pyplot as plt

    rows = result["rows"]
    families = list(dict.fromkeys(row["operator"] for row in rows))  # type: ignore[attr-defined]
    colours = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]
    figure, axes = plt.subplots(figsize=(8.2, 5.2), layout="constrained")
    for colour, marker, family in zip(colours, "oosD^vP*X", families, strict=False):
        points = sorted((row for row in rows if row["operator"] == family), key=lambda row: row["cost"])  # type: ignore
        x, y = ([row[name] for row in points] for name in ("cost", "cosine_distance"))
        axes.plot(x, y, color=colour, linewidth=1.2, marker=marker, markersize=5, label=family)
        for row in points:
            note = row["setting"] + (f" ({row['undefined']:.1%} undefined)" if row["undefined"] else "")
            place = (row["cost"], row["cosine_distance"])
            left = family in ("window", "pooled landmarks", "near-far, chosen tiles of 4")
            beside, side = ((-5, -8), "right") if left else ((5, 3), "left")
            axes.annotate(note, place, beside, textcoords="offset points", color=colour, fontsize=6.5, ha=side)
    axes.axvline(1.0, color="0.5", linewidth=0.8, linestyle=":")
    axes.annotate("exact attention", (1.0, 0.02), (-3, 0), xycoords=("data", "axes fraction"),
                  textcoords="offset points", rotation=90, ha="right", fontsize=7, color="0.4")  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="operations, as a share of exact attention's (1,036 tokens)")
    axes.set_ylabel("mean cosine distance from the teacher's attention")
    costs = [row["cost"] for row in rows]  # type: ignore[attr-defined]
    axes.set_xlim(0.6 * min(costs), 3 * max(costs))
    axes.grid(True, which="major", linewidth=0.4, alpha=0.5)
    axes.legend(frameon=False, fontsize=8, loc="lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Measure, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "operator-fidelity.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "img" / "operators.svg")
    parser.add_argument("--redraw", action="store_true", help="draw the result that is there")
    arguments = parser.parse_args()
    if not arguments.redraw:
        result = measure(arguments.prompts, arguments.steps)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    result = json.loads(arguments.out.read_text())
    for row in result["rows"]:
        print(f"{row['operator']:28}{row['setting']:16}{row['cost']:9.4f}{row['cosine_distance']:12.3g}"
              f"{row['cosine_p99']:12.3g}{row['undefined']:9.2%}")  # fmt: skip
    draw(result, arguments.picture)


if __name__ == "__main__":
    main()
