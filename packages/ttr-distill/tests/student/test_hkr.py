"""The hkr student against formulas written down a second time, key by key and in float64."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from attn_dispatch import AttentionCall, LayerKey, StepContext, TokenLayout
from attn_kernels import TokenGrid
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from ttr_distill.student.hkr import HkrConfig, HkrStudent

CallMaker = Callable[..., AttentionCall]


def made(config: HkrConfig, heads: int = 2, width: int = 16, *, random_conditioner: bool = True) -> HkrStudent:
    generator = torch.Generator().manual_seed(7)
    student = HkrStudent(config, heads, width, generator=generator)
    with torch.no_grad():
        if random_conditioner and config.conditioned:
            student.conditioner.mlp[2].weight.normal_(std=0.2, generator=generator)
            student.conditioner.mlp[2].bias.normal_(std=0.2, generator=generator)
    return student.eval()


def oracle_phi(state: dict[str, Tensor], side: str, x: Tensor, config: HkrConfig) -> Tensor:
    last = 2 * (config.map_layers - 1)
    for index in range(0, last + 1, 2):
        x = x @ state[f"kernel.phi_net_{side}.{index}.weight"].T + state[f"kernel.phi_net_{side}.{index}.bias"]
        x = x / (1 + torch.exp(-x)) if index < last else x
    phi = torch.where(x > 0, x + 1, torch.exp(x))
    return phi / (phi.norm(dim=-1, keepdim=True) + config.eps) if config.qk_norm else phi


def oracle_landmarks(layout: TokenLayout, config: HkrConfig) -> list[int]:
    exact = {i for start, stop in layout.text for i in range(start, stop)}
    exact |= {i for grid in layout.references for i in range(grid.start, grid.stop)}
    image = [i for i in range(layout.length) if i not in exact]
    count = max(config.landmark_minimum, round(len(image) * config.landmark_fraction))
    count = min(count, config.landmark_maximum) if config.landmark_maximum else count
    if count >= len(image):
        return list(range(layout.length))
    # Halves are rounded to even positions of the sequence, not of the image.
    first = image[0]
    places = torch.linspace(first, first + len(image) - 1, count).round().long().tolist()
    return sorted(exact | {image[place - first] for place in places})


def oracle_conditioned(state: dict[str, Tensor], step: StepContext, kernel: Tensor, landmark: Tensor) -> list[Tensor]:
    embedding = []
    for x in (step.sigma, step.cfg_scale):
        angles = [x * math.exp(-math.log(10000) * i / 15) for i in range(16)]
        embedding += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    hidden = state["conditioner.mlp.0.weight"] @ torch.tensor(embedding, dtype=torch.float64)
    hidden = hidden + state["conditioner.mlp.0.bias"]
    scale_k, bias_k, scale_l, bias_l = (
        state["conditioner.mlp.2.weight"] @ (hidden * hidden.sigmoid()) + state["conditioner.mlp.2.bias"]
    )
    return [kernel * (1 + scale_k) + bias_k, landmark * (1 + scale_l) + bias_l]


def oracle(student: HkrStudent, call: AttentionCall) -> Tensor:
    """One query, head and batch row at a time."""
    config, state = student.config, {name: value.double() for name, value in student.state_dict().items()}
    q, k, v = call.q.double(), call.k.double(), call.v.double()
    batch, heads, queries, width = q.shape
    kernel, landmark = torch.zeros(batch, heads, queries, v.shape[-1]).double(), torch.zeros_like(v[:, :, :queries])
    assert call.layout is not None
    index = oracle_landmarks(call.layout, config)
    for b in range(batch):
        keep = torch.ones(k.shape[2], dtype=torch.bool) if call.key_mask is None else call.key_mask[b]
        marks = [i for i in index if keep[i]]
        for h in range(heads):
            phi_k = oracle_phi(state, "k", k[b, h], config)[keep]
            for n in range(queries):
                weights = phi_k @ oracle_phi(state, "q", q[b, h, n], config)
                kernel[b, h, n] = (weights @ v[b, h][keep]) / max(float(weights.sum()), config.eps)
                if not marks:
                    landmark[b, h, n] = kernel[b, h, n]
                    continue
                left, right = q[b, h, n], k[b, h][marks]
                if config.landmark_qk_norm:
                    left, right = left / left.norm(), right / right.norm(dim=-1, keepdim=True)
                scores = (right @ left) * (call.scale or width**-0.5)
                landmark[b, h, n] = torch.softmax(scores, 0) @ v[b, h][marks]
    if config.conditioned and call.step is not None and math.isfinite(call.step.sigma):
        kernel, landmark = oracle_conditioned(state, call.step, kernel, landmark)
    if config.blend == "additive":
        return kernel + state["alpha"] * landmark
    dot = (kernel * landmark).sum(-1) / (kernel.norm(dim=-1) * landmark.norm(dim=-1))
    mean = max(float((1 - dot).mean()), 1e-6)
    disagreement = torch.clamp((1 - dot) / mean, max=3) / 3 if config.adaptive_alpha else torch.tensor(0.5).double()
    alpha = config.alpha_max / (1 + torch.exp(-(state["alpha"] + config.gamma * (disagreement - 0.5))))
    return kernel + (alpha.unsqueeze(-1) if config.adaptive_alpha else alpha) * (landmark - kernel)


SMALL = HkrConfig(landmark_minimum=5)
OLD = HkrConfig(
    map_layers=2, split_qk=False, blend="additive", conditioned=False, landmark_minimum=5, landmark_maximum=5
)


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        replace(SMALL, alpha_init=0.9, alpha_max=1.0),
        replace(SMALL, adaptive_alpha=False, alpha_init=0.7),
        replace(SMALL, landmark_qk_norm=True, gamma=5.0),
        replace(SMALL, landmark_fraction=0.5, landmark_maximum=17, qk_norm=False),
        replace(SMALL, landmark_fraction=1.0, split_qk=False),
        HkrConfig(),
        OLD,
    ],
)
def test_float64_equals_the_formulas(make_call: CallMaker, config: HkrConfig) -> None:
    call = make_call(3, rows=5, columns=7, text=3, dtype=torch.float64)
    student = made(config).double()
    torch.testing.assert_close(student(call), oracle(student, call), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_serving_dtypes_are_close_and_keep_the_dtype_of_v(make_call: CallMaker, dtype: torch.dtype) -> None:
    call = make_call(3, rows=5, columns=7, text=3, batch=2, dtype=dtype)
    student = made(replace(SMALL, alpha_max=1.0, alpha_init=0.5))
    answer, expected = student(call).detach(), oracle(student, call)
    assert answer.dtype == dtype
    error = float((answer.double() - expected).norm() / expected.norm())
    assert error < {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]


def test_masked_keys_count_nowhere(make_call: CallMaker) -> None:
    mask = torch.rand(2, 3 + 35, generator=torch.Generator().manual_seed(0)) > 0.3
    call = make_call(4, rows=5, columns=7, text=3, batch=2, key_mask=mask, dtype=torch.float64)
    student = made(replace(SMALL, alpha_max=1.0)).double()
    torch.testing.assert_close(student(call), oracle(student, call), rtol=2e-5, atol=2e-6)


def test_without_any_unmasked_landmark_the_kernel_branch_answers(make_call: CallMaker) -> None:
    config = replace(SMALL, landmark_minimum=2, landmark_fraction=0.0, alpha_max=1.0, alpha_init=0.9)
    mask = torch.ones(1, 35, dtype=torch.bool)
    mask[:, [0, 34]] = False
    call = make_call(4, rows=5, columns=7, text=0, key_mask=mask, step=None, dtype=torch.float64)
    student = made(config).double()
    torch.testing.assert_close(student(call), oracle(student, call), rtol=2e-5, atol=2e-6)


def test_reference_tokens_are_all_landmarks(make_call: CallMaker) -> None:
    call = make_call(5, rows=6, columns=7, text=0, dtype=torch.float64)
    layout = TokenLayout(42, ((0, 3),), (TokenGrid(21, 3, 7),), (TokenGrid(3, 2, 9),))
    call = replace(call, layout=layout, scale=0.31)
    student = made(replace(SMALL, alpha_max=1.0)).double()
    torch.testing.assert_close(student(call), oracle(student, call), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("step", [None, StepContext(math.nan), StepContext(math.inf)])
def test_the_conditioner_waits_for_a_finite_sigma(make_call: CallMaker, step: StepContext | None) -> None:
    call = make_call(3, rows=5, columns=7, text=3, step=step)
    plain_student = made(SMALL, random_conditioner=False)
    assert torch.equal(made(SMALL)(call), plain_student(call))
    assert not torch.equal(made(SMALL)(replace(call, step=StepContext(0.5))), plain_student(call))


def test_one_layer_of_flux_has_928901_parameters_with_these_names() -> None:
    student = HkrStudent(HkrConfig(), 24, 128)
    shapes = {name: tuple(value.shape) for name, value in student.state_dict().items()}
    expected: dict[str, tuple[int, ...]] = {"alpha": ()}
    for side in "qk":
        for index, (out, width) in ((0, (512, 128)), (2, (512, 512)), (4, (256, 512))):
            expected[f"kernel.phi_net_{side}.{index}.weight"] = (out, width)
            expected[f"kernel.phi_net_{side}.{index}.bias"] = (out,)
    expected |= {
        "conditioner.mlp.0.weight": (128, 64),
        "conditioner.mlp.0.bias": (128,),
        "conditioner.mlp.2.weight": (4, 128),
        "conditioner.mlp.2.bias": (4,),
    }
    assert shapes == expected
    assert sum(math.prod(shape) for shape in shapes.values()) == 928_901


def test_the_older_form_has_one_network_of_two_layers_under_both_names_and_raw_alpha() -> None:
    student = HkrStudent(replace(OLD, alpha_init=1.7), 24, 128)
    shapes = {name: tuple(value.shape) for name, value in student.state_dict().items()}
    net = {"0.weight": (256, 128), "0.bias": (256,), "2.weight": (256, 256), "2.bias": (256,)}
    assert shapes == {"alpha": ()} | {
        f"kernel.phi_net_{side}.{name}": shape for side in "qk" for name, shape in net.items()
    }
    assert float(student.alpha.detach()) == pytest.approx(1.7)
    assert sum(one.numel() for one in student.parameters()) == 1 + 2 * 256 + 256 * 128 + 256 * 256


def test_the_older_form_without_landmarks_is_its_kernel_branch(make_call: CallMaker) -> None:
    mask = torch.ones(1, 35, dtype=torch.bool)
    mask[:, [0, 34]] = False
    config = replace(OLD, landmark_minimum=2, landmark_maximum=2, landmark_fraction=0.0, alpha_init=3.0)
    call = make_call(4, rows=5, columns=7, text=0, key_mask=mask)
    student = made(config)
    kernel = student.kernel.attend(call.q, call.k, call.v, key_mask=mask, eps=config.eps).out
    torch.testing.assert_close(student(call), kernel)


def test_learning_in_half_precision_products_is_close_to_float32(make_call: CallMaker) -> None:
    call = make_call(3, rows=9, columns=7)
    gradients = []
    for products in ("float32", "bfloat16"):
        student = made(replace(SMALL, training_dtype=products)).train()
        student(call).square().mean().backward()
        weights = [student.get_parameter(f"kernel.phi_net_{side}.2.weight").grad for side in "qk"]
        gradients.append(torch.stack([weight for weight in weights if weight is not None]))
    error = float((gradients[1] - gradients[0]).norm() / gradients[0].norm())
    assert 1e-4 < error < 0.03


def test_alpha_lives_in_logit_space() -> None:
    values = {a: float(HkrStudent(HkrConfig(alpha_init=a), 1, 8).alpha.detach()) for a in (0.0, 0.1, 0.5, 1.0)}
    assert values == pytest.approx({0.0: -5.0, 0.1: -2.197225, 0.5: 0.0, 1.0: 5.0})


def test_a_small_workspace_gives_the_same_answer_and_gradients(make_call: CallMaker) -> None:
    call = make_call(3, heads=5, rows=5, columns=7)
    whole, single = (made(replace(SMALL, workspace_bytes=size), heads=5) for size in (2**29, 1))
    answers = [student(call) for student in (whole, single)]
    torch.testing.assert_close(answers[1], answers[0], rtol=1e-5, atol=1e-6)
    for answer in answers:
        answer.square().sum().backward()
    for one, other in zip(single.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-6)


class Watch(TorchDispatchMode):
    """Fails on a wait for the device and remembers the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value was read on the attention path"
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def test_serving_reads_no_value_and_makes_no_score_matrix(make_call: CallMaker) -> None:
    call = make_call(3, heads=1, rows=40, columns=40, text=100)
    config = HkrConfig(landmark_fraction=0.9)
    student = made(config, heads=1)
    student(call)  # the landmark positions of a layout are computed once
    assert call.layout is not None
    landmarks = len(oracle_landmarks(call.layout, config))
    with torch.no_grad(), Watch() as watch:
        student(call)
    # The networks' weights and the gathered landmarks; neither scores nor the features of all tokens.
    assert watch.largest <= max(student.kernel.hidden**2, 1700 * 16)
    assert watch.largest < 1700 * min(landmarks, student.kernel.hidden)


