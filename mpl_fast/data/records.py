"""MXNet records: an image header, an image, and the frame around them.

The frame is dmlc-core's (include/dmlc/recordio.h, src/recordio.cc), the header is MXNet's
(python/mxnet/recordio.py).
"""

import struct
from typing import TYPE_CHECKING, NamedTuple

from mpl_fast.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAGIC = 0xCED7230A
NO_LABEL = -1  # stored as the one label (flag 0) of an image without a label
LABEL_LIMIT = 1 << 24  # a label is a float32, which holds every whole number below this
LENGTH_LIMIT = 1 << 29  # bytes; the frame keeps a length in 29 bits
ID_LIMIT = MAGIC  # a larger id could hold the magic word, at which the header would be cut

_FRAME = struct.Struct("<II")  # magic, part << 29 | length
_HEADER = struct.Struct("<IfQQ")  # 0 = one label, label, id, second id
_HEAD = struct.Struct("<IIIfQQ")  # both
HEAD_SIZE = _HEAD.size  # bytes before the image in a record of one part
IMAGE_LIMIT = LENGTH_LIMIT - 1 - _HEADER.size  # bytes of one image
_WHOLE, _FIRST, _MIDDLE, _LAST = range(4)


class Payload(NamedTuple):
    """The content of a record."""

    labels: tuple[float, ...]  # float32 values; several if the record has an array of them
    id: int
    image: bytes


def image_record(label: float, record_id: int, image: bytes) -> bytes:
    """Return the framed record of one image; DataError when the id or the size is out of range."""
    _check_id(record_id)
    return frame(_HEADER.pack(0, label, record_id, 0) + image)


def record_head(label: float, record_id: int, size: int) -> bytes:
    """Return the 32 bytes before an image of `size` bytes that does not hold the magic word.

    The image and zeros up to a multiple of 4 bytes complete the record: see `image_record`.
    """
    _check_id(record_id)
    if size > IMAGE_LIMIT:
        raise DataError(f"an image of {size} bytes is too long: the limit is {IMAGE_LIMIT}")
    return _HEAD.pack(MAGIC, _HEADER.size + size, 0, label, record_id, 0)


def frame(payload: bytes) -> bytes:
    """Return payload as one record, cut into parts where it holds the magic word at a 4-byte step.

    Readers find records by the magic word, so it must not occur in one: it is left out at the
    border of two parts, and readers insert it again.
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


def unframe(framed: bytes) -> bytes:
    """Return the payload of one framed record: the inverse of `frame`.

    DataError when `framed` is not exactly one whole record.
    """
    pieces: list[bytes] = []
    at = 0
    expected = {_WHOLE, _FIRST}
    while expected:
        if len(framed) < at + _FRAME.size:
            raise DataError(f"not a whole record: {len(framed)} bytes end before its last part")
        magic, word = _FRAME.unpack_from(framed, at)
        flag, size = word >> 29, word & (LENGTH_LIMIT - 1)
        if magic != MAGIC or flag not in expected:
            raise DataError(f"not a record: {framed[at : at + _FRAME.size].hex(' ', 4)} begins it")
        start = at + _FRAME.size
        pieces.append(framed[start : start + size])
        at = start + size
        expected = set() if flag in (_WHOLE, _LAST) else {_MIDDLE, _LAST}
    if at + -at % 4 != len(framed):
        raise DataError(f"not one record: it has {len(framed)} bytes, its parts {at + -at % 4}")
    return _FRAME.pack(MAGIC, 0)[:4].join(pieces)


def parse_payload(payload: bytes) -> Payload:
    """Return the labels, the id and the image that a payload holds; DataError when it is short."""
    if len(payload) < _HEADER.size:
        raise DataError(f"no image record: {len(payload)} bytes, its header has {_HEADER.size}")
    count, label, record_id, _ = _HEADER.unpack_from(payload)
    start = _HEADER.size + 4 * count
    if len(payload) < start:
        raise DataError(f"no image record: {len(payload)} bytes cannot hold {count} labels")
    labels = struct.unpack_from(f"<{count}f", payload, _HEADER.size) if count else (label,)
    return Payload(labels, record_id, payload[start:])


def is_multipart(record: bytes) -> bool:
    """Whether a framed record was cut into parts."""
    return record[7] >> 5 != _WHOLE


def holds_magic(image: "bytes | memoryview") -> bool:
    """Whether an image holds the magic word at a 4-byte step, where `frame` would cut it."""
    return bool((_words(image) == MAGIC).any())


def _check_id(record_id: int) -> None:
    if not 0 <= record_id < ID_LIMIT:
        raise DataError(f"record id {record_id} is outside 0..{ID_LIMIT - 1}")


def _magic_offsets(payload: bytes) -> list[int]:
    """Return the byte offsets, all multiples of 4, at which payload holds the magic word."""
    return [4 * int(word) for word in (_words(payload) == MAGIC).nonzero()[0]]


def _words(content: "bytes | memoryview") -> "NDArray[np.uint32]":
    import numpy as np  # late: --help must be fast

    return np.frombuffer(content, "<u4", len(content) // 4)
