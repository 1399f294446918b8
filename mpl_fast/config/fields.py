"""Ranges and choices that annotate the fields of config dataclasses, and a walk over all fields."""

import ast
import dataclasses
import inspect
import itertools
import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, NamedTuple, Protocol, get_args, get_type_hints, runtime_checkable


class Range(NamedTuple):
    """A condition on a field's number, or on each number of a tuple."""

    words: str
    holds: Callable[[float], bool]


class OneOf(NamedTuple):
    """The names that a field may hold: the keys of a table."""

    table: Mapping[str, object]


def at_least(low: int) -> Range:
    """The range from `low` up."""
    return Range(f"at least {low}", lambda x: x >= low)


def at_most(high: int) -> Range:
    """The range up to `high`."""
    return Range(f"at most {high}", lambda x: x <= high)


POSITIVE = Range("above 0", lambda x: x > 0)
PositiveInt = Annotated[int, at_least(1)]
NonNegativeInt = Annotated[int, at_least(0)]
PositiveFloat = Annotated[float, POSITIVE]
NonNegativeFloat = Annotated[float, at_least(0)]
Fraction = Annotated[float, Range("in [0, 1]", lambda x: 0 <= x <= 1)]
FractionAbove0 = Annotated[float, Range("in (0, 1]", lambda x: 0 < x <= 1)]
FractionBelow1 = Annotated[float, Range("in [0, 1)", lambda x: 0 <= x < 1)]


class Option(NamedTuple):
    """One field of a config: an option of the command line and a key of the YAML file."""

    key: str  # dotted
    kind: Any  # type with its annotations
    value: Any


@runtime_checkable
class Checked(Protocol):
    """A section whose values can be right one by one and wrong together."""

    def problems(self) -> list[str]:
        """One line for each contradiction, which begins with the key in this section."""


def sections(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A config dataclass and those in its fields, each after its prefix, ``""`` or ``data.``."""
    yield prefix, config
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            yield from sections(value, f"{prefix}{item.name}.")


def options(section: Any, prefix: str = "") -> Iterator[Option]:
    """The fields of one section that are not sections themselves."""
    kinds = get_type_hints(type(section), include_extras=True)
    for item in dataclasses.fields(section):
        value = getattr(section, item.name)
        if not dataclasses.is_dataclass(value):
            yield Option(prefix + item.name, kinds[item.name], value)


def all_options(config: Any) -> Iterator[Option]:
    """The fields of all sections."""
    return itertools.chain.from_iterable(options(part, at) for at, part in sections(config))


def out_of_range(option: Option) -> list[str]:
    """One line for each value of an option that is out of its range."""
    return [
        f"{option.key} must be {rule.words}, not {value}"
        for rule in get_args(option.kind)[1:]
        if isinstance(rule, Range)
        for value in (option.value if isinstance(option.value, tuple) else (option.value,))
        if not rule.holds(value)
    ]


def problems(config: Any) -> list[str]:
    """One line for each value out of its range, then for each contradiction, inner sections
    first; each begins with the dotted key."""
    found = [problem for option in all_options(config) for problem in out_of_range(option)]
    for prefix, section in reversed(list(sections(config))):
        if isinstance(section, Checked):
            found += [prefix + problem for problem in section.problems()]
    return found


def replaced(config: Any, values: Mapping[str, Any], prefix: str = "") -> Any:
    """The config with values of dotted keys in place of its own."""
    changes = {}
    for item in dataclasses.fields(config):
        key, value = prefix + item.name, getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            changes[item.name] = replaced(value, values, f"{key}.")
        elif key in values:
            changes[item.name] = values[key]
    return dataclasses.replace(config, **changes)


def texts(config: type) -> dict[str, str]:
    """The string literal below each field of a class and of its bases, read from the source."""
    found: dict[str, str] = {}
    for kind in reversed(config.__mro__[:-1]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        assert isinstance(definition, ast.ClassDef)
        for field, below in itertools.pairwise(definition.body):
            match field, below:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    found[name] = " ".join(text.split())
    return found
