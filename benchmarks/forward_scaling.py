"""What the cost model says beyond the sizes that were measured, up to a million tokens, and what ranks would send.

    python benchmarks/forward_scaling.py

Nothing here is measured: times are the stored model of a device (``attn_kernels.device_model``), whose rates for GPUs
come from matrix products, copies and compiled code. Bytes are counted (``attn_kernels.sequence_shards``) and exact.
Writes ``benchmarks/results/scaling-model.json``; the same sources give the same file.
"""

import json
from pathlib import Path

import torch
from attn_kernels import NearFarConfig, TokenGrid, near_far_keys
from attn_kernels.cost import (
    AttentionShape,
    attend_work,
    exact_work,
    kernel_regression_work,
    near_far_work,
    taylor_work,
)
from attn_kernels.device_model import DeviceModel, gpu_model
from attn_kernels.sequence_shards import Shards, received_bytes

RESULT = Path(__file__).parent / "results" / "scaling-model.json"
SIDES = (64, 128, 256, 512, 1024)
"""Rows and columns of image tokens; a token is 16 x 16 pixels."""
TEXT, HEADS, WIDTH, LAYERS, PARAMETERS = 512, 24, 128, 57, 6.46e9
"""Flux.1-dev: text tokens, heads and their width, attention layers, parameters that a token meets."""
LANDMARKS = 0.08
"""Share of the image tokens that the ``hkr`` student keeps as landmarks."""
CONFIGS = (NearFarConfig(4, 1, 8), NearFarConfig(8, 1, 2), NearFarConfig(16, 1, 0))
RANKS = (4, 8)


def modelled(model: DeviceModel, dtype: torch.dtype) -> list[dict[str, object]]:
    """Times of one attention and of one forward at every size."""
    rows: list[dict[str, object]] = []
    rate = model.flops[str(dtype).removeprefix("torch.")]
    for side in SIDES:
        grid = TokenGrid(TEXT, side, side)
        shape = AttentionShape(1, HEADS, grid.stop, grid.stop, WIDTH, WIDTH)
        linear = 2.0 * PARAMETERS * grid.stop / rate
        exact = model.seconds(exact_work(shape), dtype)
        works = {"exact": [exact_work(shape)]}
        works |= {_name(config): [near_far_work(shape, grids=[grid], config=config)] for config in CONFIGS}
        landmarks = attend_work("landmark", shape, TEXT + LANDMARKS * grid.tokens)
        works |= {"hkr": [kernel_regression_work(shape, features=256, layers=(512, 512)), landmarks]}
        works |= {"taylor P3": [taylor_work(shape, terms=3)]}
        for name, parts in works.items():
            own = sum(model.seconds(work, dtype) for work in parts)
            keys = next((near_far_keys([grid], grid.stop, c) for c in CONFIGS if _name(c) == name), None)
            rows.append(
                {
                    "tokens": grid.stop,
                    "method": name,
                    "keys": grid.stop if name == "exact" else keys,
                    "attention_ms": 1e3 * own,
                    "attention_speed_up": exact / own,
                    "forward_speed_up": (linear + LAYERS * exact) / (linear + LAYERS * own),
                    "ceiling": (linear + LAYERS * exact) / linear,
                }
            )
    return rows


def traffic() -> list[dict[str, object]]:
    """Bytes that one rank in the middle receives in one call, bfloat16."""
    rows: list[dict[str, object]] = []
    for ranks in RANKS:
        for side in SIDES:
            grid = TokenGrid(TEXT, side, side)
            for config in (NearFarConfig(8, 1, 0), NearFarConfig(8, 1, 2)):
                shards = Shards.even(grid, config, ranks)
                sizes = {"batch": 1, "heads": HEADS, "width": WIDTH, "value_width": WIDTH, "itemsize": 2}
                found = received_bytes(shards, ranks // 2, **sizes)
                rows.append(
                    {"ranks": ranks, "tokens": grid.stop, "method": _name(config), **found._asdict()}
                    | {"total": found.total, "all_keys": _all_keys(grid.stop, ranks)}
                )
    return rows


def _all_keys(tokens: int, ranks: int) -> int:
    """Bytes of the keys and values of all other ranks: what ring attention passes on."""
    return tokens * (ranks - 1) // ranks * HEADS * 2 * WIDTH * 2


def _name(config: NearFarConfig) -> str:
    return f"near-far t{config.tile} k{config.top_k}"


def result() -> dict[str, object]:
    """Everything, as values that JSON can hold."""
    model = gpu_model("sm90")
    facts = {"device": model.name, "source": model.source}
    found: dict[str, object] = {"facts": facts, "rows": modelled(model, torch.bfloat16), "traffic": traffic()}
    return json.loads(json.dumps(found), parse_float=lambda text: float(f"{float(text):.6g}"))  # type: ignore[no-any-return]


def main() -> None:
    """Write the file."""
    RESULT.write_text(json.dumps(result(), indent=1) + "\n", encoding="utf-8")
    print(RESULT)


if __name__ == "__main__":
    main()
