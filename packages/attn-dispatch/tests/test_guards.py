from dataclasses import replace

import pytest
import torch
from attn_dispatch import AttentionCall, LayerKey, LayerRange, MinTokens, SigmaBelow, StepContext, TokenLayout
from attn_dispatch.backends import NearFarBackend, TaylorBackend, TaylorBackendConfig
from attn_dispatch.guards import PaysOff
from attn_kernels import NearFarConfig, TaylorConfig, TokenGrid
from attn_kernels.blocked_cost import taylor_blocked_work
from attn_kernels.cost import AttentionShape, exact_work, taylor_work
from attn_kernels.device_model import DeviceModel, Work, cpu_model
from torch._subclasses.fake_tensor import FakeTensorMode


def make_call(layer: LayerKey | None = None, sigma: float | None = None, keys: int = 4) -> AttentionCall:
    q, kv = torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, keys, 4)
    return AttentionCall(q, kv, kv, layer=layer, step=None if sigma is None else StepContext(sigma))


ACROSS = LayerRange(LayerKey("double", 0), LayerKey("single", 2))


@pytest.mark.parametrize(
    ("guard", "layer", "reason"),
    [
        (ACROSS, "double:0", None),
        (ACROSS, "double:18", None),
        (ACROSS, "single:2", None),
        (ACROSS, "single:3", "layer single:3 is outside double:0..single:2"),
        (LayerRange(LayerKey("double", 1), LayerKey("single", 2)), "double:0", "layer double:0 is outside double:1.."),
        (LayerRange(1, 3), "single:1", None),
        (LayerRange(1, 3), "double:3", None),
        (LayerRange(1, 3), "single:4", "layer single:4 is outside 1..3"),
        (LayerRange(1, 3, "single"), "double:2", "layer double:2 is outside single:1..3"),
        (LayerRange(1, 3, "single"), "single:0", "layer single:0 is outside single:1..3"),
    ],
)
def test_layer_range(guard: LayerRange, layer: str, reason: str | None) -> None:
    answer = guard(make_call(LayerKey.parse(layer)))
    if reason is None:
        assert answer is None
    else:
        assert answer is not None
        assert answer.startswith(reason)


def test_what_the_host_does_not_tell_is_refused() -> None:
    assert LayerRange(0, 99)(make_call()) == "the host does not name the layer"
    assert SigmaBelow(2.0)(make_call()) == "the host does not tell the noise level"


def test_sigma_below_excludes_its_limit() -> None:
    guard = SigmaBelow(0.8)
    assert guard(make_call(sigma=0.79)) is None
    assert guard(make_call(sigma=0.8)) == "sigma 0.8 is not below 0.8"


def test_min_tokens_includes_its_limit() -> None:
    guard = MinTokens(7)
    assert guard(make_call(keys=7)) is None
    assert guard(make_call(keys=6)) == "6 keys are fewer than 7"


@pytest.mark.parametrize(
    "arguments",
    [
        (3, 2),
        (-1, 2),
        (LayerKey("single", 0), LayerKey("double", 0)),
        (LayerKey("single", 0), 3),
        (LayerKey("single", 0), LayerKey("single", 3), "single"),
    ],
)
def test_an_impossible_layer_range_is_refused(arguments: tuple[LayerKey | int, LayerKey | int]) -> None:
    with pytest.raises(ValueError, match="first"):
        LayerRange(*arguments)


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan"), float("inf")])
def test_an_impossible_sigma_limit_is_refused(limit: float) -> None:
    with pytest.raises(ValueError, match="limit"):
        SigmaBelow(limit)


def test_min_tokens_must_be_positive() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        MinTokens(0)


# One operation, value or exponential a nanosecond, whatever the dtype; half the rates for what is not exact attention.
PLAIN = DeviceModel(
    name="plain",
    source="made up",
    flops={"float32": 1e9, "bfloat16": 4e9},
    exponentials=1e30,
    products=1e30,
    bandwidth=1e30,
    launch_seconds=0.0,
    overlaps=False,
    efficiency={"exact": 1.0, "other": 0.5},
)


def flops(count: float, operator: str = "ours") -> Work:
    return Work(operator, count, 0.0, 0.0, 0.0, 1)


def test_a_call_pays_off_below_the_time_of_exact_attention() -> None:
    call = make_call(keys=100)
    exact = exact_work(AttentionShape.of(call.q, call.k, call.v)).flops
    assert PaysOff(lambda call: flops(0.49 * exact), model=PLAIN)(call) is None
    reason = PaysOff(lambda call: flops(0.51 * exact), model=PLAIN)(call)
    assert reason == "predicted 0.98 times as fast as exact attention at 100 keys"
    assert PaysOff(lambda call: flops(0.5 * exact), model=PLAIN)(call) is not None


def test_more_than_break_even_can_be_asked_for() -> None:
    call = make_call(keys=100)
    exact = exact_work(AttentionShape.of(call.q, call.k, call.v)).flops
    assert PaysOff(lambda call: flops(0.2 * exact), speed_up=2.4, model=PLAIN)(call) is None
    reason = PaysOff(lambda call: flops(0.2 * exact), speed_up=2.6, model=PLAIN)(call)
    assert reason == "predicted 2.5 times as fast as exact attention at 100 keys, 2.6 are asked for"


