from dataclasses import replace

import torch
from attn_dispatch import AttentionCall
from attn_dispatch.backends import TaylorBackend, TaylorBackendConfig
from attn_dispatch.backends.taylor_memory import taylor_bytes
from attn_kernels import taylor_feature_count, taylor_memory

BASE = replace(TaylorBackendConfig(), P=3, sub_head_blocks=1, early_probe=False)


def test_the_host_is_asked_once_a_run_for_each_size(make_call) -> None:
    asked: list[tuple[int, torch.device]] = []
    backend = TaylorBackend(BASE, reserve=lambda size, device: asked.append((size, device)))
    for _ in range(2):
        backend.begin_run()
        for tokens in (160, 160, 320, 160):
            backend(make_call(tokens=tokens))
        backend.end_run()
    assert len(asked) == 4
    assert asked[:2] == asked[2:]
    assert asked[1][0] > asked[0][0]
    assert asked[0][1] == torch.device("cpu")


def test_the_factor_multiplies_the_estimate(make_call) -> None:
    asked: list[int] = []
    for factor in (1.0, 2.5):
        config = replace(BASE, memory_reserve_factor=factor)
        TaylorBackend(config, reserve=lambda size, device: asked.append(size))(make_call())
    assert asked[0] == taylor_bytes(make_call(), 3, BASE.operator())
    assert asked[1] == int(2.5 * asked[0])


def test_the_estimate_covers_what_the_operator_states_and_the_answer(make_call) -> None:
    call, operator = make_call(tokens=3000), BASE.operator()
    held = taylor_memory(1, 2, 3000, 3000, 16, 12, terms=3, config=operator)
    assert taylor_bytes(call, 3, operator) == held + 2 * 3000 * (12 * 4 + 4)


def test_kernels_hold_the_sums_of_all_heads() -> None:
    config = replace(BASE, P=4, fused_full_kernel=True)
    q, v = torch.zeros(2, 24, 64, 32, device="meta"), torch.zeros(2, 24, 64, 128, device="meta")
    call = AttentionCall(q, q, v)
    sums = 2 * 24 * taylor_feature_count(32, 4)
    answer = 2 * 24 * 64 * (128 * 4 + 4)
    assert taylor_bytes(call, 4, config.operator()) == sums * (4 * 128 + 4) + answer
    stored = replace(config, s_store_bf16=True).operator()
    assert taylor_bytes(call, 4, stored) < sums * (4 * 128 + 4)
