from collections import Counter
from collections.abc import Callable

import pytest
import torch
from attn_dispatch.native import Dispatcher
from attn_dispatch.native import varlen as native_varlen
from attn_dispatch.native.arch import Tier
from attn_dispatch.native.varlen import PACKED_FORMS, attend_each, attend_nested
from attn_kernels import softmax_attention
from attn_kernels.testing import assert_close
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Lengths of queries and keys: equal neighbours, empty sequences, cross attention.
CASES = {
    "self": ([5, 5, 5, 12, 1], [5, 5, 5, 12, 1]),
    "cross": ([3, 8, 8, 40], [7, 2, 2, 61]),
    "no queries": ([0, 4, 0, 0, 9], [3, 5, 2, 0, 9]),
    "no keys": ([6, 4, 2, 2], [0, 5, 0, 0]),
    "one": ([17], [23]),
    "none": ([], []),
    "all empty": ([0, 0], [0, 0]),
}
SYNCS = ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__index__", "__float__", "nonzero", "any", "all")


class CountHostCopies(TorchFunctionMode):
    """Counts what would wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in SYNCS or (name == "to" and "cpu" in map(str, args)):
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def pack(case: str, *, heads: int = 4, kv_heads: int = 4, width: int = 16, value_width: int = 16, dtype=torch.float32):
    lengths_q, lengths_kv = CASES[case]
    g = torch.Generator().manual_seed(0)
    q = 2 * torch.randn(sum(lengths_q), heads, width, generator=g)
    k = torch.randn(sum(lengths_kv), kv_heads, width, generator=g)
    v = torch.randn(sum(lengths_kv), kv_heads, value_width, generator=g)
    cu_q, cu_kv = (torch.tensor([0, *one]).cumsum(0).to(torch.int32) for one in (lengths_q, lengths_kv))
    longest = max(lengths_q, default=0), max(lengths_kv, default=0)
    return q.to(dtype), k.to(dtype), v.to(dtype), cu_q, cu_kv, *longest


def oracle(case: str, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Each query on its own, against the keys of its sequence."""
    output = torch.zeros(q.shape[0], q.shape[1], v.shape[2])
    groups = q.shape[1] // k.shape[1]
    row = start = 0
    for rows, keys in zip(*CASES[case], strict=True):
        for _ in range(rows):
            for head in range(q.shape[1]):
                if keys:
                    one_k, one_v = (x[start : start + keys, head // groups].float() for x in (k, v))
                    one_q = q[row, head].float()
                    factor = one_q.shape[0] ** -0.5 if scale is None else scale
                    output[row, head] = torch.softmax(one_k @ one_q * factor, 0) @ one_v
            row += 1
        start += keys
    return output.to(q.dtype)


@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize("case", CASES)
def test_each_sequence_attends_to_itself_alone(case: str, scale: float | None) -> None:
    q, k, v, *bounds = pack(case)
    assert_close("output", attend_each(q, k, v, *bounds, scale), oracle(case, q, k, v, scale), 1e-5)


@pytest.mark.parametrize("case", ["self", "cross", "no keys"])
def test_grouped_heads_and_other_value_widths_are_taken(case: str) -> None:
    q, k, v, *bounds = pack(case, heads=6, kv_heads=2, value_width=24)
    assert_close("output", attend_each(q, k, v, *bounds, None), oracle(case, q, k, v), 1e-5)


def test_gradients_flow_through_packed_sequences() -> None:
    q, k, v, *bounds = pack("cross", dtype=torch.float64)
    inputs = [x[: len(x)].requires_grad_() for x in (q, k, v)]
    attend_each(*inputs, *bounds, None).square().sum().backward()
    wide = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    lengths = (*CASES["cross"], CASES["cross"][1])
    parts = zip(*(x.split(sizes) for x, sizes in zip(wide, lengths, strict=True)), strict=True)
    loss = sum(softmax_attention(*(x.transpose(0, 1)[None] for x in part)).out.square().sum() for part in parts)
    loss.backward()
    for name, one, two in zip("qkv", inputs, wide, strict=True):
        assert_close(name, one.grad, two.grad, 1e-10)


def test_the_bounds_are_copied_to_the_host_once_for_any_number_of_sequences() -> None:
    lengths = torch.randint(0, 9, (200,), generator=torch.Generator().manual_seed(0))
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    tokens = int(lengths.sum())
    q = torch.randn(tokens, 2, 8, generator=torch.Generator().manual_seed(1))
    with CountHostCopies() as count:
        attend_each(q, q, q, bounds, bounds, 8, 8, None)
    assert count.seen == {"tolist": 1}


def test_equal_neighbours_share_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    inner = torch.nn.functional.scaled_dot_product_attention

    def count(q: Tensor, *args: object, **kwargs: object) -> Tensor:
        shapes.append(tuple(q.shape))
        return inner(q, *args, **kwargs)

    monkeypatch.setattr(native_varlen, "scaled_dot_product_attention", count)
    q, k, v, *bounds = pack("self")
    attend_each(q, k, v, *bounds, None)
    assert shapes == [(3, 4, 5, 16), (1, 4, 12, 16), (1, 4, 1, 16)]


def test_memory_grows_with_the_tokens_and_not_with_their_square() -> None:
    tokens, length = 40_000, 8
    q = torch.randn(tokens, 1, 4, generator=torch.Generator().manual_seed(0))
    bounds = torch.arange(0, tokens + 1, length, dtype=torch.int32)
    # A mask over all tokens would be 1.6 billion entries.
    output = attend_each(q, q, q, bounds, bounds, length, length, None)
    assert_close("last", output[-length:], attend_each(*[q[-length:]] * 3, bounds[:2], bounds[:2], 8, 8, None), 1e-6)


@pytest.mark.parametrize(
    ("cu_q", "cu_kv", "message"),
    [
        ([0, 5, 9], [0, 5, 10], r"cu_seqlens_q must rise from 0 to the 10 tokens, got \[0, 5, 9\]"),
        ([0, 5, 10], [1, 5, 10], r"cu_seqlens_kv must rise"),
        ([0, 7, 5, 10], [0, 1, 2, 10], r"cu_seqlens_q must rise"),
    ],
)
def test_bounds_that_do_not_fit_are_an_error(cu_q: list[int], cu_kv: list[int], message: str) -> None:
    x = torch.zeros(10, 2, 8)
    with pytest.raises(ValueError, match=message):
        attend_each(x, x, x, torch.tensor(cu_q), torch.tensor(cu_kv), 10, 10, None)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_of_torch_agree() -> None:
    q, k, v, *bounds = pack("cross")
    assert_close("output", attend_nested(q, k, v, *bounds, None), oracle("cross", q, k, v), 1e-5)


def test_a_form_of_torch_that_this_torch_cannot_run_here_refuses() -> None:
    q, k, v, *bounds = pack("cross", dtype=torch.bfloat16)
    with pytest.raises((RuntimeError, ImportError, NotImplementedError)):
        PACKED_FORMS[0].kernel(q, k, v, *bounds, None)


MakeDispatcher = Callable[..., Dispatcher]

# Device, name, and the module whose packed attention runs; "" is torch.
CHOICES = [
    ("hopper", "auto", "flash_attn_interface"),
    ("hopper", "flash_fp8", "flash_attn_interface"),
    ("hopper", "flash2", "flash_attn"),
    ("ada", "auto", "sageattention"),
    ("ada", "flash", "flash_attn"),
    ("ada", "flash4", "flash_attn.cute"),
    ("ada", "xformers", "xformers.ops"),
    ("ada", "ck_int8", ""),
    ("ada", "sdpa", ""),
    ("turing", "auto", ""),
    ("cpu", "auto", ""),
]


@pytest.mark.parametrize(("arch", "name", "module"), CHOICES)
def test_a_name_runs_its_packed_form_where_it_has_one(
    on: MakeDispatcher, packages, arch: str, name: str, module: str
) -> None:
    selection = on(arch).select(name)
    q, k, v, *bounds = pack("no keys", dtype=torch.bfloat16)
    selection.varlen(q, k, v, *bounds)
    packages.packed.clear()
    output = selection.varlen(q, k, v, *bounds)
    assert dict(packages.packed) == ({module: 1} if module else {})
    assert_close("output", output, oracle("no keys", q, k, v), 0.1)


def test_a_package_learns_the_bounds_on_the_device(on: MakeDispatcher, packages) -> None:
    selection = on("ada").select("flash")
    q, k, v, *bounds = pack("cross", dtype=torch.bfloat16)
    selection.varlen(q, k, v, *bounds)
    packages.modules["flash_attn"].flash_attn_varlen_func = lambda q, *args, **kwargs: q
    fresh = on("ada").select("flash2")
    fresh.dispatcher._verdicts = dict(selection.dispatcher._verdicts)
    with CountHostCopies() as count:
        assert fresh.varlen(q, k, v, *bounds) is q
    assert set(count.seen) == {"to"}  # To the device of q, which here is the CPU.


def test_packed_attention_that_is_wrong_or_fails_is_answered_by_torch(on: MakeDispatcher, packages) -> None:
    module = packages.modules["flash_attn"]
    inner = module.flash_attn_varlen_func
    module.flash_attn_varlen_func = lambda q, *args, **kwargs: inner(q, *args, **kwargs) * 2
    q, k, v, *bounds = pack("cross", dtype=torch.bfloat16)
    selection = on("ada").select("flash2")
    assert_close("wrong", selection.varlen(q, k, v, *bounds), oracle("cross", q, k, v), 0.01)

    def fail(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, *args: object, **kwargs: object) -> Tensor:
        if len(q) == 59:
            raise RuntimeError("no kernel image is available for execution on the device")
        return inner(q, k, v, cu_q, *args, **kwargs)

    module.flash_attn_varlen_func = fail
    selection = on("ada").select("flash2")
    packages.packed.clear()
    for _ in range(2):
        assert_close("fails", selection.varlen(q, k, v, *bounds), oracle("cross", q, k, v), 0.01)
    assert packages.packed["flash_attn"] == 1
    # Its dense form is another matter.
    assert selection.best(selection.dispatcher.typical_kinds()[0]).key == "flash2"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), KeyboardInterrupt()], ids=repr)
