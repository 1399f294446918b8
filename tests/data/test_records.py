"""Records are byte for byte those of MXNet and of a second implementation; DALI reads them.

tests/golden holds what MXNet 1.9.1 (with Python 3.11, numpy 1.23.5 and opencv-python-headless
below 4.9) wrote for RECORDS, by

    records = mxnet.recordio.MXIndexedRecordIO("records.idx", "records.rec", "w")
    for label, record_id, image in RECORDS:
        header = mxnet.recordio.IRHeader(0, label, record_id, 0)
        records.write_idx(record_id, mxnet.recordio.pack(header, image))
    records.close()
"""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from nvidia.dali import fn, pipeline_def

from mpl_fast.data.records import (
    HEAD_SIZE,
    ID_LIMIT,
    IMAGE_LIMIT,
    LENGTH_LIMIT,
    NO_LABEL,
    Payload,
    frame,
    holds_magic,
    image_record,
    is_multipart,
    parse_payload,
    record_head,
    unframe,
)
from mpl_fast.errors import DataError

MAGIC = bytes.fromhex("0a23d7ce")
GOLDEN = Path(__file__).parents[1] / "golden"
# What the golden file holds: (label, id, image), its id the key in the index too.
RECORDS: list[tuple[int | list[float], int, bytes]] = [
    *[(size, size, bytes(range(65, 65 + size))) for size in range(10)],
    (999, 10, MAGIC),
    (1, 11, b"abcd" + MAGIC),
    (1, 12, MAGIC + b"ab"),
    (1, 13, b"abcd" + MAGIC * 2 + b"efghi"),
    (1, 14, b"abc" + MAGIC + b"d"),
    (1, 15, MAGIC[:3]),
    (2**24 - 1, ID_LIMIT - 1, b"last id"),
    ([0.5, 2.0], 16, b"two labels"),
    ([1.0, 2.0, 3.0], 17, b"ab" * 3 + MAGIC + b"cd" + MAGIC),
]


def write_simply(payload: bytes) -> bytes:
    """Frame a payload word by word: slow, and written without a look at the real one."""
    parts = [b""]
    whole = len(payload) // 4 * 4
    for at in range(0, whole, 4):
        word = payload[at : at + 4]
        if word == MAGIC:
            parts.append(b"")
        else:
            parts[-1] += word
    parts[-1] += payload[whole:]
    out = b""
    for number, part in enumerate(parts):
        flag = 0 if len(parts) == 1 else 1 if number == 0 else 3 if number == len(parts) - 1 else 2
        out += MAGIC + (flag * 2**29 + len(part)).to_bytes(4, "little") + part
    while len(out) % 4:
        out += b"\0"
    return out


def read_simply(content: bytes) -> list[bytes]:
    """Return the payloads of a .rec file, parts joined by the magic word."""
    payloads = []
    at = 0
    while at < len(content):
        assert content[at : at + 4] == MAGIC
        word = int.from_bytes(content[at + 4 : at + 8], "little")
        flag, size = word >> 29, word & (2**29 - 1)
        part = content[at + 8 : at + 8 + size]
        assert len(part) == size
        if flag in (0, 1):
            payloads.append(part)
        else:
            payloads[-1] += MAGIC + part
        at += 8 + (size + 3) // 4 * 4
    return payloads


def golden_offsets() -> list[int]:
    lines = (GOLDEN / "records.idx").read_text().splitlines()
    index = [tuple(map(int, line.split("\t"))) for line in lines]
    assert [record_id for record_id, _ in index] == [row[1] for row in RECORDS]
    return [offset for _, offset in index]


def test_golden_file() -> None:
    content = (GOLDEN / "records.rec").read_bytes()
    starts = golden_offsets()
    ends = [*starts[1:], len(content)]
    for (label, record_id, image), start, end in zip(RECORDS, starts, ends, strict=True):
        labels = tuple(label) if isinstance(label, list) else (float(label),)
        framed = content[start:end]
        assert parse_payload(unframe(framed)) == Payload(labels, record_id, image)
        assert frame(unframe(framed)) == framed
        if isinstance(label, int):
            assert image_record(label, record_id, image) == framed


def test_no_label_is_minus_one() -> None:
    """The bytes that MXNet 1.9.1 writes for IRHeader(0, -1.0, 7, 0); its readers return -1."""
    framed = bytes.fromhex("0a23d7ce1d000000 00000000000080bf 0700000000000000 0000000000000000")
    framed += b"image\0\0\0"
    assert image_record(NO_LABEL, 7, b"image") == framed
    assert record_head(NO_LABEL, 7, 5) == framed[:32]
    assert parse_payload(unframe(framed)) == Payload((-1.0,), 7, b"image")


pieces = st.one_of(st.just(MAGIC), st.binary(max_size=9), st.just(b"\0\0\0\0"))
payloads = st.lists(pieces, max_size=12).map(b"".join)


