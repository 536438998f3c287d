import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from types import SimpleNamespace

import attn_dispatch
import pytest
import torch
from attn_dispatch import default
from attn_dispatch.default import (
    attention_backend,
    auto_detect_precision,
    auto_select,
    dispatch_attention,
    dispatch_attention_varlen,
    explain,
    get_backend,
    get_backend_label,
    set_backend,
)
from attn_dispatch.native import Arch, Dispatcher
from attn_kernels import softmax_attention
from attn_kernels.testing import assert_close, make_qkv
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

SAGE, FLASH, SDPA = "SageAttention 2 (INT8)", "FlashAttention 2", "PyTorch SDPA"


def lookup(name: str) -> object:
    """Sage and flash as packages would be, computed with SDPA."""

    def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **kwargs):
        return scaled_dot_product_attention(q, k, v, scale=sm_scale)

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, **kwargs):
        return scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=softmax_scale).transpose(
            1, 2
        )

    modules = {
        "sageattention": SimpleNamespace(sageattn=sageattn, sageattn_qk_int8_pv_fp16_cuda=sageattn),
        "flash_attn": SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_varlen_func=None),
    }
    if name == "torch":
        return torch
    if name not in modules:
        raise ModuleNotFoundError(name=name.partition(".")[0])
    return modules[name]


@pytest.fixture
def ada() -> Iterator[None]:
    """The default of a process on an Ada GPU with Sage and flash."""
    process = default._choice.get()
    before = process.selection
    process.selection = Dispatcher(lookup, detect=lambda device: Arch.of_capability(8, 9)).select("sdpa")
    yield
    process.selection = before


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    process = default._choice.get()
    before = process.selection
    yield
    assert default._choice.get() is process
    process.selection = before


def qkv() -> tuple[Tensor, Tensor, Tensor]:
    return make_qkv(2, 3, 50, 64, dtype=torch.bfloat16)


@pytest.mark.usefixtures("ada")
def test_until_someone_chooses_sdpa_attends() -> None:
    assert (get_backend(), get_backend_label()) == ("sdpa", SDPA)
    q, k, v = qkv()
    assert torch.equal(dispatch_attention(q, k, v), scaled_dot_product_attention(q, k, v))


@pytest.mark.usefixtures("ada")
@pytest.mark.parametrize(
    ("name", "backend", "label"),
    [
        ("auto", "sage2", SAGE),
        ("sage", "sage2", SAGE),
        ("flash_attn", "flash", FLASH),
        ("sdpa", "sdpa", SDPA),
        ("sdpa_math", "sdpa_math", "PyTorch SDPA (math)"),
    ],
)
def test_a_choice_says_what_runs(name: str, backend: str, label: str) -> None:
    assert set_backend(name) == label
    assert (get_backend(), get_backend_label()) == (backend, label)


@pytest.mark.usefixtures("ada")
def test_a_label_never_claims_what_does_not_run() -> None:
    label = set_backend("flash_fp8")
    assert label.startswith("PyTorch SDPA (flash_fp8 does not run on ampere")
    assert get_backend() == "sdpa"


@pytest.mark.usefixtures("ada")
def test_an_unknown_backend_is_an_error_and_changes_nothing() -> None:
    set_backend("sage")
    with pytest.raises(ValueError, match="no attention backend 'sgae'"):
        set_backend("sgae")
    with pytest.raises(ValueError, match="no attention backend"), attention_backend("sgae"):
        pass
    assert get_backend() == "sage2"


@pytest.mark.usefixtures("ada")
def test_the_fastest_is_named_without_being_chosen() -> None:
    assert auto_select() == "sage2"
    assert get_backend() == "sdpa"
    assert auto_detect_precision() is torch.bfloat16


def test_on_the_cpu_auto_is_sdpa() -> None:
    cpu = torch.device("cpu")
    assert auto_select(cpu) == "sdpa"
    assert auto_detect_precision(cpu) is torch.float32


@pytest.mark.usefixtures("ada")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", ["auto", "sdpa"])
def test_attention_is_attention(name: str) -> None:
    set_backend(name)
    q, k, v = qkv()
    keep = torch.rand(2, 1, 50, 50, generator=torch.Generator().manual_seed(0)) > 0.5
    bias = torch.zeros(keep.shape).masked_fill(~keep, -torch.inf)
    wide = [x.float() for x in (q, k, v)]
    assert_close("plain", dispatch_attention(q, k, v), softmax_attention(*wide).out.to(q.dtype), 0.01)
    masked = softmax_attention(*wide, attn_bias=bias).out.to(q.dtype)
    assert_close("masked", dispatch_attention(q, k, v, keep), masked, 0.01)
    assert_close("by name", dispatch_attention(q, k, v, attn_mask=keep, dropout_p=0.0), masked, 0.01)
    packed = [x[0].transpose(0, 1) for x in (q, k, v)]
    bounds = torch.tensor([0, 20, 50], dtype=torch.int32)
    output = dispatch_attention_varlen(*packed, bounds, bounds, 30, 30)
    first = softmax_attention(*(x[:1, :, :20] for x in wide)).out[0].transpose(0, 1).to(q.dtype)
    assert_close("packed", output[:20], first, 0.01)


