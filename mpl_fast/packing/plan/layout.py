"""Groups of .rec files and splits of the two layouts, shared and separate."""

from typing import NamedTuple

from mpl_fast.packing.plan.table import RecordRow

TRAIN, VAL = 0, 1  # found.images.part


class ShardGroup(NamedTuple):
    """The images whose .rec files have one prefix and are read as one joined file."""

    prefix: str
    where: str  # SQL condition that selects them from found.images


class PlannedSplit(NamedTuple):
    """A split of the finished pack: the records of a prefix that its .idx and .lst list."""

    name: str
    stem: str  # of its .idx and .lst
    prefix: str
    labeled: int | None  # only records with this value in RecordRow.labeled; None: all

    def lists(self, record: RecordRow) -> bool:
        """Return whether a record of the prefix is in the split."""
        return self.labeled is None or record.labeled == self.labeled


def shard_groups(layout: str, unlabeled: str, *, val: bool) -> list[ShardGroup]:
    """Return the groups of .rec files of a pack, in the order of their record ids."""
    if layout == "shared":
        written = [ShardGroup("train", f"part = {TRAIN}")]
    else:
        rest = " AND NOT labeled" if unlabeled == "rest" else ""
        written = [
            ShardGroup("train_label", f"part = {TRAIN} AND labeled"),
            ShardGroup("train_unlabel", f"part = {TRAIN}{rest}"),
        ]
    return [*written, ShardGroup("val", f"part = {VAL}")] if val else written


def planned_splits(layout: str, unlabeled: str, *, val: bool) -> list[PlannedSplit]:
    """Return the splits of a finished pack."""
    if layout == "shared":
        listed = [
            PlannedSplit("train", "train", "train", None),
            PlannedSplit("labeled", "train_label", "train", 1),
            PlannedSplit("unlabeled", "train_unlabel", "train", 0 if unlabeled == "rest" else None),
        ]
    else:
        listed = [
            PlannedSplit("labeled", "train_label", "train_label", None),
            PlannedSplit("unlabeled", "train_unlabel", "train_unlabel", None),
        ]
    return [*listed, PlannedSplit("val", "val", "val", None)] if val else listed