def test_estimates_are_kept_per_size_work_and_dtype() -> None:
    guard = PaysOff(lambda call: flops(1e3 if call.layer is None else 1e9), model=PLAIN)
    call = make_call(keys=100)
    first, other = guard.estimate(call), guard.estimate(replace(call, layer=LayerKey("single", 0)))
    assert guard.estimate(call) is first
    assert other is not first
    assert first is not None
    assert other is not None
    assert other.seconds > first.seconds
    half = replace(call, q=call.q.bfloat16(), k=call.k.bfloat16(), v=call.v.bfloat16())
    halved = guard.estimate(half)
    assert halved is not None
    assert halved.exact_seconds == pytest.approx(first.exact_seconds / 4)
    longer = guard.estimate(make_call(keys=200))
    assert longer is not None
    assert longer.exact_seconds == pytest.approx(2 * first.exact_seconds)


def test_what_costs_nobody_knows_does_not_pay_off() -> None:
    assert PaysOff(lambda call: None, model=PLAIN)(make_call()) == "the cost of this call is not known"


def test_the_stored_model_of_the_device_answers_by_default() -> None:
    guard = PaysOff(TaylorBackend(TaylorBackendConfig.recommended()).work)
    short, long = torch.zeros(1, 1, 64, 64), torch.zeros(1, 1, 1, 64).expand(1, 1, 400_000, 64)
    assert guard(AttentionCall(short, short, short)) is not None
    assert guard(AttentionCall(long, long, long)) is None


def test_backends_say_what_their_calls_take() -> None:
    layout = TokenLayout(1029, ((0, 5),), (TokenGrid(5, 32, 32),))
    x = torch.zeros(1, 2, 1029, 16)
    call = AttentionCall(x, x, x, layout=layout)
    small, large = (NearFarBackend(NearFarConfig(tile=4, radius=radius, top_k=0)).work(call) for radius in (0, 2))
    assert small is not None
    assert large is not None
    assert small.flops < large.flops < exact_work(AttentionShape.of(x, x, x)).flops
    assert NearFarBackend().work(replace(call, layout=None)) is None
    assert NearFarBackend(None).work(call) is None


def test_a_taylor_backend_says_what_its_form_and_block_sizes_take() -> None:
    x = torch.zeros(1, 2, 1029, 16)
    call, cut = AttentionCall(x, x, x), AttentionShape(1, 4, 1029, 1029, 8, 8)
    plain = TaylorBackendConfig(P=3, sub_head_blocks=2, early_probe=False)
    work = TaylorBackend(plain).work(call)
    assert work == taylor_blocked_work(cut, terms=3, config=TaylorConfig(key_chunk=16))
    assert work is not None
    large = TaylorBackend(replace(plain, block_size_q=512, block_size_k=512)).work(call)
    assert large is not None
    assert large.launches < work.launches / 8
    # The torch form answers on a CPU whatever is wished for; of it the wish for kernels chooses the streaming path.
    streamed = TaylorBackend(replace(plain, fused_kernel=True)).work(call)
    assert streamed == taylor_blocked_work(cut, terms=3, config=TaylorConfig(path="streaming", feature_chunk=8192))
    probed = TaylorBackend(replace(plain, early_probe=True)).work(call)
    assert probed is not None
    assert probed.values > work.values
    assert TaylorBackend(replace(plain, max_feature_dim_R=10)).work(call) is None


def test_a_taylor_backend_counts_kernels_only_where_they_are_wished_for_and_can_be() -> None:
    # Tensors without memory, so that no GPU is needed.
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(1, 2, 64, 16, device="cuda")
        kernels, torch_form = (
            TaylorBackend(TaylorBackendConfig(P=3, sub_head_blocks=1, fused_kernel=fused)).work(AttentionCall(x, x, x))
            for fused in (True, False)
        )
    assert kernels == taylor_work(AttentionShape.of(x, x, x), terms=3)
    assert torch_form is not None
    assert torch_form.operator == "taylor_blocked"
    assert torch_form.launches > 10 * kernels.launches


@pytest.mark.parametrize(("width", "tokens", "pays"), [(128, 4_096, False), (128, 16_896, False), (16, 4_096, True)])
def test_taylor_is_not_chosen_where_it_was_measured_slower(width: int, tokens: int, pays: bool) -> None:
    # With the recommended settings on one core: 0.16 and 0.55 times as fast as exact attention, and 3 times.
    guard = PaysOff(TaylorBackend(TaylorBackendConfig.recommended()).work, model=cpu_model(1))
    x = torch.zeros(1, 1, 1, width).expand(1, 4, tokens, width)
    reason = guard(AttentionCall(x, x, x))
    assert (reason is None) == pays, reason


@pytest.mark.parametrize("speed_up", [0.0, -1.0, float("nan"), float("inf")])
def test_an_impossible_speed_up_is_refused(speed_up: float) -> None:
    with pytest.raises(ValueError, match="speed_up"):
        PaysOff(lambda call: None, speed_up=speed_up)
