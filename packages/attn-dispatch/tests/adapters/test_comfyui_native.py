"""ComfyUI's attention functions: a stand-in for its module, and the real one where COMFYUI_PATH names a checkout."""

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from attn_dispatch.adapters.comfyui_native import ComfyUIHost
from attn_dispatch.native import Arch, Dispatcher, Host
from attn_kernels import softmax_attention
from attn_kernels.testing import assert_close, make_qkv
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

BF16 = torch.bfloat16
Attention = Callable[..., Tensor]


class FakeComfyUI(ModuleType):
    """Module ``comfy.ldm.modules.attention`` as ComfyUI has it: wrapped functions, a registry, both layouts.

    Attributes:
        seen: Name and keywords of every call that reached a function.
    """

    def __init__(self) -> None:
        super().__init__("comfy.ldm.modules.attention")
        self.seen: list[tuple[str, dict[str, object]]] = []
        self.REGISTERED_ATTENTION_FUNCTIONS = {
            name: self.wrap_attn(self.make(name)) for name in ("pytorch", "sage", "sage3", "flash", "xformers")
        }

    @staticmethod
    def wrap_attn(function: Attention) -> Attention:
        @functools.wraps(function)
        def wrapper(*args: object, **kwargs: object) -> Tensor:
            if "_inside_attn_wrapper" not in kwargs:
                kwargs["_inside_attn_wrapper"] = True
                options = kwargs.get("transformer_options") or {}
                if "optimized_attention_override" in options:
                    return options["optimized_attention_override"](function, *args, **kwargs)
            return function(*args, **kwargs)

        return wrapper

    def make(self, name: str) -> Attention:
        def attention(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False,
                      **kwargs):  # fmt: skip
            assert skip_reshape
            assert heads == q.shape[1] == k.shape[1]
            assert "scale" not in kwargs
            self.seen.append((name, {"mask": mask, "skip_output_reshape": skip_output_reshape, **kwargs}))
            if name == "xformers" and mask is not None:
                assert mask.is_floating_point()
            output = scaled_dot_product_attention(q, k, v, mask)
            return output if skip_output_reshape else output.transpose(1, 2).flatten(2)

        return attention

    def ran(self) -> list[str]:
        names = [name for name, _ in self.seen]
        self.seen.clear()
        return names


@pytest.fixture
def comfy(monkeypatch: pytest.MonkeyPatch) -> FakeComfyUI:
    module = FakeComfyUI()
    monkeypatch.setitem(sys.modules, "comfy.ldm.modules.attention", module)
    return module


def lookup(name: str) -> object:
    module = ModuleType(name)
    module.ran = 0

    def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **kwargs):
        module.ran += 1
        return scaled_dot_product_attention(q, k, v, scale=sm_scale, enable_gqa=q.shape[1] != k.shape[1])

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
        rows = (x.transpose(1, 2) for x in (query, key, value))
        return scaled_dot_product_attention(*rows, attn_bias, scale=scale).transpose(1, 2)

    def int8_attention(q, k, v, *, scale=None, attn_mask=None):
        return scaled_dot_product_attention(q, k, v, attn_mask, scale=scale)

    functions = {
        "sageattention": {"sageattn": sageattn},
        "sageattn3": {"sageattn3_blackwell": lambda q, k, v, **kwargs: scaled_dot_product_attention(q, k, v)},
        "xformers.ops": {"memory_efficient_attention": memory_efficient_attention},
        "comfy_kitchen": {"int8_attention": int8_attention},
    }
    if name not in functions:
        raise ModuleNotFoundError(name=name.partition(".")[0])
    vars(module).update(functions[name])
    return module


def dispatcher(capability: tuple[int, int] = (8, 9)) -> Dispatcher:
    return Dispatcher(lookup, ComfyUIHost(), lambda device: Arch.of_capability(*capability))


def qkv(tokens: int = 50) -> tuple[Tensor, Tensor, Tensor]:
    return make_qkv(2, 4, tokens, 64, dtype=BF16)


def expected(q: Tensor, k: Tensor, v: Tensor, **kwargs: object) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return softmax_attention(q.float(), k.float(), v.float(), **kwargs).out.to(q.dtype)


def test_without_comfyui_there_is_nothing_and_nothing_is_imported() -> None:
    host: Host = ComfyUIHost()
    assert host.device() is None
    assert host.attention("sdpa") is None
    assert host.guest(lambda q, k, v, m, p, s: q) is None
    assert not any(name == "comfy" or name.startswith("comfy.") for name in sys.modules)


