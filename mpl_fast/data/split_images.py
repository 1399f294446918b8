"""The images of a split by their place in it: name, label and encoded bytes."""

import os
from bisect import bisect_right
from itertools import accumulate
from struct import Struct

from mpl_fast.data.manifest import Split
from mpl_fast.data.records import LENGTH_LIMIT, parse_payload, unframe
from mpl_fast.errors import DataError

_FRAME = Struct("<II")  # magic, part << 29 | length
_LAST_PARTS = (0, 3)  # of a record that is whole, and of one that was cut


class SplitImages:
    """Random access to a split, in the order in which `EvalLoader` of one rank yields it.

    `ids`, `labels` (-1: none) and `names`, as the split's .lst has them, and `offsets` of records
    over the joined .rec files are lists by place.
    Raises `DataError` for files that cannot be read.
    """

    def __init__(self, split: Split) -> None:
        self._split = split
        try:
            listing = split.listing.read_text("utf-8", "surrogateescape").split("\n")[:-1]
            index = split.index.read_text("utf-8", "surrogateescape").split("\n")[:-1]
            self._starts = [0, *accumulate(shard.stat().st_size for shard in split.shards)]
        except OSError as error:
            raise DataError(f"{error.filename}: {error.strerror}") from error
        try:
            rows = [line.split("\t", 2) for line in listing]
            offsets = dict(line.split("\t") for line in index)  # lines may be repeated
            self.ids, self.labels = ([int(row[column]) for row in rows] for column in (0, 1))
            self.names = [row[2] for row in rows]
            self.offsets = [int(offsets.pop(row[0])) for row in rows]
        except (ValueError, IndexError, KeyError):
            offsets = {"": ""}
        if offsets:
            raise DataError(f"{split.listing}: does not list the records of {split.index}")

    def __len__(self) -> int:
        return len(self.names)

    def image(self, place: int) -> bytes:
        """The encoded image, such as the content of a JPEG file."""
        shard = bisect_right(self._starts, self.offsets[place]) - 1
        path, offset = self._split.shards[shard], self.offsets[place] - self._starts[shard]
        framed, last = bytearray(), False
        try:
            with path.open("rb") as file:
                while not last:
                    head = os.pread(file.fileno(), _FRAME.size, offset + len(framed))
                    if len(head) < _FRAME.size:
                        raise DataError(f"{path}: ends in the record at {offset}: pack again")
                    word = _FRAME.unpack(head)[1]
                    length, last = word & (LENGTH_LIMIT - 1), word >> 29 in _LAST_PARTS
                    size = _FRAME.size + length + -length % 4
                    framed += os.pread(file.fileno(), size, offset + len(framed))
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from error
        return parse_payload(unframe(bytes(framed))).image
