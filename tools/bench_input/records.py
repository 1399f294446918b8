"""The images of a split for readers that are not DALI: by number, out of the same files."""

import bisect
import os
from itertools import accumulate

from mpl_fast.data.manifest import Split
from mpl_fast.data.records import parse_payload, unframe


class Records:
    """The encoded images of one split and their labels."""

    def __init__(self, split: Split) -> None:
        sizes = [path.stat().st_size for path in split.shards]
        self._starts = [0, *accumulate(sizes)][:-1]
        self._shards = split.shards
        lines = split.index.read_text().splitlines()
        self._offsets = [int(line.split()[1]) for line in lines]
        self._files: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, number: int) -> tuple[bytes, int]:
        offset = self._offsets[number]
        shard = bisect.bisect_right(self._starts, offset) - 1
        if shard not in self._files:
            self._files[shard] = os.open(self._shards[shard], os.O_RDONLY)
        payload = parse_payload(unframe(_framed(self._files[shard], offset - self._starts[shard])))
        return payload.image, int(payload.labels[0])


def _framed(file: int, offset: int) -> bytes:
    """One record, of one part or several: the upper 3 bits of its second word tell which part."""
    parts = []
    while True:
        word = int.from_bytes(os.pread(file, 8, offset)[4:], "little")
        size = 8 + (word & (1 << 29) - 1)
        size += -size % 4
        parts.append(os.pread(file, size, offset))
        if word >> 29 in (0, 3):
            return b"".join(parts)
        offset += size