@pytest.mark.usefixtures("ada")
def test_a_block_has_its_own_backend_and_blocks_nest() -> None:
    with attention_backend("sage2") as label:
        assert (label, get_backend()) == (SAGE, "sage2")
        with attention_backend("flash"):
            assert get_backend() == "flash"
        assert get_backend() == "sage2"
        with pytest.raises(KeyError), attention_backend("flash"):
            raise KeyError
        assert get_backend() == "sage2"
    assert get_backend() == "sdpa"


@pytest.mark.usefixtures("ada")
def test_a_choice_inside_a_block_is_the_process_s() -> None:
    with attention_backend("sage2"):
        set_backend("flash")
        assert get_backend() == "sage2"
    assert get_backend() == "flash"


@pytest.mark.usefixtures("ada")
def test_a_choice_is_seen_by_threads_that_run_already() -> None:
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(get_backend).result() == "sdpa"
        set_backend("sage")
        assert pool.submit(get_backend).result() == "sage2"
        pool.submit(set_backend, "flash").result()
    assert get_backend() == "flash"


@pytest.mark.usefixtures("ada")
def test_a_block_is_seen_by_its_thread_alone() -> None:
    inside, leave, seen = threading.Event(), threading.Event(), []

    def work() -> None:
        with attention_backend("flash"):
            inside.set()
            leave.wait(10)
            seen.append(get_backend())

    thread = threading.Thread(target=work)
    thread.start()
    assert inside.wait(10)
    set_backend("sage")
    assert get_backend() == "sage2"
    leave.set()
    thread.join()
    assert seen == ["flash"]


@pytest.mark.usefixtures("ada")
def test_tasks_do_not_disturb_each_other() -> None:
    async def work(name: str) -> list[str]:
        seen = []
        with attention_backend(name):
            for _ in range(3):
                await asyncio.sleep(0)
                seen.append(get_backend())
        return [*seen, get_backend()]

    async def all_of_them() -> list[list[str]]:
        return await asyncio.gather(work("sage2"), work("flash"), work("sdpa_math"))

    assert asyncio.run(all_of_them()) == [[name] * 3 + ["sdpa"] for name in ("sage2", "flash", "sdpa_math")]


@pytest.mark.usefixtures("ada")
def test_a_task_started_in_a_block_keeps_its_backend() -> None:
    async def child() -> str:
        await asyncio.sleep(0)
        return get_backend()

    async def parent() -> str:
        with attention_backend("flash"):
            task = asyncio.create_task(child())
        return await task

    assert asyncio.run(parent()) == "flash"


@pytest.mark.usefixtures("ada")
def test_the_explanation_is_of_the_choice_in_force() -> None:
    set_backend("auto")
    assert explain().chosen.candidate == "sage2"
    with attention_backend("flash"):
        assert explain((1, 2, 64, 64)).chosen.candidate == "flash2"
    assert "PyTorch SDPA" in str(explain(masked=True).chosen.label)


HEAVY = (
    "attn_dispatch.testing",
    "comfy",
    "diffusers",
    "flash_attn",
    "matplotlib",
    "numpy.testing",
    "sageattention",
    "torch._dynamo",
    "torch._inductor",
    "torch.nn.attention.flex_attention",
    "torchvision",
    "transformers",
    "triton",
    "xformers",
)


def test_importing_loads_nothing_heavy_and_decides_nothing() -> None:
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import attn_dispatch, attn_dispatch.default as default\n"
        "assert default._choice.get().selection is None\n"
        "print('\\n'.join(sorted(set(sys.modules) - before)))\n"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    loaded = out.split()
    assert "attn_dispatch.default" in loaded
    assert not [name for name in loaded if name.startswith("attn_dispatch.native")]
    assert not [name for name in loaded if any(name == one or name.startswith(f"{one}.") for one in HEAVY)]
    ours = [name for name in loaded if name.partition(".")[0] in ("attn_dispatch", "attn_kernels")]
    # A few modules of the standard library come with them; none of the packages that dispatch is about.
    assert len(loaded) - len(ours) <= 30, sorted(set(loaded) - set(ours))


def test_importing_the_package_alone_reads_no_other_module() -> None:
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import attn_dispatch\n"
        "print('\\n'.join(sorted(set(sys.modules) - before)))\n"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.split() == ["attn_dispatch"]


def test_every_public_name_is_found_and_no_other() -> None:
    for module, names in attn_dispatch._HOMES.items():
        for name in names:
            assert getattr(attn_dispatch, name) is getattr(import_module(f"attn_dispatch.{module}"), name)
    assert sorted(name for names in attn_dispatch._HOMES.values() for name in names) == attn_dispatch.__all__
    assert attn_dispatch.__all__ == sorted(attn_dispatch.__all__)
    assert set(attn_dispatch.__all__) <= set(dir(attn_dispatch))
    with pytest.raises(AttributeError, match="no attribute 'dispatch'"):
        _ = attn_dispatch.dispatch
