"""The checksum of a file from those of its parts."""

import zlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mpl_fast.packing.checksum import joined_crc32


@given(st.lists(st.one_of(st.binary(max_size=40), st.integers(0, 5000).map(bytes)), max_size=8))
def test_crc32_of_joined_parts(parts: list[bytes]) -> None:
    crcs = np.array([zlib.crc32(part) for part in parts], np.uint32)
    lengths = np.array([len(part) for part in parts], np.int64)
    assert joined_crc32(crcs, lengths) == zlib.crc32(b"".join(parts))
