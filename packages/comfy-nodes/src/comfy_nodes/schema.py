"""Inputs of nodes, made from the dataclasses that are read: name, type, default, range and tooltip stand once."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from attn_dispatch.backends.options import NamedOption, Option, Value, options_of
from comfy_api.latest import io

_Config = TypeVar("_Config")

ATTENTION_MENU = "advanced/attention"
"""Menu of the attention nodes."""


def node_schema(**facts: Any) -> io.Schema:
    """Make a node's schema; facts that an older ComfyUI does not know, such as ``search_aliases``, are left out.

    Args:
        **facts: Fields of ``io.Schema``.
    """
    known = {one.name for one in fields(io.Schema)}
    return io.Schema(**{name: fact for name, fact in facts.items() if name in known})


def hosted(make: Callable[..., io.Input], name: str, **options: Any) -> io.Input:
    """Make an input; options that an older ComfyUI does not know, such as ``advanced``, are left out.

    Args:
        make: Class of the input.
        name: Its id.
        **options: Its further arguments; ``None`` = not said.
    """
    known = inspect.signature(make).parameters
    open_ended = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in known.values())
    said = {option: value for option, value in options.items() if value is not None}
    return make(name, **{option: value for option, value in said.items() if open_ended or option in known})


def widget(name: str, default: Value, option: Option, **options: Any) -> io.Input:
    """Make the input of one value: a switch, a number, a choice or a text, as its default is.

    Args:
        name: Id of the input.
        default: What a new node holds.
        option: Tooltip, range, step, choices.
        **options: What else the host knows of an input, e.g. ``optional``, ``advanced``, ``display_mode``.
    """
    told: dict[str, Any] = {"default": default, "tooltip": option.help, **options}
    if isinstance(default, bool):
        return hosted(io.Boolean.Input, name, **told)
    if isinstance(default, str):
        if option.choices:
            return hosted(io.Combo.Input, name, options=list(option.choices), **told)
        return hosted(io.String.Input, name, **told)
    told |= {"min": option.minimum, "max": option.maximum, "step": option.step}
    if isinstance(default, int):
        whole = {end: None if told[end] is None else int(told[end]) for end in ("min", "max", "step")}
        return hosted(io.Int.Input, name, **told | whole)
    told["step"] = reachable_step(option.minimum, option.step)
    return hosted(io.Float.Input, name, **{"round": False, **told})


def reachable_step(minimum: float | None, step: float | None) -> float | None:
    """Return a step of which the minimum is a multiple: the step itself, else the minimum.

    The page rounds a number to its step when it opens a workflow, and pulls what then lies below the minimum up to it:
    a step of 1e-6 would turn 1e-9 into a minimum of 1e-12.
    """
    if not minimum or not step:
        return step
    times = abs(minimum) / step
    return step if abs(times - round(times)) < 1e-6 and round(times) > 0 else abs(minimum)


def inputs_of(
    config: Any,
    *names: str,
    advanced: tuple[str, ...] | bool = (),
    optional: bool = False,
) -> list[io.Input]:
    """Make the inputs of a configuration's options.

    Args:
        config: A dataclass whose fields are made by ``attn_dispatch.backends.option``.
        *names: Which options, in this order; none = all, in the order of the fields.
        advanced: Those that the page folds away; True = all of them.
        optional: Whether a workflow may lack them; needed for inputs that older versions of a node did not have.

    Raises:
        ValueError: The configuration has no such option.
    """
    known: dict[str, NamedOption] = {one.name: one for one in options_of(config)}
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(f"{config.__name__} has no option {', '.join(unknown)}; it has {', '.join(known)}")
    folded = set(known) if advanced is True else set(advanced or ())
    return [
        widget(name, default, option, optional=optional or None, advanced=name in folded or None)
        for name, default, option in (known[name] for name in names or known)
    ]


def config_from(config: type[_Config], values: Mapping[str, object]) -> _Config:
    """Make a configuration from what a node was given; inputs that are no option of it are passed over.

    Args:
        config: The dataclass.
        values: Inputs by name; an option that is missing keeps its default.

    Raises:
        ValueError: An option is out of its range.
    """
    known = {one.name for one in options_of(config)}  # type: ignore[arg-type]
    return config(**{name: value for name, value in values.items() if name in known})
