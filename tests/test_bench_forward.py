"""The forward benchmark measures what it says: exact attention where it declines, memory, shares, verdicts."""

import importlib
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from attn_dispatch import AttentionRouter, Route

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def load(name: str) -> ModuleType:
    folder = str(ROOT / "benchmarks")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)


scenes = load("forward_scenes")
ways = load("forward_methods")
meters = load("forward_meters")
bench = load("bench_forward")
TINY = scenes.Cut(0, 1, 1)


def measured(scene, offered=None):
    model = scenes.build(scene.cut, CPU, torch.float32)
    arguments = scenes.inputs(scene, CPU, torch.float32)
    with torch.inference_mode():
        return meters.measure(scene, model, offered or ways.methods(model), arguments)


@pytest.fixture(scope="module")
def large():
    return measured(scenes.Scene("large", TINY, (64, 64), rounds=1))


def test_the_scene_is_what_it_says():
    scene = scenes.Scene("references", TINY, (8, 12), references=2)
    arguments = scenes.inputs(scene, CPU, torch.float32)
    assert arguments["hidden_states"].shape[1] == 8 * 12 + 2 * 64 * 64 == scene.tokens - scenes.TEXT
    call = ways.empty_call(scene, CPU, torch.float32)
    assert call.q.shape == (1, 1, scene.tokens, 128)
    assert call.layout.grids[0].rows == 8
    assert call.layout.references[1].stop == scene.tokens


def test_rows_beyond_256_keep_their_names_in_half_precision():
    arguments = scenes.inputs(scenes.Scene("large", TINY, (512, 2)), CPU, torch.bfloat16)
    assert arguments["hidden_states"].dtype is torch.bfloat16
    assert len(arguments["img_ids"][:, 1].unique()) == 512


def test_what_does_not_pay_off_is_declined_and_costs_nothing_else():
    rows, share = measured(scenes.Scene("small", TINY, (24, 24), rounds=2))
    assert [row.answered for row in rows] == [0.0] * 5
    assert all(row.milliseconds is not None for row in rows)
    assert all("times as fast as exact attention" in row.declined for row in rows[1:])
    assert 0 < share.declining < 0.01


def test_what_is_declined_is_not_timed_where_there_is_time_for_one_round(large):
    rows, _ = large
    assert {row.method: row.milliseconds is None for row in rows} == {
        "exact": False,
        "near-far t4 k8": False,
        "near-far t8 k2": False,
        "hkr": True,
        "taylor": True,
    }


def test_near_far_answers_where_it_pays_off(large):
    rows, _ = large
    answered = {row.method: row for row in rows if row.answered}
    assert set(answered) == {"near-far t4 k8", "near-far t8 k2"}
    assert all(row.answered == 1.0 and row.foretold > 1.0 for row in answered.values())


def test_the_share_of_attention_is_near_that_of_its_operations(large):
    _, share = large
    assert share.profiled == pytest.approx(scenes.attention_share(4608, TINY), abs=0.3)
    assert share.ceiling == pytest.approx(1 / (1 - share.profiled))


@pytest.mark.parametrize("cut", [scenes.Cut(0, 1, 2), scenes.Cut(1, 0, 2)], ids=["single", "double"])
def test_memory_of_a_forward_is_not_above_exact_attention(cut):
    # The size at which near-far attention begins to pay off; in smaller models its few MiB of workspace show.
    scene = scenes.Scene("forced", cut, (48, 48), rounds=1)
    model = scenes.build(scene.cut, CPU, torch.float32)
    exact, *others = ways.methods(model)
    # Without the guard, so that every approximation answers.
    forced = [replace(one, router=AttentionRouter([Route(one.router.routes[0].backend)])) for one in others[:3]]
    rows, _ = measured(scene, [exact, *forced])
    assert all(row.answered == 1.0 for row in rows[1:])
    assert rows[0].peak_memory > 8 * scene.tokens * 256 * 4 / 2**20  # Queries, keys, values and the network's inside.
    assert all(row.peak_memory <= 1.01 * rows[0].peak_memory for row in rows)