@pytest.mark.parametrize(("name", "function"), [("sdpa", "pytorch"), ("sage2", "sage"), ("xformers", "xformers")])
@pytest.mark.parametrize("skip", [True, False])
def test_what_comfyui_has_runs_there_in_both_layouts(comfy: FakeComfyUI, name: str, function: str, skip: bool) -> None:
    selection = dispatcher().select(name)
    assert selection.label().endswith(", by ComfyUI")
    comfy.ran()
    q, k, v = qkv()
    output = selection(q, k, v, skip_output_reshape=skip, transformer_options={"block_index": 3}, unheard_of=7)
    called, kwargs = comfy.seen[-1]
    assert called == function
    assert (kwargs["transformer_options"], kwargs["unheard_of"]) == ({"block_index": 3}, 7)
    assert kwargs["skip_output_reshape"] == skip
    want = expected(q, k, v)
    assert_close("output", output, want if skip else want.transpose(1, 2).flatten(2), 0.01)


def test_a_broken_package_is_found_out_although_comfyui_hides_it(comfy: FakeComfyUI) -> None:
    def broken(name: str) -> object:
        module = ModuleType(name)
        module.sageattn = lambda q, k, v, tensor_layout="HND", **kwargs: torch.zeros_like(q)
        return module

    selection = Dispatcher(broken, ComfyUIHost(), lambda device: Arch.of_capability(8, 9)).select("sage2")
    assert "gave wrong numbers in a probe" in selection.label()
    selection(*qkv())
    assert set(comfy.ran()) == {"pytorch"}


def test_an_override_reaches_every_route(comfy: FakeComfyUI) -> None:
    caught = []

    def override(function: Attention, *args: object, **kwargs: object) -> Tensor:
        caught.append(kwargs["transformer_options"]["block_index"])
        return function(*args, **kwargs) * 2

    options = {"optimized_attention_override": override, "block_index": 5}
    q, k, v = qkv()
    # comfy-kitchen is not registered in this ComfyUI, so the package itself runs as a guest.
    for name in ("sdpa", "sage2", "ck_int8"):
        for skip in (True, False):
            output = dispatcher().select(name)(q, k, v, transformer_options=options, skip_output_reshape=skip)
            want = 2 * expected(q, k, v)
            assert_close(name, output, want if skip else want.transpose(1, 2).flatten(2), 0.01)
    assert caught == [5] * 6


def test_a_call_from_inside_an_override_does_not_enter_it_again(comfy: FakeComfyUI) -> None:
    selection = dispatcher().select("sage2")
    depth = []

    def override(function, q, k, v, heads, mask=None, **kwargs):
        depth.append(None)
        for unwanted in ("skip_reshape", "attn_precision"):
            kwargs.pop(unwanted, None)
        return selection(q, k, v, mask, **kwargs)

    q, k, v = qkv()
    options = {"optimized_attention_override": override}
    sage = comfy.REGISTERED_ATTENTION_FUNCTIONS["sage"]
    output = sage(q, k, v, 4, skip_reshape=True, skip_output_reshape=True, transformer_options=options)
    assert_close("output", output, expected(q, k, v), 0.01)
    assert len(depth) == 1


def test_masks_go_where_comfyui_takes_them(comfy: FakeComfyUI) -> None:
    q, k, v = qkv()
    mask = torch.rand(50, 50, generator=torch.Generator().manual_seed(0)) > 0.5
    mask[:, 0] = True
    want = expected(q, k, v, attn_bias=torch.zeros(50, 50).masked_fill(~mask, -torch.inf))
    for name, function in (("sage2", "pytorch"), ("xformers", "xformers")):
        comfy.ran()
        assert_close(name, dispatcher().select(name)(q, k, v, mask), want, 0.01)
        assert comfy.ran()[-1] == function


def test_scale_and_grouped_heads_hold_for_functions_that_know_neither(comfy: FakeComfyUI) -> None:
    q, k, v = qkv()
    selection = dispatcher().select("sage2")
    assert_close("scale", selection(q, k, v, scale=0.3), expected(q, k, v, scale=0.3), 0.02)
    output = selection(q, k[:, :2], v[:, :2], enable_gqa=True)
    assert_close("grouped", output, expected(q, k[:, :2], v[:, :2]), 0.01)
    assert set(comfy.ran()) == {"sage"}


