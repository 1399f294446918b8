"""Which images are labeled: the same draw on every platform, from a seed or from a list of names.

Within a class, images are ranked by sha256("seed:class/name") and the first ones are taken: other
images that come or go change little, and a smaller draw of a seed is part of its larger draws.
"""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

from mpl_fast.errors import ConfigError, DataError
from mpl_fast.packing.first_few import first_few
from mpl_fast.packing.sources import ImageFile

# No exponent, and no more digits than can be reckoned with at once.
_AMOUNT = re.compile(r"[+-]?[0-9./]{1,100}%?")


def choose_labeled(images: Sequence[ImageFile], how: str, seed: int) -> set[str]:
    """Return the `class/name` keys of the labeled images.

    how is a share ("10%"), a number of images ("4000"), or a file of names. Shares and numbers are
    spread evenly over the classes, as in SimCLR's ImageNet subsets: by count, not by class size.
    """
    by_class: dict[str, list[str]] = defaultdict(list)
    for image in images:
        by_class[image.class_name].append(image.key)
    if how.endswith("%") or how.isdecimal():
        counts = _even_counts(list(by_class), how, _total(how, len(images)), seed)
        _require_enough(by_class, counts, how)
        return {key for name in by_class for key in ranked(by_class[name], seed)[: counts[name]]}
    path = _list_path(how)
    keys = _match(path, _listed_names(path), images)
    without = [name for name in by_class if not any(key in keys for key in by_class[name])]
    if without:
        raise DataError(
            f"{path}: {len(without)} classes have no labeled image: {first_few(without)}"
        )
    return keys


def _list_path(how: str) -> Path:
    path = Path(how)
    try:
        if path.is_file():
            return path
    except OSError as error:
        raise ConfigError(f"--labeled {how}: {error.strerror}") from error
    raise ConfigError(f"--labeled {how}: give a share (10%), a number (4000), or an existing file")


def ranked(keys: Iterable[str], seed: int | str) -> list[str]:
    """Return keys in the order of sha256("seed:key")."""
    return sorted(keys, key=lambda key: _digest(seed, key))


def shuffled(images: Iterable[ImageFile], seed: int) -> list[ImageFile]:
    """Return images in a seeded order that has nothing to do with the labeled draw of the seed."""
    return sorted(images, key=lambda image: _digest(f"order:{seed}", image.key))


def _digest(seed: int | str, key: str) -> bytes:
    return hashlib.sha256(f"{seed}:{key}".encode("utf-8", "surrogateescape")).digest()


def _total(how: str, images: int) -> int:
    """Return the number of labeled images that a share or a number asks for."""
    try:
        if not _AMOUNT.fullmatch(how):
            raise ValueError(how)
        total = round(Fraction(how[:-1]) * images / 100) if how.endswith("%") else int(how)
    except (ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"--labeled {how}: not a share such as 10%") from error
    if not 0 < total <= images:
        raise ConfigError(
            f"--labeled {how}: that is {total} labeled images, the source has {images}"
        )
    return total


def _even_counts(classes: list[str], how: str, total: int, seed: int) -> dict[str, int]:
    """Return how many labeled images each class gets; the seed says who gets one of the rest."""
    each, rest = divmod(total, len(classes))
    if each == 0:
        raise ConfigError(
            f"--labeled {how}: {total} labeled images for {len(classes)} classes leave "
            f"{len(classes) - rest} classes without any; ask for at least {len(classes)}"
        )
    with_one_more = set(ranked(classes, seed)[:rest])
    return {name: each + (name in with_one_more) for name in classes}


def _require_enough(
    by_class: Mapping[str, Sequence[str]], counts: Mapping[str, int], how: str
) -> None:
    short = [name for name in sorted(by_class) if len(by_class[name]) < counts[name]]
    if short:
        listed = [f"{name} ({len(by_class[name])} of {counts[name]})" for name in short]
        raise DataError(
            f"--labeled {how}: {len(short)} classes have fewer images than their even share: "
            f"{first_few(listed)}; ask for fewer, or name the images in a file"
        )


def _listed_names(path: Path) -> list[str]:
    """Return the names in a list: `class/name`, a base name, or an .lst row `id, label, path`."""
    try:
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    names = [line.rpartition("\t")[2].strip() for line in text.split("\n")]
    names = [name for name in names if name]
    if not names:
        raise DataError(f"{path}: no name in this list")
    return names


def _match(path: Path, names: Iterable[str], images: Iterable[ImageFile]) -> set[str]:
    """Return the keys of the named images; DataError lists the names that fit none or several."""
    keys = set()
    by_base = defaultdict(list)
    for image in images:
        keys.add(image.key)
        by_base[image.name].append(image.key)
    chosen: Counter[str] = Counter()
    unknown: list[str] = []
    ambiguous: list[str] = []
    for name in names:
        fits = _fitting(name, keys, by_base) or _fitting(name.split()[0], keys, by_base)
        if len(fits) == 1:
            chosen[fits[0]] += 1
        else:
            (ambiguous if fits else unknown).append(name)
    twice = [key for key, count in chosen.items() if count > 1]
    for problem, listed in (
        ("fit no image", unknown),
        ("fit images of several classes (write class/name)", ambiguous),
        ("stand there more than once", twice),
    ):
        if listed:
            raise DataError(f"{path}: {len(listed)} names {problem}: {first_few(listed)}")
    return set(chosen)


def _fitting(name: str, keys: set[str], by_base: Mapping[str, list[str]]) -> list[str]:
    parts = name.split("/")
    if len(parts) == 1:
        return by_base.get(name, [])
    key = "/".join(parts[-2:])
    return [key] if key in keys else []
