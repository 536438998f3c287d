"""The state of a training run as named tensors and plain facts, ready for a checkpoint."""

from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ttr_distill.training.replay import ReplayBuffer, ReplaySample


class SavedState(NamedTuple):
    """A state in two parts.

    Attributes:
        tensors: By name; the part of the name before ``/`` is the file of a checkpoint it belongs to.
        facts: JSON values.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, object]


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the moments and counters of an optimiser, named ``<parameter number>.<name>``."""
    return {
        f"{number}.{name}": torch.as_tensor(value)
        for number, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give an optimiser the moments that ``optimizer_tensors`` named; its own learning rates stay.

    Raises:
        ValueError: A tensor belongs to no parameter, or has another shape than it.
    """
    state: dict[int, dict[str, Tensor]] = defaultdict(dict)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, tensor in tensors.items():
        number, _, entry = name.partition(".")
        if not number.isdecimal() or int(number) >= len(parameters):
            raise ValueError(f"optimiser state {name!r} belongs to no parameter; there are {len(parameters)}")
        expected = parameters[int(number)].shape
        if entry != "step" and tensor.shape != expected:
            raise ValueError(f"optimiser state {name!r} is {tuple(tensor.shape)}, the parameter {tuple(expected)}")
        state[int(number)][entry] = tensor.clone()
    optimizer.load_state_dict(optimizer.state_dict() | {"state": dict(state)})


def replay_state(buffer: ReplayBuffer) -> SavedState:
    """Return all samples, oldest first; a tensor that several share is kept once."""
    samples = buffer.samples()
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}
    entries: list[dict[str, object]] = []
    for number, sample in enumerate(samples):
        shared: dict[str, str] = {}
        for name, tensor in sample.tensors().items():
            if id(tensor) in names:
                shared[name] = names[id(tensor)]
            else:
                names[id(tensor)] = f"{number}.{name}"
                tensors[f"replay/{number}.{name}"] = tensor
        entries.append(sample.facts() | ({"shared": shared} if shared else {}))
    return SavedState(tensors, {"samples": entries})


def load_replay(buffer: ReplayBuffer, tensors: Mapping[str, Tensor], facts: Mapping[str, object]) -> None:
    """Replace a buffer's contents by what ``replay_state`` gave.

    Raises:
        ValueError: The state is malformed, or a sample is larger than the budget.
    """
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        number, _, entry = name.removeprefix("replay/").partition(".")
        parts[number][entry] = tensor
    entries = facts["samples"]
    if not isinstance(entries, list) or set(parts) != {str(number) for number in range(len(entries))}:
        raise ValueError("the replay samples of the state do not match their descriptions")
    for index, entry in enumerate(entries):
        for name, source in mapping({"shared": {}, **entry}, "shared").items():
            owner, _, theirs = str(source).partition(".")
            if theirs not in parts.get(owner, {}):
                raise ValueError(f"replay sample {index} shares {name} with {source}, which the state lacks")
            parts[str(index)][name] = parts[owner][theirs]
    buffer.restore(ReplaySample.from_parts(parts[str(index)], entry) for index, entry in enumerate(entries))


def integer(facts: Mapping[str, object], name: str) -> int:
    """Read a whole number.

    Raises:
        ValueError: It is missing or something else.
    """
    value = facts.get(name)
    if not isinstance(value, int):
        raise ValueError(f"the state's {name!r} must be a whole number, got {value!r}")
    return value


def mapping(facts: Mapping[str, object], name: str) -> Mapping[str, object]:
    """Read an object.

    Raises:
        ValueError: It is missing or something else.
    """
    value = facts.get(name)
    if not isinstance(value, Mapping):
        raise ValueError(f"the state's {name!r} must be an object, got {value!r}")
    return value
