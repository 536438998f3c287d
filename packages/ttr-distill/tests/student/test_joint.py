"""Students with one denominator against their definition, written down a second time key by key in float64."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from attn_dispatch import AttentionCall, StepContext, TokenLayout
from attn_kernels import TokenGrid
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from ttr_distill.student.joint import JointConfig, JointStudent, key_roles

CallMaker = Callable[..., AttentionCall]

EXP = JointConfig(feature_map="exp", feature_dim=8, radius=2)
MLP = JointConfig(feature_map="mlp", feature_dim=256, radius=1, landmark_fraction=0.1, landmark_minimum=4)


def made(config: JointConfig, heads: int = 2, width: int = 16) -> JointStudent:
    """A student none of whose weights is at its start."""
    generator = torch.Generator().manual_seed(7)
    student = JointStudent(config, heads, width, generator=generator)
    with torch.no_grad():
        for name, weight in student.named_parameters():
            if not name.startswith("kernel.phi"):
                weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    return student.eval()


def image_landmarks(layout: TokenLayout, config: JointConfig) -> set[int]:
    image = [n for grid in layout.grids for n in range(grid.start, grid.stop)]
    exact = {n for start, stop in layout.text for n in range(start, stop)}
    exact |= {n for grid in layout.references for n in range(grid.start, grid.stop)}
    others = [n for n in range(layout.length) if n not in exact]
    count = min(len(others), max(config.landmark_minimum, round(len(others) * config.landmark_fraction)))
    places = torch.linspace(others[0], others[0] + len(others) - 1, count).round().long() - others[0] if count else []
    return {others[int(place)] for place in places} & set(image)


def oracle(student: JointStudent, call: AttentionCall) -> Tensor:
    config, layout = student.config, call.layout
    assert layout is not None
    where = {
        grid.start + r * grid.columns + c: (number, r, c)
        for number, grid in enumerate(layout.grids)
        for r in range(grid.rows)
        for c in range(grid.columns)
    }
    marks = image_landmarks(layout, config)
    shift, gain = torch.zeros(2, student.heads).double()
    if config.conditioned and call.step is not None and math.isfinite(call.step.sigma):
        shift, gain = student.conditioner(call.step).detach().view(2, -1)
    phi_q = student.kernel.query(call.q * (1 + gain)[:, None, None]).detach()
    phi_k = student.kernel.key(call.k).detach()
    weight = torch.exp(student.far_weight.detach() + shift)
    scale = call.scale or call.q.shape[-1] ** -0.5
    out = torch.zeros_like(call.v)
    for b, h, i in ((b, h, i) for b in range(len(out)) for h in range(out.shape[1]) for i in range(out.shape[2])):
        sees_all = i not in where and config.radius is not None and config.exact_queries == "exact"
        total, mean = torch.zeros(()).double(), torch.zeros(out.shape[-1]).double()
        for j in range(out.shape[2]):
            if call.key_mask is not None and not call.key_mask[b, j]:
                continue
            near = i in where and j in where and where[i][0] == where[j][0] and config.radius is not None
            near = near and max(abs(where[i][n] - where[j][n]) for n in (1, 2)) <= config.radius
            if sees_all or near or j not in where or j in marks:
                share = torch.exp(scale * (call.q[b, h, i] @ call.k[b, h, j]))
                total, mean = total + share, mean + share * call.v[b, h, j]
            if j in where and j not in marks and not sees_all:
                share = weight[h] * (phi_q[b, h, i] @ phi_k[b, h, j])
                total, mean = total + share, mean + share * call.v[b, h, j]
        out[b, h, i] = mean / total
    return out


@pytest.mark.parametrize(
    "config",
    [
        EXP,
        replace(EXP, feature_hidden=6, radius=0),
        replace(EXP, exact_queries="local"),
        replace(EXP, radius=None),
        replace(EXP, radius=None, landmark_minimum=3),
        replace(EXP, conditioned=False, landmark_fraction=0.2),
        MLP,
        replace(MLP, qk_norm=True),
    ],
)
def test_float64_equals_the_definition(make_call: CallMaker, config: JointConfig) -> None:
    call = make_call(3, rows=4, columns=5, text=3, batch=2, dtype=torch.float64)
    student = made(config).double()
    torch.testing.assert_close(student(call), oracle(student, call), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("config", [EXP, MLP, replace(EXP, radius=None)])
def test_masked_keys_count_nowhere(make_call: CallMaker, config: JointConfig) -> None:
    mask = torch.rand(2, 23, generator=torch.Generator().manual_seed(0)) > 0.3
    call = make_call(4, rows=4, columns=5, text=3, batch=2, key_mask=mask, dtype=torch.float64)
    student = made(config).double()
    torch.testing.assert_close(student(call), oracle(student, call), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("config", [EXP, MLP, replace(EXP, exact_queries="local")])
def test_frames_references_and_tokens_of_no_kind(make_call: CallMaker, config: JointConfig) -> None:
    call = make_call(5, rows=6, columns=7, text=0, dtype=torch.float64)
    # Text, a frame, an unnamed token, a second frame, a reference.
    layout = TokenLayout(42, ((0, 3),), (TokenGrid(3, 3, 4), TokenGrid(16, 4, 4)), (TokenGrid(32, 2, 5),))
    call = replace(call, layout=layout, scale=0.31)
    student = made(config).double()
    torch.testing.assert_close(student(call), oracle(student, call), rtol=2e-5, atol=2e-6)


def test_an_image_alone(make_call: CallMaker) -> None:
    call = make_call(5, rows=5, columns=4, text=0, dtype=torch.float64, step=None)
    for config in (EXP, replace(EXP, radius=None)):
        student = made(config).double()
        torch.testing.assert_close(student(call), oracle(student, call), rtol=2e-5, atol=2e-6)


def test_a_window_over_everything_without_far_field_is_exact(
    make_call: CallMaker, native: Callable[[AttentionCall], Tensor]
) -> None:
    call = make_call(1)
    student = made(replace(EXP, radius=11))
    with torch.no_grad():
        student.far_weight.fill_(-60.0)
        torch.testing.assert_close(student(call), native(call), rtol=1e-4, atol=1e-5)


def test_a_far_key_starts_with_the_weight_of_a_key_of_score_zero(make_call: CallMaker) -> None:
    call = make_call(1)
    call = replace(call, q=torch.zeros_like(call.q), k=torch.zeros_like(call.k))
    student = JointStudent(replace(EXP, radius=None), 2, 16).eval()
    with torch.no_grad():
        torch.testing.assert_close(student(call), call.v.mean(dim=2, keepdim=True).expand_as(call.v))


@pytest.mark.parametrize("config", [EXP, MLP, replace(EXP, radius=None), replace(EXP, exact_queries="local")])
def test_sampled_queries_answer_as_in_the_whole_call(make_call: CallMaker, config: JointConfig) -> None:
    call = make_call(2, batch=2)
    student = made(config)
    positions = torch.tensor([0, 3, 7, 8, 50, 77, 105])
    some = student(replace(call, q=call.q[:, :, positions]), query_positions=positions)
    with torch.no_grad():
        torch.testing.assert_close(some, student(call)[:, :, positions], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [replace(EXP, feature_hidden=6), MLP])
def test_gradients_reach_every_parameter(make_call: CallMaker, config: JointConfig) -> None:
    student, call = made(config).train(), make_call(2)
    positions = torch.arange(7, 40)
    student(replace(call, q=call.q[:, :, positions]), query_positions=positions).square().sum().backward()
    without = [name for name, one in student.named_parameters() if one.grad is None or not one.grad.abs().sum() > 0]
    assert without == []


def test_sigma_and_guidance_move_it_once_the_conditioner_is_trained(make_call: CallMaker) -> None:
    call = make_call(2)
    fresh = JointStudent(EXP, 2, 16, generator=torch.Generator().manual_seed(0)).eval()
    trained = made(EXP)
    for other in (StepContext(0.61, 3.0), StepContext(0.6, 3.5)):
        with torch.no_grad():
            assert torch.equal(fresh(call), fresh(replace(call, step=other)))
            moved, here = trained(replace(call, step=other)), trained(call)
        assert float((moved - here).norm() / here.norm()) > 1e-4


class Largest(TorchDispatchMode):
    """Remembers the largest tensor made, and fails on a wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value was read on the attention path"
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numbers = max(self.numbers, result.untyped_storage().nbytes() if not result.is_mkldnn else 0)
        return result