def test_shares_of_the_whole_model_are_those_of_its_arithmetic():
    # 2 x 6.46e9 x 4,608 operations outside attention; 57 layers of width 3,072 inside.
    assert scenes.attention_share(4608) == pytest.approx(14.87 / (14.87 + 59.54), abs=2e-3)
    assert scenes.ceiling(scenes.attention_share(16896)) == pytest.approx(1.92, abs=0.01)
    assert scenes.attention_share(4608, scenes.BLOCK) == pytest.approx(scenes.attention_share(4608))
    assert scenes.attention_share(4608, scenes.NARROW) > 2 * scenes.attention_share(4608)


def row(scene="a", method="near-far", speed_up=1.5, peak=100.0, answered=1.0):
    return meters.Row(scene, method, answered, None, 1.0, 10.0, speed_up, peak)


def share(scene="a", declining=0.0):
    return meters.Share(scene, "cut", 1, 0.5, 2.0, 0.5, 0.5, 2.0, declining)


def test_a_slow_answer_costly_declines_and_high_memory_break_the_bounds():
    exact = row(method="exact", speed_up=1.0, answered=0.0)
    *_, time, memory = bench.verdicts([exact, row()], [share()])
    assert (time["met"], memory["met"]) == (True, True)
    *_, time, memory = bench.verdicts([exact, row(speed_up=0.9, peak=110.0)], [share()])
    assert (time["met"], memory["met"]) == (False, False)
    assert time["measured"] == pytest.approx(1 / 0.9)
    assert memory["measured"] == pytest.approx(1.1)
    *_, time, _ = bench.verdicts([exact, row()], [share(declining=0.02)])
    assert time["measured"] == pytest.approx(1.02)


def test_what_was_not_run_is_not_measured():
    assert [one["measured"] for one in bench.verdicts([], [])] == [None] * 4
    first, *_ = bench.verdicts([row(scene="Flux.1-dev, 2K", method="near-far t8 k2", speed_up=1.7)], [])
    assert (first["measured"], first["met"]) == (1.7, True)


def test_new_scenes_replace_old_ones_of_the_same_machine():
    facts = {"device": "one"}
    before = {"facts": facts, "rows": [asdict(row("a")), asdict(row("b"))], "shares": [asdict(share("a"))]}
    rows, shares = bench.merged(before, facts, [row("b", speed_up=2.0)], [share("b")])
    assert [(one["scene"], one["speed_up"]) for one in rows] == [("a", 1.5), ("b", 2.0)]
    assert [one["scene"] for one in shares] == ["a", "b"]
    with pytest.raises(ValueError, match="another machine"):
        bench.merged(before, {"device": "two"}, [], [])


def test_distances_are_those_of_real_calls():
    found = {one.method: one for one in load("forward_fidelity").distances(side=24, steps=1, images=1)}
    assert found["near-far t4 k8"].cosine_distance < 0.01
    assert found["near-far t8 k2"].cosine_distance < 0.01
    assert found["taylor"].cosine_distance > 0.05
    assert found["hkr, untrained"].relative_l2 > 0.2
    assert found["hkr"].updates == 8
    assert found["hkr"].relative_l2 < found["hkr, untrained"].relative_l2


def test_the_stored_model_of_large_sizes_is_that_of_the_sources():
    scaling = load("forward_scaling")
    import json

    assert scaling.result() == json.loads(scaling.RESULT.read_text(encoding="utf-8"))


def test_more_ranks_and_no_chosen_tiles_send_less_than_all_keys():
    rows = load("forward_scaling").traffic()
    largest = [one for one in rows if one["tokens"] == max(each["tokens"] for each in rows)]
    without = [one for one in largest if one["ring"] == 0]
    assert len(without) == 2
    assert all(10 * one["total"] < one["all_keys"] for one in without)
