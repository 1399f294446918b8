"""What a pack will hold, decided before an image is read: splits, order, ids, shards."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from mpl_fast.data.records import ID_LIMIT
from mpl_fast.errors import DataError
from mpl_fast.packing.first_few import first_few
from mpl_fast.packing.sources import ImageFile, Source
from mpl_fast.packing.split import choose_labeled, shuffled

PREFIXES = {"labeled": "train_label", "unlabeled": "train_unlabel", "val": "val"}


@dataclass(frozen=True)
class ShardPlan:
    """One .rec file: its records in order; record i has id first_id + i."""

    file: str
    images: Sequence[ImageFile]
    labels: Sequence[int]
    first_id: int
    check: str  # how its images are checked: decode, header or none


@dataclass(frozen=True)
class SplitPlan:
    """The shards of one split, in the order in which a reader joins them."""

    name: str
    shards: tuple[ShardPlan, ...]

    @property
    def prefix(self) -> str:
        """Return the stem of the split's file names."""
        return PREFIXES[self.name]

    @property
    def first_id(self) -> int:
        """Return the id of the split's first record."""
        return self.shards[0].first_id

    @property
    def rows(self) -> list[tuple[int, str]]:
        """Return (label, class/name) of every record."""
        return [
            (label, image.key)
            for shard in self.shards
            for label, image in zip(shard.labels, shard.images, strict=True)
        ]


@dataclass(frozen=True)
class Plan:
    """A whole pack: class names (index = label) and splits."""

    classes: tuple[str, ...]
    splits: tuple[SplitPlan, ...]

    @property
    def shards(self) -> list[ShardPlan]:
        """Return every shard of every split."""
        return [shard for split in self.splits for shard in split.shards]

    def digest(self) -> str:
        """Return a sha256 over everything that decides the bytes of the pack, paths left out."""
        digest = hashlib.sha256("\n".join(self.classes).encode("utf-8", "surrogateescape"))
        for shard in self.shards:
            digest.update(f"\n\n{shard.file} {shard.first_id} {shard.check}".encode())
            for image, label in zip(shard.images, shard.labels, strict=True):
                row = f"\n{label}\t{image.key}\t{image.size}"
                digest.update(row.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Division:
    """How the images become splits and shards; the defaults are the command line's."""

    labeled: str = "10%"
    unlabeled: str = "all"  # as the official MPL code: the labeled images are in it too; or "rest"
    split_seed: int = 0
    shuffle_seed: int = 0
    shards: int = 1
    check: str = "decode"


def make_plan(train: Source, val: Source | None, how: Division) -> Plan:
    """Return the plan for a training source and perhaps a validation source.

    Every split is in seeded shuffled order, validation too: its first part is a fair sample of it.
    """
    classes = tuple(sorted({image.class_name for image in train.images}))
    if val is not None:
        _require_known(val, classes)
    keys = choose_labeled(train.images, how.labeled, how.split_seed)
    contents = {"labeled": [image for image in train.images if image.key in keys]}
    if how.unlabeled == "all":
        contents["unlabeled"] = train.images
    else:
        contents["unlabeled"] = [image for image in train.images if image.key not in keys]
    if not contents["unlabeled"]:
        raise DataError("--unlabeled rest: no image is left, all are labeled; use --unlabeled all")
    if val is not None:
        contents["val"] = val.images
    total = sum(map(len, contents.values()))
    if total > ID_LIMIT:
        raise DataError(f"{total} records are more than the format's {ID_LIMIT} ids")
    return Plan(classes, _make_splits(contents, classes, how))


def _make_splits(
    contents: Mapping[str, Sequence[ImageFile]], classes: Sequence[str], how: Division
) -> tuple[SplitPlan, ...]:
    index = {name: label for label, name in enumerate(classes)}
    splits = []
    first_id = 0
    for name, images in contents.items():
        # With `all` the labeled images are checked in the unlabeled split: once is enough.
        seen_elsewhere = name == "labeled" and how.unlabeled == "all"
        check = "none" if seen_elsewhere else how.check
        order = shuffled(images, how.shuffle_seed)
        shards = min(how.shards, len(order))
        cuts = [len(order) * part // shards for part in range(shards + 1)]
        splits.append(
            SplitPlan(
                name,
                tuple(
                    ShardPlan(
                        _shard_file(PREFIXES[name], number, shards, how.shards),
                        order[start:end],
                        [index[image.class_name] for image in order[start:end]],
                        first_id + start,
                        check,
                    )
                    for number, (start, end) in enumerate(pairwise(cuts))
                ),
            )
        )
        first_id += len(order)
    return tuple(splits)


def _shard_file(prefix: str, number: int, shards: int, asked: int) -> str:
    return f"{prefix}.rec" if asked == 1 else f"{prefix}-{number:05d}-of-{shards:05d}.rec"


def _require_known(val: Source, classes: Sequence[str]) -> None:
    counts = Counter(image.class_name for image in val.images)
    unknown = sorted(counts.keys() - set(classes))
    if unknown:
        raise DataError(
            f"{val.place.spec}: {len(unknown)} classes are not in the training source: "
            f"{first_few(unknown)}"
        )
