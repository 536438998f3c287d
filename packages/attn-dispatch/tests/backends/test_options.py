from dataclasses import dataclass

import pytest
from attn_dispatch.backends.options import check_options, option, options_of


@dataclass(frozen=True)
class Settings:
    count: int = option(3, "how many", 1, 8, 1)
    share: float = option(0.5, "which part", 0.0, 1.0, 0.25)
    enabled: bool = option(True, "whether")
    kind: str = option("a", "which", choices=("a", "b"))
    plain: int = 7

    def __post_init__(self) -> None:
        check_options(self)


def test_options_are_read_in_the_order_of_the_fields_with_all_that_is_known() -> None:
    found = options_of(Settings)
    assert [(one.name, one.default) for one in found] == [
        ("count", 3),
        ("share", 0.5),
        ("enabled", True),
        ("kind", "a"),
    ]
    assert found[1].option.help == "which part"
    assert (found[1].option.minimum, found[1].option.maximum, found[1].option.step) == (0.0, 1.0, 0.25)
    assert found[3].option.choices == ("a", "b")
    assert options_of(Settings(count=5)) == found


def test_ends_of_ranges_and_whole_floats_are_allowed() -> None:
    assert Settings(count=8, share=1).share == 1
    assert Settings(count=1, share=0.0, enabled=False, kind="b").kind == "b"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("count", 0, "count must be at least 1, got 0"),
        ("count", 9, "count must be at most 8, got 9"),
        ("count", 2.0, "count must be a whole number, got 2.0"),
        ("count", True, "count must be a whole number, got True"),
        ("share", float("nan"), "share must be finite, got nan"),
        ("share", "0.5", "share must be a number, got '0.5'"),
        ("enabled", 1, "enabled must be True or False, got 1"),
        ("kind", "c", "kind must be one of 'a', 'b', got 'c'"),
        ("kind", None, "kind must be one of 'a', 'b', got None"),
    ],
)
def test_a_value_that_does_not_fit_is_named(name: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("'", ".")):
        Settings(**{name: value})  # type: ignore[arg-type]
