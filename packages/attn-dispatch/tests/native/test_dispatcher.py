import logging
import threading
from collections.abc import Callable

import pytest
import torch
from attn_dispatch.native import Dispatcher
from attn_kernels import softmax_attention
from attn_kernels.testing import assert_close, make_qkv
from torch import Tensor

BF16 = torch.bfloat16
MakeDispatcher = Callable[..., Dispatcher]


class InterruptProcessingException(Exception):
    """As ComfyUI's before 0.33: an Exception, and yet nothing to swallow."""


InterruptProcessingException.__module__ = "comfy.model_management"


def refuse_width(width: int) -> Callable[[Tensor], None]:
    def refuse(q: Tensor) -> None:
        if q.shape[-1] == width:
            raise ValueError(f"Unsupported head_dim: {width}")

    return refuse


def fail_with(error: BaseException, real_calls_only: bool = True) -> Callable[[Tensor], None]:
    """Fail in real calls: a probe has a batch of two."""

    def fail(q: Tensor) -> None:
        if q.shape[0] != 2 or not real_calls_only:
            raise error

    return fail


def qkv(width: int = 64, dtype: torch.dtype = BF16, **kwargs: int) -> tuple[Tensor, Tensor, Tensor]:
    return make_qkv(1, 4, 50, width, dtype=dtype, **kwargs)