@settings(max_examples=300, deadline=None)
@given(st.lists(payloads, max_size=4))
@example([b"", MAGIC, b"abcd" + MAGIC])  # nothing, two empty parts, the last whole word
@example([b"abc" + MAGIC + b"d", b"abcd" + MAGIC[:3]])  # not on a 4-byte step, cut off at the end
def test_frames_equal_a_second_implementation(contents: list[bytes]) -> None:
    frames = [frame(content) for content in contents]
    assert frames == [write_simply(content) for content in contents]
    assert read_simply(b"".join(frames)) == contents
    assert [unframe(framed) for framed in frames] == contents
    for content, framed in zip(contents, frames, strict=True):
        words = [content[at : at + 4] for at in range(0, len(content), 4)]
        assert holds_magic(content) == is_multipart(framed) == (MAGIC in words)


@settings(max_examples=100, deadline=None)
@given(payloads, st.integers(0, 2**24 - 1), st.integers(0, ID_LIMIT - 1))
def test_headers_and_heads_of_records(image: bytes, label: int, record_id: int) -> None:
    record = image_record(label, record_id, image)
    (payload,) = read_simply(record)
    assert struct.unpack("<IfQQ", payload[:24]) == (0, float(label), record_id, 0)
    assert payload[24:] == image
    assert parse_payload(payload) == Payload((float(label),), record_id, image)
    head = record_head(label, record_id, len(image))
    assert len(head) == HEAD_SIZE
    built = head + image + bytes(-len(image) % 4)  # a record of one part
    assert (built == record) == (not holds_magic(image)) == (not is_multipart(record))


def test_magic_is_found_in_a_view_of_any_place() -> None:
    content = memoryview(b"x" * 7 + MAGIC + b"y" * 5)
    assert holds_magic(content[3:])
    assert holds_magic(content[7:11])
    assert not holds_magic(content)
    assert not holds_magic(content[3:10])
    assert not holds_magic(b"")


@pytest.mark.parametrize(
    ("framed", "message"),
    [
        (b"", "0 bytes end before its last part"),
        (frame(b"abcdefgh")[:7], "7 bytes end before its last part"),
        (frame(b"abcdefgh")[:-4], "it has 12 bytes, its parts 16"),
        (frame(b"abcd") + bytes(4), "it has 16 bytes, its parts 12"),
        (frame(b"abcd") * 2, "it has 24 bytes, its parts 12"),
        (bytes(12), "not a record: 00000000 00000000 begins it"),
        (frame(b"abcd" + MAGIC)[:12], "12 bytes end before its last part"),
        (frame(b"abcd" + MAGIC)[12:], "not a record: 0a23d7ce 00000060 begins it"),
        (frame(MAGIC)[:8] + frame(b"ab"), "not a record: 0a23d7ce 02000000 begins it"),
    ],
)
def test_what_is_not_one_record(framed: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        unframe(framed)


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (bytes(23), "23 bytes, its header has 24"),
        (struct.pack("<IfQQ", 2, 0, 0, 0) + bytes(7), "31 bytes cannot hold 2 labels"),
    ],
)
def test_what_is_no_image_record(payload: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_payload(payload)


def test_ids_that_would_cut_the_header_are_refused() -> None:
    assert read_simply(image_record(0, ID_LIMIT - 1, b"x"))[0][24:] == b"x"
    with pytest.raises(DataError, match="record id 3470205706"):
        image_record(0, ID_LIMIT, b"x")
    with pytest.raises(DataError, match="record id -1"):
        image_record(0, -1, b"x")
    with pytest.raises(DataError, match="record id 3470205706"):
        record_head(0, ID_LIMIT, 1)


def test_longest_record() -> None:
    class Long(bytes):
        def __len__(self) -> int:
            return LENGTH_LIMIT

    with pytest.raises(DataError, match="536870912 bytes is too long: the limit is 536870911"):
        frame(Long())
    assert record_head(0, 0, IMAGE_LIMIT)[4:8] == (2**29 - 1).to_bytes(4, "little")
    with pytest.raises(DataError, match="536870888 bytes is too long: the limit is 536870887"):
        record_head(0, 0, IMAGE_LIMIT + 1)


@pytest.mark.parametrize("files", [1, 3])
def test_dali_reads_every_golden_record(tmp_path: Path, files: int) -> None:
    content, offsets = (GOLDEN / "records.rec").read_bytes(), golden_offsets()
    ends = [*offsets[1:], len(content)]
    paths = [tmp_path / f"{number}.rec" for number in range(files)]
    for path, rows in zip(paths, np.array_split(range(len(offsets)), files), strict=True):
        path.write_bytes(content[offsets[rows[0]] : ends[rows[-1]]])

    def reader() -> tuple[Any, Any]:
        index = [str(GOLDEN / "records.idx")]
        images, labels = fn.readers.mxnet(path=[str(path) for path in paths], index_path=index)
        return images, labels

    pipeline = pipeline_def(reader)(batch_size=len(offsets), num_threads=1, device_id=None)
    images, labels = pipeline.run()
    for row, (label, _, image) in enumerate(RECORDS):
        assert np.asarray(images.at(row)).tobytes() == image
        label = label if isinstance(label, list) else [label]
        assert np.asarray(labels.at(row)).tolist() == label
