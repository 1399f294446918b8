"""Records are byte for byte those that MXNet itself writes.

tests/golden holds what MXNet 1.9.1 (with Python 3.11, numpy 1.23.5 and opencv-python-headless
below 4.9) wrote for RECORDS, by

    records = mxnet.recordio.MXIndexedRecordIO("records.idx", "records.rec", "w")
    for label, record_id, image in RECORDS:
        header = mxnet.recordio.IRHeader(0, label, record_id, 0)
        records.write_idx(record_id, mxnet.recordio.pack(header, image))
    records.close()
"""

from pathlib import Path

from mpl_fast.data.records import ID_LIMIT, Payload, frame, image_record, parse_payload, unframe

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


def test_golden_file() -> None:
    content = (GOLDEN / "records.rec").read_bytes()
    lines = (GOLDEN / "records.idx").read_text().splitlines()
    index = [tuple(map(int, line.split("\t"))) for line in lines]
    assert [record_id for record_id, _ in index] == [row[1] for row in RECORDS]
    ends = [*[offset for _, offset in index[1:]], len(content)]
    for (label, record_id, image), (_, start), end in zip(RECORDS, index, ends, strict=True):
        labels = tuple(label) if isinstance(label, list) else (float(label),)
        framed = content[start:end]
        assert parse_payload(unframe(framed)) == Payload(labels, record_id, image)
        assert frame(unframe(framed)) == framed
        if isinstance(label, int):
            assert image_record(label, record_id, image) == framed
