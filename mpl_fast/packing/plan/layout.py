"""Groups of .rec files and splits of the two layouts, shared and separate."""

from typing import NamedTuple

from mpl_fast.packing.plan.table import RecordRow

TRAIN, VAL, POOL = range(3)  # found.images.part; POOL: training images without a label


class PlannedSplit(NamedTuple):
    """A split of the finished pack: the records of a prefix that its .idx and .lst list."""

    name: str
    stem: str  # of its .idx and .lst
    prefix: str
    labeled: int | None  # only records with this value in RecordRow.labeled; None: all

    def lists(self, record: RecordRow) -> bool:
        """Return whether a record of the prefix is in the split."""
        return self.labeled is None or record.labeled == self.labeled


def shard_groups(layout: str, unlabeled: str, *, val: bool) -> dict[str, str]:
    """Return the prefixes of .rec files of a pack, in the order of their record ids.

    Files of one prefix are read as one joined file. The values are SQL conditions that select
    their images from found.images.
    """
    train, rest = f"part != {VAL}", " AND NOT labeled" if unlabeled == "rest" else ""
    groups = {"train_label": f"{train} AND labeled", "train_unlabel": f"{train}{rest}"}
    if layout == "shared":
        groups = {"train": train}
    return groups | ({"val": f"part = {VAL}"} if val else {})


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