def exact(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    return softmax_attention(q.float(), k.float(), v.float(), attn_bias=bias).out


# Device, name, and the modules whose attention runs.
CHOICES = [
    ("blackwell", "auto", "sageattn3"),
    ("blackwell", "sage", "sageattn3"),
    ("blackwell", "sage2", "sageattention"),
    ("blackwell", "flash_attn", "flash_attn.cute"),
    ("datacentre blackwell", "flash_fp8", "flash_attn.cute"),
    ("hopper", "auto", "flash_attn_interface"),
    ("hopper", "sage", "sageattention"),
    ("hopper", "flash", "flash_attn_interface"),
    ("hopper", "flash2", "flash_attn"),
    ("ada", "auto", "sageattention"),
    ("ada", "flash", "flash_attn"),
    ("ada", "flash4", "flash_attn.cute"),
    ("ada", "ck_int8", "comfy_kitchen"),
    ("turing", "ck_int8", "comfy_kitchen"),
    ("turing", "xformers", "xformers.ops"),
    ("rocm", "auto", "sageattention"),
]


@pytest.mark.parametrize(("arch", "name", "module"), CHOICES)
def test_a_name_runs_its_package_on_each_device(
    on: MakeDispatcher, packages, arch: str, name: str, module: str
) -> None:
    selection = on(arch).select(name)
    q, k, v = qkv()
    selection(q, k, v)
    packages.calls.clear()
    output = selection(q, k, v)
    assert dict(packages.calls) == {module: 1}
    assert_close("output", output, exact(q, k, v).to(BF16), 0.12)


@pytest.mark.parametrize(("arch", "name"), [("turing", "auto"), ("cpu", "auto"), ("cpu", "sage"), ("ada", "sage3")])
def test_where_nothing_of_a_name_runs_sdpa_does_and_nothing_is_imported(
    on: MakeDispatcher, packages, arch: str, name: str
) -> None:
    q, k, v = qkv()
    output = on(arch).select(name)(q, k, v)
    assert torch.equal(output, torch.nn.functional.scaled_dot_product_attention(q, k, v))
    assert not packages.lookups


def test_the_next_in_order_runs_when_a_package_is_not_installed(on: MakeDispatcher, packages) -> None:
    packages.only("flash_attn")
    dispatcher = on("blackwell")
    assert dispatcher.select("auto").typical().backend == "flash"
    assert dispatcher.select("sage").label() == (
        "PyTorch SDPA (sage3 package sageattn3 is not installed; sage2 package sageattention is not installed)"
    )


@pytest.mark.parametrize(
    "error",
    [
        ImportError("DLL load failed while importing _fused"),
        OSError("libcudart.so.12: cannot open shared object file"),
        RuntimeError("built for another torch"),
        AttributeError("module 'torch' has no attribute '_C_old'"),
        ModuleNotFoundError("No module named 'triton'", name="triton"),
    ],
    ids=repr,
)
def test_a_broken_wheel_is_a_reason_and_no_crash(on: MakeDispatcher, packages, error: Exception) -> None:
    packages.broken["sageattention"] = error
    selection = on("ada").select("sage2")
    q, k, v = qkv()
    selection(q, k, v)
    selection(q, k, v)
    assert packages.lookups["sageattention"] == 1
    assert selection.label().startswith("PyTorch SDPA (sage2 cannot be imported: ")
    assert str(error) in selection.label()


def test_an_interrupt_during_an_import_passes(on: MakeDispatcher, packages) -> None:
    packages.broken["sageattention"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        on("ada").select("sage2")(*qkv())


def test_a_package_that_gives_wrong_numbers_never_answers(on: MakeDispatcher, packages) -> None:
    packages.after["sageattention"] = lambda output: output * 1.5
    selection = on("ada").select("auto")
    q, k, v = qkv()
    assert_close("output", selection(q, k, v), exact(q, k, v).to(BF16), 0.01)
    assert packages.calls["sageattention"] == 1
    # The next in order.
    assert packages.calls["comfy_kitchen"] == 2


def test_a_probe_is_made_once_for_a_kind(on: MakeDispatcher, packages) -> None:
    dispatcher = on("ada")
    for name in ("sage2", "auto", "sage"):
        dispatcher.select(name)(*qkv())
    assert packages.lookups["sageattention"] == 1
    assert packages.calls["sageattention"] == 1 + 3
    dispatcher.select("sage2")(*qkv(96))
    assert packages.calls["sageattention"] == 4 + 2


def test_a_head_width_that_fails_is_remembered_for_that_width_and_dtype_alone(on: MakeDispatcher, packages) -> None:
    packages.before["sageattention"] = refuse_width(96)
    selection = on("ada").select("sage2")
    for _ in range(3):
        q, k, v = qkv(96)
        assert_close("output", selection(q, k, v), exact(q, k, v).to(BF16), 0.01)
    assert packages.calls["sageattention"] == 1
    selection(*qkv(64))
    selection(*qkv(96, torch.float16))
    assert packages.calls["sageattention"] == 1 + 2 + 1


def test_a_failure_in_a_call_is_answered_by_the_next_and_remembered(on: MakeDispatcher, packages, caplog) -> None:
    packages.before["sageattention"] = fail_with(RuntimeError("CUDA error: invalid configuration argument"))
    selection = on("ada").select("auto")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            q, k, v = qkv()
            assert_close("output", selection(q, k, v), exact(q, k, v).to(BF16), 0.01)
    assert packages.calls["sageattention"] == 2
    assert packages.calls["comfy_kitchen"] == 1 + 3
    assert [record.message for record in caplog.records] == [
        "attention backend sage2 failed for bfloat16 of width 64 and is left out for such calls: "
        "RuntimeError: CUDA error: invalid configuration argument"
    ]
    selection(*make_qkv(1, 4, 2000, 64, dtype=BF16))
    assert packages.calls["sageattention"] == 2
    selection(*qkv(32))
    assert packages.calls["sageattention"] == 2 + 1 + 1


OUT_OF_MEMORY = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: out of memory")]
INTERRUPTS = [KeyboardInterrupt(), InterruptProcessingException(), SystemExit()]
LOST = [RuntimeError("CUDA error: an illegal memory access was encountered")]


@pytest.mark.parametrize("error", [*OUT_OF_MEMORY, *INTERRUPTS, *LOST], ids=repr)
def test_memory_and_interrupts_reach_the_caller_and_are_not_remembered(
    on: MakeDispatcher, packages, error: BaseException
) -> None:
    selection = on("ada").select("sage2")
    selection(*qkv())
    packages.before["sageattention"] = fail_with(error)
    with pytest.raises(type(error)):
        selection(*qkv())
    packages.before.clear()
    packages.calls.clear()
    selection(*qkv())
    assert packages.calls == {"sageattention": 1}


def test_no_memory_for_a_probe_puts_the_probe_off(on: MakeDispatcher, packages) -> None:
    packages.before["sageattention"] = fail_with(torch.OutOfMemoryError("CUDA out of memory"), False)
    selection = on("ada").select("sage2")
    q, k, v = qkv()
    assert_close("output", selection(q, k, v), exact(q, k, v).to(BF16), 0.01)
    packages.before.clear()
    selection(q, k, v)
    assert packages.calls["sageattention"] == 1 + 2


def test_a_call_that_is_wrong_itself_is_not_blamed_on_the_backend(on: MakeDispatcher, packages) -> None:
    selection = on("ada").select("sage2")
    q, k, v = qkv()
    with pytest.raises(RuntimeError):
        selection(q, k[..., :32], v)
    packages.calls.clear()
    selection(q, k, v)
    assert packages.calls == {"sageattention": 1}


def test_q_without_four_axes_is_an_error(on: MakeDispatcher) -> None:
    with pytest.raises(ValueError, match=r"must be \[B, H, N, D\], got \(4, 50, 64\)"):
        on("ada").select("sage2")(*(x[0] for x in qkv()))


def test_a_mask_goes_to_a_backend_that_takes_it(on: MakeDispatcher, packages) -> None:
    q, k, v = qkv()
    mask = torch.rand(50, 50, generator=torch.Generator().manual_seed(0)) > 0.5
    mask[:, 0] = True
    expected = exact(q, k, v, torch.zeros(50, 50).masked_fill(~mask, -torch.inf)).to(BF16)
    for name, module in (("auto", "comfy_kitchen"), ("xformers", "xformers.ops")):
        packages.calls.clear()
        assert_close(name, on("ada").select(name)(q, k, v, mask), expected, 0.01)
        assert packages.calls == {module: 2}
    packages.calls.clear()
    assert_close("sage2", on("ada").select("sage2")(q, k, v, mask), expected, 0.01)
    assert not packages.calls


def test_dropout_and_gradients_go_to_a_backend_that_has_them(on: MakeDispatcher, packages) -> None:
    q, k, v = qkv()
    dispatcher = on("ada")
    dispatcher.select("auto")(q, k, v, None, 0.5)
    assert packages.calls == {"flash_attn": 2}
    packages.calls.clear()
    output = dispatcher.select("auto")(q.requires_grad_(), k, v)
    output.float().sum().backward()
    assert q.grad is not None
    assert packages.calls == {"flash_attn": 1}
    packages.calls.clear()
    with torch.no_grad():
        dispatcher.select("auto")(q, k, v)
    assert packages.calls == {"sageattention": 2}


def test_grouped_heads_are_told_apart_from_a_mistake(on: MakeDispatcher, packages) -> None:
    q, k, v = qkv()
    selection = on("ada").select("sage2")
    output = selection(q, k[:, :2], v[:, :2], enable_gqa=True)
    assert_close("output", output, exact(q, *(x[:, :2].repeat_interleave(2, 1) for x in (k, v))).to(BF16), 0.01)
    assert packages.calls["sageattention"] == 2
    with pytest.raises(RuntimeError):
        selection(q, k[:, :2], v[:, :2])


@pytest.mark.parametrize("name", ["sage2", "sdpa", "sage3"])
def test_scale_and_layout_hold_for_every_backend(on: MakeDispatcher, name: str) -> None:
    q, k, v = qkv(kv_tokens=31)
    output = on("blackwell").select(name)(q, k, v, scale=0.3, skip_output_reshape=False)
    expected = softmax_attention(q.float(), k.float(), v.float(), scale=0.3).out.to(BF16)
    assert_close(name, output, expected.transpose(1, 2).reshape(1, 50, 256), 0.02)


def test_who_must_not_lose_precision_gets_no_quantised_backend(on: MakeDispatcher, packages) -> None:
    selection = on("blackwell").select("auto")
    selection(*qkv(), low_precision_attention=False)
    assert set(packages.calls) == {"flash_attn.cute"}
    selection(*qkv(), low_precision_attention=True)
    assert packages.calls["sageattn3"] == 2


def test_a_selection_is_the_same_object_for_the_same_meaning(on: MakeDispatcher) -> None:
    dispatcher = on("ada")
    assert dispatcher.select("sageattn") is dispatcher.select("sage")
    assert dispatcher.select("sage") is not dispatcher.select("sage2")


def test_forgetting_gives_a_failed_backend_another_chance(on: MakeDispatcher, packages) -> None:
    dispatcher = on("ada")
    module = packages.modules.pop("sageattention")
    selection = dispatcher.select("sage2")
    selection(*qkv())
    packages.modules["sageattention"] = module
    selection(*qkv())
    assert not packages.calls
    dispatcher.forget()
    selection(*qkv())
    assert packages.calls == {"sageattention": 2}


def test_many_threads_probe_once(on: MakeDispatcher, packages) -> None:
    selection = on("ada").select("sage2")
    tensors, barrier, outputs = qkv(), threading.Barrier(8), []

    def attend() -> None:
        barrier.wait()
        outputs.append(selection(*tensors))

    threads = [threading.Thread(target=attend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outputs) == 8
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert packages.calls["sageattention"] == 1 + 8
    assert packages.lookups["sageattention"] == 1


def test_a_compiled_model_gets_the_same_answers(on: MakeDispatcher, packages) -> None:
    selection = on("ada").select("sage2")
    q, k, v = qkv()
    compiled = torch.compile(lambda a, b, c: selection(a * 2, b, c) + 1, backend="eager")
    for _ in range(2):
        assert_close("output", compiled(q, k, v), selection(q * 2, k, v) + 1, 1e-6)
    assert packages.calls["sageattention"] == 1 + 4


def test_inference_mode_is_no_obstacle(on: MakeDispatcher, packages) -> None:
    selection = on("ada").select("sage2")
    with torch.inference_mode():
        q, k, v = qkv()
        output = selection(q, k, v)
    q, k, v = qkv()
    assert torch.equal(selection(q, k, v), output)
    assert packages.calls["sageattention"] == 3