def test_memory_and_interrupts_reach_the_caller(on: MakeDispatcher, packages, error: BaseException) -> None:
    selection = on("ada").select("flash2")
    q, k, v, *bounds = pack("cross", dtype=torch.bfloat16)
    selection.varlen(q, k, v, *bounds)
    module = packages.modules["flash_attn"]
    kernel = selection._packed[next(iter(selection._packed))]
    assert kernel.key == "flash2"

    def fail(*args: object, **kwargs: object) -> Tensor:
        raise error

    module.flash_attn_varlen_func = fail
    fresh = on("ada").select("flash2")
    fresh.dispatcher._verdicts = dict(selection.dispatcher._verdicts)
    with pytest.raises(type(error)):
        fresh.varlen(q, k, v, *bounds)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(1, 10, 2, 8)}, r"q must be packed as \[T, H, D\], got shape \(1, 10, 2, 8\)"),
        ({1: torch.zeros(10, 2, 4)}, "q, k and v do not fit each other"),
        ({1: torch.zeros(10, 3, 8), 2: torch.zeros(10, 3, 8)}, "q, k and v do not fit each other"),
        ({3: torch.tensor([0.0, 10.0])}, r"cu_seqlens_q must be \[S \+ 1\] of int32, got \(2,\) of torch.float32"),
        ({4: torch.tensor([0, 5, 10])}, "must name the same number of sequences on one device"),
    ],
)
def test_arguments_that_do_not_fit_are_an_error(on: MakeDispatcher, change: dict[int, Tensor], message: str) -> None:
    x = torch.zeros(10, 2, 8)
    bounds = torch.tensor([0, 10], dtype=torch.int32)
    arguments = [x, x, x, bounds, bounds]
    for index, value in change.items():
        arguments[index] = value
    with pytest.raises(ValueError, match=message):
        on("cpu").select("sdpa").varlen(*arguments, 10, 10)


def test_no_form_of_torch_runs_on_the_cpu_but_the_last_resort() -> None:
    assert all(Tier.CPU not in form.tiers for form in PACKED_FORMS)
