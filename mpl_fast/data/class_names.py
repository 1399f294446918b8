"""Class names of a network beside those of a pack: a label means its name, not its number."""

from collections.abc import Sequence
from itertools import zip_longest

from mpl_fast.first_few import first_few


def positions(names: Sequence[str], among: Sequence[str]) -> list[int]:
    """Return the label that each name has among others, or -1."""
    labels = {name: label for label, name in enumerate(among)}
    return [labels.get(name, -1) for name in names]


def lacking(names: Sequence[str], among: Sequence[str]) -> list[str]:
    """Return the names that are not among the others."""
    have = set(among)
    return [name for name in names if name not in have]


def first_difference(trained: Sequence[str], packed: Sequence[str]) -> str:
    """Return a phrase for the lowest label that two unequal lists name differently."""
    pairs = enumerate(zip_longest(trained, packed))
    label, (was, now) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
    was, now = ("no class" if name is None else repr(name) for name in (was, now))
    return f"label {label} is {was} there and {now} here"


def unshared(trained: Sequence[str], packed: Sequence[str]) -> str:
    """Return a phrase for the names that one of two lists lacks."""
    sides = {"trained": lacking(trained, packed), "here": lacking(packed, trained)}
    return "; ".join(
        f"only {side}: {first_few(names, 3)}" for side, names in sides.items() if names
    )
