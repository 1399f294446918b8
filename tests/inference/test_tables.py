"""Predictions as Parquet, CSV and JSON lines: the same values, whatever the names."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from mpl_fast.errors import ConfigError
from mpl_fast.inference.tables import Part, escaped, write_labels, writer_of

NAMES = ["a/1.jpg", "=HYPERLINK(0)", "b,\"q'.jpg", "a\udcff.jpg"]
CLASSES = ["ant", "-bee", "=cow"]
LABELS = np.array([[0, 1], [1, 2], [0, 0], [2, 0]])
CHANCES = np.array([[0.7, 0.2], [0.5, 0.3], [0, 0], [0.9, 0.1]], np.float32)
VECTORS = np.linspace(0, 1.5, 12, dtype=np.float32).reshape(4, 3)


def parts() -> list[Part]:
    """Four images in two parts; the third is bad."""
    two = slice(2), slice(2, 4)
    return [
        Part(
            NAMES[s], LABELS[s], CHANCES[s], VECTORS[s], VECTORS[s], {0: "=cut short"} if i else {}
        )
        for i, s in enumerate(two)
    ]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_lists(suffix: str, tmp_path: Path) -> None:
    out = tmp_path / f"x{suffix}"
    writer_of(out, vectors=True)(out, parts(), CLASSES)
    if suffix == ".parquet":
        table = pytest.importorskip("pyarrow.parquet").read_table(out)
        assert json.loads(table.schema.metadata[b"classes"]) == CLASSES
        rows = table.to_pylist()
    else:
        rows = [json.loads(line) for line in out.read_text("ascii").splitlines()]
    assert [row["image"] for row in rows] == [*NAMES[:3], r"a\xff.jpg"]
    assert [row["error"] for row in rows] == [None, None, "=cut short", None]
    assert {*rows[2].values()} == {NAMES[2], "=cut short", None}
    for at in (0, 1, 3):
        row = rows[at]
        assert (row["label"], row["class"]) == (LABELS[at, 0], CLASSES[LABELS[at, 0]])
        assert row["top_classes"] == [CLASSES[label] for label in LABELS[at]]
        for name, values in (("top_probabilities", CHANCES), ("features", VECTORS)):
            assert np.array_equal(np.array(row[name], np.float32), values[at])
        assert np.float32(row["probability"]) == CHANCES[at, 0]


def test_csv_has_no_formulas(tmp_path: Path) -> None:
    out = tmp_path / "x.csv"
    writer_of(out, vectors=False)(out, parts(), CLASSES)
    content = out.read_text("utf-8", "surrogateescape")
    rows = [*csv.reader(content.splitlines())]
    assert rows[0] == [
        "image", "label", "class", "probability", "class_2", "probability_2", "error"
    ]  # fmt: skip
    assert rows[1] == ["a/1.jpg", "0", "ant", "0.7", "'-bee", "0.2", ""]
    assert rows[2] == ["'=HYPERLINK(0)", "1", "'-bee", "0.5", "'=cow", "0.3", ""]
    assert rows[3] == [NAMES[2], "", "", "", "", "", "'=cut short"]
    assert rows[4][0] == NAMES[3]
    for start in "=+-@\t\r\n":
        assert escaped(f"{start}1") == f"'{start}1"
    assert escaped("1+1") == "1+1"


def test_a_labels_file_lists_what_its_lines_would_fit(tmp_path: Path) -> None:
    names = ["a/1.jpg", "b/1.jpg", "b/2.jpg", "=1.jpg", "c", "d/c.png", "2.jpg.jpg"]
    kept = {"a/1.jpg": "ant", "=1.jpg": "x, y", "c": "bee", "b/2.jpg": "bee"}
    write_labels(tmp_path / "x.csv", kept, names)
    assert [*csv.reader((tmp_path / "x.csv").read_text().splitlines())] == [
        ["image", "label"],
        ["a/1.jpg", "ant"],
        ["./=1.jpg", "x, y"],
        ["c", "bee"],
        ["b/2.jpg", "bee"],
        ["b/1.jpg", "-1"],
        ["d/c.png", "-1"],
        ["2.jpg.jpg", "-1"],
    ]


def test_refused(tmp_path: Path) -> None:
    for name, vectors, fault in (
        ("x.txt", False, r"its suffix must be one of \.parquet, \.csv, \.jsonl"),
        ("x.csv", True, r"CSV has no lists: write --logits, --features to \.parquet"),
    ):
        with pytest.raises(ConfigError, match=fault):
            writer_of(tmp_path / name, vectors=vectors)
