"""Values of options: from text, as command lines and YAML files have it, and their description."""

import math
from typing import Annotated, Any, Literal, get_args, get_origin

from mpl_fast.config.fields import OneOf, Range

BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def convert(given: str | list[str], kind: Any) -> Any:
    """A text, or the texts of a YAML list, as a value of type `kind`.

    Raises `ValueError` or `KeyError` if it is none.
    """
    arguments = get_args(kind)
    if get_origin(kind) is Annotated:
        value = convert(given, arguments[0])
        if not all(value in rule.table for rule in arguments[1:] if isinstance(rule, OneOf)):
            raise ValueError
        return value
    if get_origin(kind) is tuple:
        texts = _items(given) if isinstance(given, str) else given
        kinds = [arguments[0]] * len(texts) if arguments[-1] is Ellipsis else arguments
        return tuple(convert(text, item) for text, item in zip(texts, kinds, strict=True))
    if isinstance(given, list) or (get_origin(kind) is Literal and given not in arguments):
        raise ValueError
    if kind is bool:
        return BOOLEANS[given.lower()]
    value = given if get_origin(kind) is Literal else kind(given)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError
    return value


def wanted(kind: Any) -> str:
    """Words for the values of a type, after "must be"."""
    if names := choices(kind):
        return ", ".join(names[:-1]) + f" or {names[-1]}"
    plain = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    return "a list such as [1,2,3]" if get_origin(plain) is tuple else NAMES[plain]


def choices(kind: Any) -> tuple[str, ...]:
    """The names that a type allows, if it is a choice among names."""
    if get_origin(kind) is Annotated:
        return next((tuple(r.table) for r in get_args(kind)[1:] if isinstance(r, OneOf)), ())
    return get_args(kind) if get_origin(kind) is Literal else ()


def metavar(kind: Any) -> str:
    """Placeholder of the value in --help."""
    plain = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    if names := choices(kind) or (("true", "false") if plain is bool else ()):
        return "{" + ",".join(names) + "}"
    if get_origin(plain) is tuple:
        return f"[{metavar(get_args(plain)[0])},...]"
    return "TEXT" if plain is str else str(plain.__name__).upper()


def ranges(kind: Any) -> list[str]:
    """Words for the ranges that numbers of a type must be in."""
    rules = get_args(kind)[1:] if get_origin(kind) is Annotated else ()
    return [rule.words for rule in rules if isinstance(rule, Range)]


def _items(text: str) -> list[str]:
    inner = text.strip().removeprefix("[").removesuffix("]")
    return [item.strip() for item in inner.split(",")] if inner.strip() else []
