"""Records have MXNet's bytes: by hand, by a second implementation, and by DALI's own reader."""

import itertools
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpl_fast.data.records import (
    HEAD_SIZE,
    ID_LIMIT,
    IMAGE_LIMIT,
    LENGTH_LIMIT,
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

MAGIC_BYTES = bytes.fromhex("0a23d7ce")


def write_simply(payload: bytes) -> bytes:
    """Frame a payload word by word: slow, and written without a look at the real one."""
    parts = [b""]
    whole = len(payload) // 4 * 4
    for at in range(0, whole, 4):
        word = payload[at : at + 4]
        if word == MAGIC_BYTES:
            parts.append(b"")
        else:
            parts[-1] += word
    parts[-1] += payload[whole:]
    out = b""
    for number, part in enumerate(parts):
        flag = 0 if len(parts) == 1 else 1 if number == 0 else 3 if number == len(parts) - 1 else 2
        out += MAGIC_BYTES + (flag * 2**29 + len(part)).to_bytes(4, "little") + part
    while len(out) % 4:
        out += b"\0"
    return out


def read_simply(content: bytes) -> list[bytes]:
    """Return the payloads of a .rec file, parts joined by the magic word."""
    payloads = []
    at = 0
    while at < len(content):
        assert content[at : at + 4] == MAGIC_BYTES
        word = int.from_bytes(content[at + 4 : at + 8], "little")
        flag, size = word >> 29, word & (2**29 - 1)
        part = content[at + 8 : at + 8 + size]
        assert len(part) == size
        if flag in (0, 1):
            payloads.append(part)
        else:
            payloads[-1] += MAGIC_BYTES + part
        at += 8 + (size + 3) // 4 * 4
    return payloads


def test_golden_whole_record() -> None:
    # Label 3.0, id 7, a 5-byte image, padded to 8.
    assert image_record(3, 7, b"hello").hex(" ", 4) == (
        "0a23d7ce 1d000000 00000000 00004040 07000000 00000000 00000000 00000000 68656c6c 6f000000"
    )
    assert not is_multipart(image_record(3, 7, b"hello"))


def test_golden_multipart_record() -> None:
    # Two magic words side by side give an empty middle part; the last part has the padding.
    record = image_record(0, 1, b"abcd" + MAGIC_BYTES * 2 + b"ef")
    header = "00000000 00000000 01000000 00000000 00000000 00000000"
    assert record.hex(" ", 4) == (
        f"0a23d7ce 1c000020 {header} 61626364 0a23d7ce 00000040 0a23d7ce 02000060 65660000"
    )
    assert is_multipart(record)


@pytest.mark.parametrize(
    ("payload", "parts"),
    [
        (b"", 1),
        (MAGIC_BYTES, 2),  # nothing but the word: two empty parts
        (b"abcd" + MAGIC_BYTES, 2),  # the last whole word
        (b"abc" + MAGIC_BYTES + b"d", 1),  # not on a 4-byte step: stays
        (b"abcd" + MAGIC_BYTES[:3], 1),  # cut off at the end
        (MAGIC_BYTES * 3 + b"xyz", 4),
    ],
)
def test_parts(payload: bytes, parts: int) -> None:
    framed = frame(payload)
    assert framed.count(MAGIC_BYTES) == parts + (payload.count(MAGIC_BYTES) if parts == 1 else 0)
    assert framed == write_simply(payload)
    assert read_simply(framed) == [payload]
    assert unframe(framed) == payload
    assert holds_magic(payload) == is_multipart(framed) == (parts > 1)


pieces = st.one_of(st.just(MAGIC_BYTES), st.binary(max_size=9), st.just(b"\0\0\0\0"))
payloads = st.lists(pieces, max_size=12).map(b"".join)


@settings(max_examples=300, deadline=None)
@given(st.lists(payloads, max_size=4))
def test_frames_equal_a_second_implementation(contents: list[bytes]) -> None:
    file = b"".join(map(frame, contents))
    assert file == b"".join(map(write_simply, contents))
    assert read_simply(file) == contents
    assert [unframe(frame(content)) for content in contents] == contents


@settings(max_examples=100, deadline=None)
@given(payloads, st.integers(0, 2**24 - 1), st.integers(0, ID_LIMIT - 1))
def test_header_survives(image: bytes, label: int, record_id: int) -> None:
    (payload,) = read_simply(image_record(label, record_id, image))
    assert struct.unpack("<IfQQ", payload[:24]) == (0, float(label), record_id, 0)
    assert payload[24:] == image
    assert parse_payload(payload) == Payload((float(label),), record_id, image)


@settings(max_examples=100, deadline=None)
@given(payloads, st.integers(0, 2**24 - 1), st.integers(0, ID_LIMIT - 1))
def test_head_and_padding_make_a_record_of_one_part(
    image: bytes, label: int, record_id: int
) -> None:
    built = record_head(label, record_id, len(image)) + image + bytes(-len(image) % 4)
    whole = image_record(label, record_id, image)
    assert len(built) == HEAD_SIZE + len(image) + -len(image) % 4
    assert (built == whole) == (not holds_magic(image)) == (not is_multipart(whole))


def test_magic_is_found_in_a_view_of_any_place() -> None:
    content = memoryview(b"x" * 7 + MAGIC_BYTES + b"y" * 5)
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
        (frame(b"abcd" + MAGIC_BYTES)[:12], "12 bytes end before its last part"),
        (frame(b"abcd" + MAGIC_BYTES)[12:], "not a record: 0a23d7ce 00000060 begins it"),
        (frame(MAGIC_BYTES)[:8] + frame(b"ab"), "not a record: 0a23d7ce 02000000 begins it"),
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
def test_dali_reads_every_record(tmp_path: Path, files: int) -> None:
    fn = pytest.importorskip("nvidia.dali.fn")
    dali = pytest.importorskip("nvidia.dali")
    draw = np.random.default_rng(0)
    images = [draw.bytes(int(size)) for size in draw.integers(1, 60, 12)]
    images[2] = MAGIC_BYTES + b"after"
    images[5] = b"abcd" + MAGIC_BYTES * 2
    images[11] = b"1234" * 9 + MAGIC_BYTES
    labels = [int(label) for label in draw.integers(0, 1000, 12)]
    records = [
        image_record(label, row, image)
        for row, (label, image) in enumerate(zip(labels, images, strict=True))
    ]
    assert [row for row, record in enumerate(records) if is_multipart(record)] == [2, 5, 11]
    offsets = [0, *itertools.accumulate(map(len, records))][:-1]
    (tmp_path / "all.idx").write_text(
        "".join(f"{row}\t{offset}\n" for row, offset in enumerate(offsets))
    )
    paths = [tmp_path / f"{number}.rec" for number in range(files)]
    each = len(records) // files
    for number, path in enumerate(paths):
        path.write_bytes(b"".join(records[number * each : (number + 1) * each]))
    pipeline = dali.Pipeline(batch_size=len(records), num_threads=1, device_id=None)
    with pipeline:
        pipeline.set_outputs(
            *fn.readers.mxnet(
                path=[str(path) for path in paths],
                index_path=[str(tmp_path / "all.idx")],
                name="reader",
            )
        )
    pipeline.build()
    data, found = pipeline.run()
    assert pipeline.epoch_size("reader") == len(records)
    assert [data.at(row).tobytes() for row in range(len(records))] == images
    assert [float(found.at(row)[0]) for row in range(len(records))] == labels
