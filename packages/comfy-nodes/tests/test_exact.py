from importlib import import_module

import pytest
import torch
from attn_dispatch import AttentionCall
from attn_dispatch.native import Dispatcher
from attn_kernels import softmax_attention
from attn_kernels.testing import make_qkv
from comfy_nodes.exact import BACKENDS, ExactBackend, exact_backend


def _call(masked: bool) -> AttentionCall:
    q, k, v = make_qkv(2, 3, 37, 16, logit_std=2.0, kv_tokens=41, dtype=torch.float32, seed=1)
    mask = torch.ones(2, 41, dtype=torch.bool)
    mask[1, 30:] = False
    return AttentionCall(q, k, v, scale=0.3, key_mask=mask if masked else None)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["auto", "sdpa_math", "sage", "flash_attn"])
def test_every_name_answers_exactly_on_a_processor(name: str, masked: bool) -> None:
    call = _call(masked)
    backend = exact_backend(name)
    assert backend.refuses(call) is None
    expected = softmax_attention(call.q, call.k, call.v, scale=0.3, key_mask=call.key_mask).out
    torch.testing.assert_close(backend(call), expected, rtol=1e-4, atol=1e-5)


def test_the_name_is_what_runs_and_the_label_says_why() -> None:
    def lookup(module: str) -> object:
        if module == "torch":
            return import_module(module)
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    backend = ExactBackend(Dispatcher(lookup).select("sage"))
    assert backend.name == "sdpa"
    assert backend.selection.label().startswith("PyTorch SDPA (sage3 does not run on cpu")
    assert ExactBackend(Dispatcher(lookup).select("sdpa_math")).name == "sdpa_math"


def test_names() -> None:
    assert BACKENDS[0] == "auto"
    assert {"sage", "sage2", "sage3", "flash_attn", "flash_fp8", "ck_int8", "xformers", "sdpa"} <= set(BACKENDS)
    with pytest.raises(ValueError, match="there is no attention backend 'fastest'"):
        exact_backend("fastest")
