"""Checksums of .rec files: CRC-32, which a file gets from those of its parts."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

from mpl_fast.atomic import sha256_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_POLYNOMIAL = 0xEDB88320  # of CRC-32, its bits reversed
_BLOCK = 4 << 20  # bytes


def checksum_of(entry: Mapping[str, Any]) -> tuple[str, str]:
    """Return which checksum a manifest's entry of a .rec file has, and its value.

    It was sha256 in packs of earlier versions.
    """
    kind = "sha256" if "sha256" in entry else "crc32"
    return kind, str(entry[kind])


def file_checksum(
    path: Path, kind: str, progress: Callable[[int], None] = lambda size: None
) -> str:
    """Return the "crc32" or "sha256" of a file; `progress` gets the bytes of each block read."""
    if kind == "sha256":
        return sha256_of(path, progress)
    crc = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            crc = crc32(block, crc)
            progress(len(block))
    return f"{crc:08x}"


def joined_crc32(crcs: "NDArray[np.uint32]", lengths: "NDArray[np.int64]") -> int:
    """Return the CRC-32 of joined parts from those of the parts, as zlib's crc32_combine.

    A CRC-32 is linear: zeros behind a part change its bits by a matrix, a power of that of one
    zero; and the whole is the exclusive or of its parts, each with zeros in place of the others.
    """
    import numpy as np

    behind = lengths.sum() - np.cumsum(lengths)
    shifted = crcs.copy()
    matrix = np.uint32(1) << np.arange(32, dtype=np.uint32)  # what each bit becomes
    for _ in range(8):  # by a zero byte
        matrix = (matrix >> np.uint32(1)) ^ (matrix & np.uint32(1)) * np.uint32(_POLYNOMIAL)
    while behind.any():
        odd = (behind & 1).astype(bool)
        shifted[odd] = _changed(matrix, shifted[odd])
        matrix = _changed(matrix, matrix)
        behind >>= 1
    return int(np.bitwise_xor.reduce(shifted, initial=0))


def _changed(matrix: "NDArray[np.uint32]", crcs: "NDArray[np.uint32]") -> "NDArray[np.uint32]":
    """Return the product of a matrix, by its columns, and vectors of 32 bits."""
    import numpy as np

    result = np.zeros_like(crcs)
    for bit in range(32):
        result ^= matrix[bit] * (crcs >> np.uint32(bit) & np.uint32(1))
    return result
