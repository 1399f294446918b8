"""Names of classes and files as text that can be shown."""

import re
from collections.abc import Sequence

_SYNSET = re.compile(r"n\d{8} \((.+)\)")


def shown(name: str, most: int = 0) -> str:
    """The name with escapes in place of control characters and bytes that are not UTF-8.

    With `most`, at most so many characters: of ``n01440764 (tench)`` the title, and of a longer
    name the first and the last, around an ellipsis.
    """
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    if most and len(text) > most and (synset := _SYNSET.fullmatch(text)):
        text = synset[1]
    if most and len(text) > most:
        half = (most - 1) // 2
        text = f"{text[: most - 1 - half]}…{text[len(text) - half :]}"
    return text


def all_shown(names: Sequence[str], most: int = 0) -> list[str]:
    """`shown` of each."""
    return [shown(name, most) for name in names]
