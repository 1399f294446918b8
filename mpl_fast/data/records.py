"""The bytes of an MXNet record: an image header, an image, and the frame around them.

The frame is dmlc-core's (include/dmlc/recordio.h, src/recordio.cc), the header is MXNet's
(python/mxnet/recordio.py).
"""

import struct
from collections.abc import Iterable

from mpl_fast.errors import DataError

MAGIC = 0xCED7230A
LENGTH_LIMIT = 1 << 29  # bytes; the frame keeps a length in 29 bits
ID_LIMIT = MAGIC  # an id with the magic word in it would cut the 24-byte header apart

_FRAME = struct.Struct("<II")  # magic, part << 29 | length
_HEADER = struct.Struct("<IfQQ")  # 0 = one label, label, id, second id
IMAGE_LIMIT = LENGTH_LIMIT - 1 - _HEADER.size  # bytes of one image
_WHOLE, _FIRST, _MIDDLE, _LAST = range(4)


def image_record(label: float, record_id: int, image: bytes) -> bytes:
    """Return the framed record of one image; DataError when the id or the size is out of range."""
    if not 0 <= record_id < ID_LIMIT:
        raise DataError(f"record id {record_id} is outside 0..{ID_LIMIT - 1}")
    return frame(_HEADER.pack(0, label, record_id, 0) + image)


def frame(payload: bytes) -> bytes:
    """Return payload as one record, cut into parts where it holds the magic word at a 4-byte step.

    A reader finds a record by its magic word, so the word may not stand inside one: each is left
    out, becomes the border of two parts, and is put back by the reader.
    """
    size = len(payload)
    if size >= LENGTH_LIMIT:
        raise DataError(f"a record of {size} bytes is too long: the limit is {LENGTH_LIMIT - 1}")
    cuts = _magic_offsets(payload)
    if not cuts:
        return b"".join((_FRAME.pack(MAGIC, size), payload, bytes(-size % 4)))
    starts = [0, *(cut + 4 for cut in cuts)]
    flags = [_FIRST, *[_MIDDLE] * (len(cuts) - 1), _LAST]
    pieces: list[bytes] = []
    for flag, start, end in zip(flags, starts, [*cuts, size], strict=True):
        pieces += _FRAME.pack(MAGIC, flag << 29 | (end - start)), payload[start:end]
    return b"".join((*pieces, bytes(-size % 4)))


def is_multipart(record: bytes) -> bool:
    """Tell whether a framed record was cut into parts."""
    return record[7] >> 5 != _WHOLE


def index_text(first_id: int, offsets: Iterable[int]) -> str:
    """Return the .idx text: `id TAB byte offset` a line, ids counting up from first_id."""
    return "".join(f"{first_id + row}\t{offset}\n" for row, offset in enumerate(offsets))


def listing_text(first_id: int, rows: Iterable[tuple[int, str]]) -> str:
    """Return the .lst text: `id TAB label TAB class/name` a line, from (label, class/name) rows."""
    return "".join(f"{first_id + row}\t{label}\t{key}\n" for row, (label, key) in enumerate(rows))


def _magic_offsets(payload: bytes) -> list[int]:
    """Return the byte offsets, all multiples of 4, at which payload holds the magic word."""
    import numpy as np  # late: the command line's --help must not wait for it

    words = np.frombuffer(payload, "<u4", len(payload) // 4)
    return [4 * int(word) for word in np.flatnonzero(words == MAGIC)]
