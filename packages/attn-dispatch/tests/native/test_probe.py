from collections.abc import Callable

import pytest
import torch
from attn_dispatch.native.kind import CallKind
from attn_dispatch.native.probe import probe_dense, probe_varlen
from attn_dispatch.native.varlen import attend_each
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

KIND = CallKind(torch.bfloat16, torch.device("cpu"), 64, 64)


def right(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, scale: float | None) -> Tensor:
    return scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def wrong(change: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]) -> Callable[..., Tensor]:
    return lambda q, k, v, mask, dropout_p, scale: change(q, k, v, mask)


def drop_tail(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    keys = k.shape[2] // 64 * 64
    return right(q, k[:, :, :keys], v[:, :, :keys], None, 0.0, None)


def leave_tail(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    output = torch.zeros_like(q)
    rows = q.shape[2] // 64 * 64
    output[:, :, :rows] = right(q[:, :, :rows], k, v, None, 0.0, None)
    return output


def mutate(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    output = right(q, k, v, None, 0.0, None)
    k -= k.mean(dim=2, keepdim=True)
    return output


def nearly_everywhere(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    output = right(q, k, v, None, 0.0, None)
    output[0, 0, 0, 0] = torch.nan
    return output


BROKEN = {
    "zeros": lambda q, k, v, m: torch.zeros_like(q),
    "mean of v": lambda q, k, v, m: v.mean(2, keepdim=True).expand_as(q),
    "another scale": lambda q, k, v, m: right(q, k, v, m, 0.0, 1.0),
    "causal": lambda q, k, v, m: scaled_dot_product_attention(q, k, v, is_causal=True),
    "heads exchanged": lambda q, k, v, m: right(q, k.flip(1), v.flip(1), m, 0.0, None),
    "batch exchanged": lambda q, k, v, m: right(q, k.flip(0), v.flip(0), m, 0.0, None),
    "last keys left out": drop_tail,
    "last queries left out": leave_tail,
    "one NaN": nearly_everywhere,
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("tolerance", [0.02, 0.12, 0.35])
def test_a_broken_kernel_is_found_out(name: str, tolerance: float) -> None:
    reason = probe_dense(wrong(BROKEN[name]), KIND, tolerance)
    assert reason is not None
    assert reason.startswith("gave wrong numbers in a probe: relative error")


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"masked": True},
        {"grouped": True},
        {"cross": True},
        {"value_width": 32},
        {"dtype": torch.float32},
        {"dtype": torch.float16, "width": 96, "value_width": 96},
        {"dtype": torch.float64},
        {"masked": True, "grouped": True, "cross": True},
    ],
    ids=str,
)
def test_a_right_kernel_passes_for_every_kind(change: dict[str, object]) -> None:
    assert probe_dense(right, KIND._replace(**change), 0.02) is None


def test_a_mask_that_is_ignored_is_found_out() -> None:
    deaf = wrong(lambda q, k, v, m: right(q, k, v, None, 0.0, None))
    assert probe_dense(deaf, KIND, 0.02) is None
    assert "wrong numbers" in (probe_dense(deaf, KIND._replace(masked=True), 0.35) or "")


def test_a_kernel_that_changes_its_inputs_is_found_out() -> None:
    assert probe_dense(wrong(mutate), KIND, 0.35) == "changed its inputs in a probe"


def test_another_shape_or_dtype_is_found_out() -> None:
    flat = probe_dense(wrong(lambda q, k, v, m: right(q, k, v, m, 0.0, None).transpose(1, 2).flatten(2)), KIND, 0.02)
    assert flat == "answered a probe with shape (2, 183, 256) instead of (2, 4, 183, 64)"
    wide = probe_dense(wrong(lambda q, k, v, m: right(q, k, v, m, 0.0, None).float()), KIND, 0.02)
    assert wide == "answered a probe with torch.float32 on cpu"


def test_a_refusal_is_a_reason() -> None:
    def refuse(q, k, v, m):
        raise ValueError("Unsupported head_dim: 64")

    assert probe_dense(wrong(refuse), KIND, 0.02) == "ValueError: Unsupported head_dim: 64"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), KeyboardInterrupt()], ids=repr)
def test_what_is_nobodys_failure_passes(error: BaseException) -> None:
    def fail(q, k, v, m):
        raise error

    with pytest.raises(type(error)):
        probe_dense(wrong(fail), KIND, 0.02)


def test_a_probe_has_as_many_queries_as_a_host_needs() -> None:
    seen = []
    probe_dense(wrong(lambda q, k, v, m: seen.append(q.shape[2]) or right(q, k, v, m, 0.0, None)), KIND, 0.02, 1025)
    assert seen == [1025]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_probe_leaves_the_process_as_it_was(mode: type) -> None:
    state = torch.get_rng_state()
    with mode(), torch.autocast("cpu", torch.bfloat16):
        before = torch.is_grad_enabled()
        assert probe_dense(right, KIND._replace(dtype=torch.float32), 1e-5) is None
        assert torch.is_grad_enabled() == before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("change", [{}, {"grouped": True}, {"value_width": 16}], ids=str)
def test_packed_sequences_are_probed(change: dict[str, object]) -> None:
    kind = KIND._replace(varlen=True, **change)
    assert probe_varlen(attend_each, kind, 0.02) is None


@pytest.mark.parametrize(
    "broken",
    [
        lambda q, k, v, a, b, m, n, s: right(*(x.transpose(0, 1)[None] for x in (q, k, v)), None, 0.0, s)[0].mT.mT,
        lambda q, k, v, a, b, m, n, s: attend_each(q, k, v, a, a.new_tensor([0, 10, 10, 71, 271, 271]), m, n, s),
        lambda q, k, v, a, b, m, n, s: attend_each(q, k, v, a, b, m, n, s).masked_fill(
            torch.arange(len(q))[:, None, None] >= len(q) - 9, torch.nan
        ),
    ],
    ids=["one sequence", "other bounds", "NaN where there are no keys"],
)
def test_broken_packed_attention_is_found_out(broken: Callable[..., Tensor]) -> None:
    assert probe_varlen(broken, KIND._replace(varlen=True), 0.12) is not None


def test_a_packed_refusal_is_a_reason() -> None:
    def refuse(*args: object) -> Tensor:
        raise RuntimeError("no varlen here")

    assert probe_varlen(refuse, KIND._replace(varlen=True), 0.02) == "RuntimeError: no varlen here"
