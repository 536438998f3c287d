import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def values(host: Any) -> ModuleType:
    import comfy_nodes.nodes.values

    return comfy_nodes.nodes.values


class FakeTensor:
    def tolist(self) -> list[list[float]]:
        return [[1.0, 2.0], [3.0, 4.0]]


def test_seeds(values: ModuleType) -> None:
    assert values.RandomSeedBatch.execute(seed=42, count=2) == ([2053695854357871005, 5073395517033431291],)


@pytest.mark.parametrize(
    ("clock", "numbers", "expected"),
    [
        (["7"], ["1, 2, 3"], [1, 1, 1, 2, 2, 3, 3]),
        ([""], ["0.1 0.2"], [0.1, 0.2]),
        ([4], [30], [30, 30, 30, 30]),  # two linked numbers
        ([1.0, 2.0, 3.0], [5.0, 6.0], [5, 5, 6]),  # two linked list outputs
        (["4"], [[8, 9]], [8, 8, 9, 9]),  # a link that carries one Python list
        ([FakeTensor()], ["1"], [1, 1, 1, 1]),
    ],
)
def test_sweep(values: ModuleType, clock: list[Any], numbers: list[Any], expected: list[float]) -> None:
    assert values.ClockedSweepValues.execute(clock=clock, values=numbers) == (expected,)


def test_combinations(values: ModuleType) -> None:
    execute = values.Combinations.execute
    assert execute(a=["1, 2"], b=[3.0, 4.0, 5.0]) == ([1, 2, 1, 2, 1, 2], [3, 4, 5, 3, 4, 5], [], [])
    assert execute(a=["5"], b=[""], c=[None], d=["[6, 7]"]) == ([5, 5], [], [], [6, 7])
    assert execute(a=[FakeTensor()]) == ([1, 2, 3, 4], [], [], [])
    with pytest.raises(ValueError, match="a is empty; write at least one number"):
        execute(a=["  "], b=["1"])
    with pytest.raises(ValueError, match="c: entry 2 of 2 is not a number: 'x'"):
        execute(a=["1"], c=["1, x"])


def test_prompts(values: ModuleType, host: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    execute = values.LoadPromptListFromJSON.execute
    (host.input_folder / "prompts.json").write_text('["from input"]', encoding="utf-8")
    assert execute(json_path=" prompts.json ") == (["from input"],)
    (tmp_path / "prompts.json").write_text('["from here"]', encoding="utf-8")
    assert execute(json_path="prompts.json") == (["from here"],)
    assert execute(json_path=str(host.input_folder / "prompts.json")) == (["from input"],)
    with pytest.raises(FileNotFoundError, match=r"no prompt file at .*input.*missing\.json"):
        execute(json_path="missing.json")
    with pytest.raises(ValueError, match="path of the prompt file is empty"):
        execute(json_path=" ")


def test_fingerprint_follows_the_content(values: ModuleType, tmp_path: Path) -> None:
    fingerprint = values.LoadPromptListFromJSON.fingerprint_inputs
    file = tmp_path / "prompts.json"
    gone = fingerprint(json_path=str(file))
    file.write_text('["a"]', encoding="utf-8")
    first = fingerprint(json_path=str(file))
    file.write_text('["b"]', encoding="utf-8")
    second = fingerprint(json_path=str(file))
    file.write_text('["a"]', encoding="utf-8")
    assert len({gone, first, second}) == 3
    assert fingerprint(json_path=str(file)) == first
    assert fingerprint(json_path="") == fingerprint(json_path=str(tmp_path)) == gone
    linked = fingerprint(json_path=None)
    assert linked != linked  # NaN: always read


def test_hosts_range_checks_stay_on_and_nodes_stay_thin(values: ModuleType) -> None:
    nodes = (values.RandomSeedBatch, values.LoadPromptListFromJSON, values.ClockedSweepValues, values.Combinations)
    for node in nodes:
        assert not hasattr(node, "validate_inputs")
        assert len(inspect.getsource(node.execute).splitlines()) <= 25
        inputs = node.define_schema().inputs
        parameters = inspect.signature(node.execute).parameters
        assert list(parameters) == [item.id for item in inputs]
        optional = [name for name, parameter in parameters.items() if parameter.default is not inspect.Parameter.empty]
        assert optional == [item.id for item in inputs if item.optional]