def test_short_calls_are_not_called_sage3_when_comfyui_runs_something_else(comfy: FakeComfyUI) -> None:
    selection = dispatcher((12, 0)).select("sage3")
    selection(*make_qkv(1, 2, 1100, 64, dtype=BF16))
    assert comfy.ran()[-1] == "sage3"
    selection(*make_qkv(1, 2, 1024, 64, dtype=BF16))
    assert comfy.ran() == ["pytorch"]


def test_dropout_and_gradients_do_not_go_to_comfyui(comfy: FakeComfyUI) -> None:
    q, k, v = qkv()
    selection = dispatcher().select("sdpa")
    assert torch.count_nonzero(selection(q, k, v, None, 1.0)) == 0
    assert comfy.ran() == []
    flash = dispatcher().select("xformers")
    flash(q.requires_grad_(), k, v).float().sum().backward()
    assert q.grad is not None
    assert comfy.ran() == []


def test_comfyui_may_be_loaded_later(monkeypatch: pytest.MonkeyPatch) -> None:
    made_before = dispatcher()
    assert made_before.select("sdpa").label() == "PyTorch SDPA"
    monkeypatch.setitem(sys.modules, "comfy.ldm.modules.attention", FakeComfyUI())
    made_before.forget()
    assert made_before.select("sdpa").label() == "PyTorch SDPA, by ComfyUI"


def test_the_device_is_comfyui_s(monkeypatch: pytest.MonkeyPatch) -> None:
    management = ModuleType("comfy.model_management")
    management.get_torch_device = lambda: torch.device("cuda")
    monkeypatch.setitem(sys.modules, "comfy.model_management", management)
    assert ComfyUIHost().device() == torch.device("cuda", 0)
    management.get_torch_device = lambda: torch.device("cpu")
    assert dispatcher().device() == torch.device("cpu")


REAL = """
import sys
sys.argv = ["main.py", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import comfy.ldm.modules.attention as attention
import torch
from attn_dispatch.default import *
from attn_dispatch import default

assert default._dispatcher().device() == torch.device("cpu")
assert set_backend("auto") == "PyTorch SDPA, by ComfyUI", get_backend_label()
g = torch.Generator().manual_seed(0)
q, k, v = (torch.randn(2, 4, 50, 64, generator=g) for _ in range(3))
mask = torch.rand(2, 1, 50, 50, generator=g) > 0.5
mask[..., 0] = True
sdpa = torch.nn.functional.scaled_dot_product_attention
assert torch.equal(dispatch_attention(q, k, v), sdpa(q, k, v))
assert torch.equal(dispatch_attention(q, k, v, mask), sdpa(q, k, v, mask))
flat = dispatch_attention(q, k, v, skip_output_reshape=False, transformer_options={}, unheard_of=1)
assert torch.equal(flat, sdpa(q, k, v).transpose(1, 2).flatten(2))
torch.testing.assert_close(dispatch_attention(q, k, v, scale=0.3), sdpa(q, k, v, scale=0.3))

caught = []
def override(function, *args, **kwargs):
    caught.append(function.__name__)
    return function(*args, **kwargs)
options = {"optimized_attention_override": override}
for name in ("sdpa", "sdpa_math"):
    with attention_backend(name):
        for skip in (True, False):
            output = dispatch_attention(q, k, v, mask, transformer_options=options, skip_output_reshape=skip)
            want = sdpa(q, k, v, mask)
            torch.testing.assert_close(output, want if skip else want.transpose(1, 2).flatten(2))
assert caught == ["attention_pytorch"] * 2 + ["attention"] * 2, caught

def through(function, q, k, v, heads, mask=None, **kwargs):
    assert kwargs.pop("skip_reshape")
    skip = kwargs.pop("skip_output_reshape", False)
    return dispatch_attention(q, k, v, mask, skip_output_reshape=skip, **kwargs)
output = attention.attention_sub_quad(
    q, k, v, 4, mask=None, skip_reshape=True, transformer_options={"optimized_attention_override": through})
torch.testing.assert_close(output, sdpa(q, k, v).transpose(1, 2).flatten(2))
print("agreed")
"""


@pytest.mark.comfyui
@pytest.mark.skipif(not os.environ.get("COMFYUI_PATH"), reason="COMFYUI_PATH names no ComfyUI checkout")
def test_the_functions_of_a_real_comfyui_are_called_as_they_want() -> None:
    checkout = os.environ["COMFYUI_PATH"]
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    sources = [str(Path(__file__).parents[3] / one / "src") for one in ("attn-dispatch", "attn-kernels")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([checkout, *sources])}
    done = subprocess.run([python, "-c", REAL], env=environment, cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "agreed"