def test_gradients_reach_every_parameter(make_call: CallMaker) -> None:
    student = made(SMALL)
    student(make_call(3, rows=5, columns=7)).square().mean().backward()
    without = [name for name, p in student.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_landmark_positions_cached_in_inference_mode_serve_training(make_call: CallMaker) -> None:
    call = make_call(3, rows=5, columns=8, text=2)
    student = made(SMALL)
    with torch.inference_mode():
        student(call)
    k = call.k.clone().requires_grad_()
    student(replace(call, k=k)).sum().backward()
    assert k.grad is not None


def test_flops_follow_the_formula() -> None:
    layout = TokenLayout(77 + 1024, ((0, 77),), (TokenGrid(77, 32, 32),))
    student = HkrStudent(HkrConfig(), 24, 128)
    # Networks, kernel sums with their denominators, landmarks: multiply-adds per token and head.
    per_token_macs = 917_504 + 65_536 + 2 * 256 + 2 * 128 * (77 + 82)
    assert student.flops(layout, 2, 24, 128) == 2.0 * 2 * 24 * 1101 * per_token_macs


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("feature_dim", 128, "multiple of 256"),
        ("landmark_fraction", 1.5, "landmark_fraction must be in"),
        ("alpha_max", -0.1, "alpha_max must be in"),
        ("eps", 0.0, "eps must be positive"),
        ("landmark_minimum", 0, "landmark_minimum must be at least 1"),
        ("gamma", math.nan, "gamma must be finite"),
        ("feature_dtype", "int8", "feature_dtype must be"),
        ("training_dtype", "float16", "training_dtype must be"),
        ("map_layers", 4, "map_layers must be"),
        ("blend", "mean", "blend must be"),
        ("alpha_init", 1.5, "alpha_init must be in"),
        ("sigma_scale", math.inf, "sigma_scale must be finite"),
        ("workspace_bytes", 0, "workspace_bytes must be positive"),
    ],
)
def test_settings_out_of_range_are_refused(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HkrConfig(**{field: value})  # type: ignore[arg-type]


def test_calls_it_would_have_to_guess_about_are_refused(make_call: CallMaker) -> None:
    student = made(SMALL)
    call = make_call(0)
    assert student.refuses(call) is None
    layout = call.layout
    assert layout is not None
    cases = {
        "does not say where": replace(call, layout=None),
        "no attention bias": replace(call, attn_bias=torch.zeros(1, 1, 1, 1)),
        "self-attention only": replace(call, q=call.q[:, :, :5]),
        "no image grid": replace(call, layout=TokenLayout(layout.length, ((0, layout.length),), ())),
        "describes 99 tokens": replace(call, layout=TokenLayout(99, (), (TokenGrid(0, 9, 11),))),
        "made for 2 heads of width 16": make_call(0, heads=3),
        "of width 16, the call has 2 of 8": make_call(0, width=8),
        "move the bank": replace(call, q=call.q.to("meta"), k=call.k.to("meta"), v=call.v.to("meta")),
    }
    for words, refused in cases.items():
        reason = student.refuses(refused)
        assert reason is not None
        assert words in reason
    with pytest.raises(ValueError, match="needs the call's layout"):
        student(replace(call, layout=None))
    assert call.layer == LayerKey("single", 0)