def test_local_kernel_is_linear_in_the_tokens(make_call: CallMaker) -> None:
    config = JointConfig(feature_map="exp", feature_dim=16, radius=3)
    peaks, costs = [], []
    for side in (16, 32, 64):
        call = make_call(3, rows=side, columns=side)
        student = made(config)
        with torch.no_grad():
            student(call)  # what depends on the layout alone is computed once
            with Largest() as largest:
                student(call)
        assert call.layout is not None
        peaks.append(largest.numbers / call.layout.length)
        costs.append(student.flops(call.layout, 1, 2, 16) / call.layout.length)
    assert peaks[2] < 1.1 * peaks[1]
    assert costs[2] < 1.1 * costs[1]
    assert costs[2] < 0.03 * 4 * 2 * 16 * 4103, "and a small part of exact attention's"


def test_flops_count_every_branch() -> None:
    layout = TokenLayout(77 + 1024, ((0, 77),), (TokenGrid(77, 32, 32),))
    student = JointStudent(JointConfig(feature_dim=64, radius=None), 24, 128)
    far = 2 * 24 * (1101 + 1024) * (2 * 64 * 129 + 2 * 128 * 32)
    assert student.flops(layout, 2, 24, 128) == far + 2 * 2 * 24 * 1101 * 77 * 256
    windowed = JointStudent(JointConfig(feature_dim=64, radius=0), 24, 128)
    far = 2 * 24 * (1024 + 1024) * (2 * 64 * 129 + 2 * 128 * 32)
    exact = 2 * 2 * 24 * (77 * 1101 + 1024 * 78) * 256
    assert windowed.flops(layout, 2, 24, 128) == pytest.approx(far + exact)


def test_roles_cached_in_inference_mode_serve_training(make_call: CallMaker) -> None:
    call = make_call(3, rows=5, columns=8, text=2)
    student = made(MLP)
    key_roles.cache_clear()
    with torch.inference_mode():
        student(call)
    k = call.k.clone().requires_grad_()
    student(replace(call, k=k)).sum().backward()
    assert k.grad is not None


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"radius": -1}, "radius must be None or at least 0"),
        ({"landmark_fraction": 1.5}, "landmark_fraction in"),
        ({"landmark_minimum": -1}, "landmark_minimum and landmark_maximum at least 0"),
        ({"feature_dim": 0}, "must be positive"),
        ({"eps": 0.0}, "must be positive"),
        ({"exact_queries": "some"}, "exact_queries must be"),
        ({"sigma_scale": math.inf}, "must be finite"),
    ],
)
def test_settings_out_of_range_are_refused(setting: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        JointConfig(**setting)  # type: ignore[arg-type]
