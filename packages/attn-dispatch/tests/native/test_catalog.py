import pytest
import torch
from attn_dispatch.native.arch import Arch, Tier
from attn_dispatch.native.catalog import ALIASES, CANDIDATES, GROUPS, backend_names, candidates, canonical_name
from attn_dispatch.native.kind import CallKind

NAMED = {candidate.key: candidate for candidate in CANDIDATES}
KIND = CallKind(torch.bfloat16, torch.device("cpu"), 128, 128)


def test_every_promised_name_exists() -> None:
    promised = {"auto", "sage", "sage3", "sage2", "flash_attn", "flash_fp8", "flash", "sdpa"}
    assert promised | {"ck_int8", "flash4", "xformers", "flex"} <= set(backend_names())


def test_keys_are_unique_and_name_no_other_backend() -> None:
    assert len(NAMED) == len(CANDIDATES)
    backends = {one.backend for one in CANDIDATES}
    assert all(NAMED[key].backend == key for key in backends & set(NAMED))


@pytest.mark.parametrize("alias", ALIASES)
def test_an_alias_stands_for_a_name(alias: str) -> None:
    assert alias not in backend_names()
    assert canonical_name(alias) in backend_names()


def test_an_unknown_name_is_an_error_that_lists_the_names() -> None:
    with pytest.raises(ValueError, match=r"no attention backend 'sage9'; there are auto, .*sage2"):
        canonical_name("sage9")


def test_a_group_is_the_better_one_first() -> None:
    assert [one.key for one in candidates("sage", Arch.of_capability(12, 0))] == ["sage3", "sage2"]
    assert [one.key for one in candidates("flash_attn", Arch.of_capability(9, 0))] == ["flash3", "flash2", "flash4"]
    assert [one.key for one in candidates("flash_attn", Arch.of_capability(10, 0))] == ["flash4", "flash3", "flash2"]
    assert {member for group in GROUPS.values() for member in group} <= {one.backend for one in CANDIDATES}


def test_a_key_picks_one_of_several_packages() -> None:
    assert [one.key for one in candidates("flash", Arch.of_capability(9, 0))] == ["flash3", "flash2"]
    assert [one.key for one in candidates("flash2", Arch.of_capability(9, 0))] == ["flash2"]


@pytest.mark.parametrize(
    ("key", "arch", "reason"),
    [
        ("sage3", Arch.of_capability(9, 0), "does not run on hopper, compute capability 9.0"),
        ("flash2", Arch.of_capability(7, 5), "does not run on older, compute capability 7.5"),
        ("ck_int8", Arch.of_capability(7, 0), "needs compute capability 7.5, this is older, compute capability 7.0"),
        ("flash4_fp8", Arch.of_capability(12, 0), "needs compute capability 10.x, this is blackwell, compute capab"),
        ("xformers", Arch(Tier.CPU), "does not run on cpu"),
    ],
)
def test_a_device_is_refused_in_words(key: str, arch: Arch, reason: str) -> None:
    assert (NAMED[key].refuses_device(arch) or "").startswith(reason)


@pytest.mark.parametrize("key", ["flash2", "sage2", "ck_int8"])
def test_capabilities_do_not_bind_other_makers(key: str) -> None:
    assert NAMED[key].refuses_device(Arch(Tier.ROCM)) is None


@pytest.mark.parametrize(
    ("key", "change", "reason"),
    [
        ("sage2", {"dtype": torch.float32}, "does not take float32"),
        ("sage2", {"width": 192, "value_width": 192}, "takes head widths up to 128, not 192"),
        ("flash3", {"width": 100, "value_width": 100}, "takes head widths up to 256 in steps of 8, not 100"),
        ("sage3", {"value_width": 64}, "takes no values of another width (64) than the keys (128)"),
        ("flash2", {"masked": True}, "takes no mask"),
        ("sage2", {"dropout": True}, "has no dropout"),
        ("sage2", {"gradient": True}, "has no gradient"),
        ("xformers", {"grouped": True}, "takes no grouped heads"),
    ],
)
def test_a_kind_of_call_is_refused_in_words(key: str, change: dict[str, object], reason: str) -> None:
    assert NAMED[key].refuses_kind(KIND) is None
    assert NAMED[key].refuses_kind(KIND._replace(**change)) == reason


def test_whatever_computes_in_few_bits_says_so() -> None:
    bits = ("FP4", "FP8", "INT8")
    assert all(one.quantised == any(part in one.label for part in bits) for one in CANDIDATES)
