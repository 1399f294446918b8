"""Parquet files: columns and classes as Hugging Face describes them, images unchanged."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from mpl_fast.errors import ConfigError, DataError
from mpl_fast.packing.sources.unpacked import Unpacked, _entries
from tests.packing.made_sources import content, entries, keys, listed, opened
from tests.packing.packs import jpeg, make_tar, make_tree, pack, png, refuse

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
NAMES = ("cat", "ant", "bee")  # not sorted: the order is the schema's


def write(
    path: Path,
    columns: Mapping[str, Any],
    classes: Mapping[str, Sequence[str]] | None = None,
    **how: Any,
) -> Path:
    """Write columns, and Hugging Face's metadata for those with named classes."""
    path.parent.mkdir(exist_ok=True)
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    for name, names in (classes or {}).items():
        features[name] = {"names": names, "_type": "ClassLabel"}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if classes else None
    table = pa.table(dict(columns)).replace_schema_metadata(metadata)
    pq.write_table(table, path, **how)
    return path


def images(*rows: tuple[bytes | None, str | None]) -> Any:
    return pa.array([{"bytes": image, "path": path} for image, path in rows], STRUCT)


def two_files(folder: Path) -> Path:
    """Write five rows in two files of a folder."""
    rows = [(jpeg(0), "x/a.JPEG"), (png(1), "b.png"), (jpeg(2), "c.JPEG"), (b"", "a.JPEG")]
    for number, (part, labels) in enumerate([(rows, [2, 0, 1, 1]), ([(jpeg(4), "e.JPEG")], [0])]):
        file = folder / f"train-0000{number}-of-00002.parquet"
        write(file, {"image": images(*part), "label": labels}, {"label": NAMES}, row_group_size=3)
    return folder


EXPECTED = [
    ("ant/a.JPEG", b""),
    ("ant/c.JPEG", jpeg(2)),
    ("bee/a.JPEG", jpeg(0)),
    ("cat/b.png", png(1)),
    ("cat/e.JPEG", jpeg(4)),
]


@pytest.mark.parametrize(
    "spec",
    ["", "/*.parquet", "/train-{00000..00001}-of-00002.parquet", "/train-0000[01]*", "/*:label"],
)
def test_files_of_a_split(tmp_path: Path, spec: str) -> None:
    where = two_files(tmp_path / "data")
    lines: list[str] = []
    source = opened(f"{where}{spec}", tmp_path, report=lines.append)
    found = sorted(source.images())
    assert [(key, content(source, of)) for key, of in zip(keys(found), found, strict=True)] == (
        EXPECTED
    )
    assert source.class_order == NAMES
    assert lines == [
        f"{where}{spec}: images are column image, classes column label (3 names in the schema)",
        f"unpacking {where}{spec} into a temporary file in {tmp_path}",
    ]
    assert source.file.name.startswith("spool-") and source.file.suffix == ".images"
    assert opened(f"{where}{spec}", tmp_path, report=lines.append).file == source.file
    assert len(lines) == 3  # unpacked once


def test_hidden_files(tmp_path: Path) -> None:
    """As macOS writes them beside others on disks of other systems."""
    where = two_files(tmp_path / "data")
    (where / "._train-00000-of-00002.parquet").write_bytes(b"\0")
    (where / ".parquet").touch()
    assert entries(where, tmp_path) == EXPECTED


def test_packed_like_a_tar(tmp_path: Path) -> None:
    """The images are those of a tar of class folders, byte for byte, with the schema's labels."""
    contents = {
        f"{name}/{at}.jpg": jpeg(9 * at + len(name)) for name in ("bee", "ant") for at in range(4)
    }
    tar = make_tar(tmp_path / "data.tar", contents.items())
    rows = images(*[(image, name.partition("/")[2]) for name, image in contents.items()])
    classes = ["ant", "bee"]
    labels = [classes.index(name[:3]) for name in contents]
    file = write(tmp_path / "data.parquet", {"image": rows, "label": labels}, {"label": classes})
    how = ("--labeled", "4", "--quiet")
    one, other = (pack("--src", src, *how, out=tmp_path / src.suffix[1:]) for src in (tar, file))
    for name in ("train.rec", "train_label.idx", "train.lst", "classes.txt"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    assert not list(other.rglob("spool-*"))


@pytest.mark.parametrize(
    "paths", [[None, None], ["a.jpg", "x/"], ["a.jpg", "a.jpg"], ["a.jpg", None]]
)
def test_names_by_row(tmp_path: Path, paths: list[str | None]) -> None:
    """Paths that are missing, or those of several images of a class, are no names."""
    rows = images((jpeg(0), paths[0]), (png(0), paths[1]))
    file = write(tmp_path / "t-1.parquet", {"img": rows, "label": [1, 1]}, {"label": NAMES})
    assert entries(file, tmp_path) == [
        ("ant/t-1-000000.jpg", jpeg(0)),
        ("ant/t-1-000001.png", png(0)),
    ]


def test_paths_that_are_no_text(tmp_path: Path) -> None:
    file = write(tmp_path / "t.parquet", {"image": [{"bytes": b"1", "path": 5}], "label": [0]})
    assert keys(listed(file, tmp_path)[1]) == ["0/t-000000"]


@pytest.mark.parametrize(
    ("labels", "keys_", "order"),
    [
        (["y", "x"], ["x/t-000001", "y/t-000000"], None),
        (pa.array(["y", "x"]).dictionary_encode(), ["x/t-000001", "y/t-000000"], None),
        (["n/a", "x"], ["n_a/t-000000", "x/t-000001"], None),
        ([3, 0], ["0/t-000001", "3/t-000000"], ("0", "1", "2", "3")),
        ([True, False], ["0/t-000001", "1/t-000000"], ("0", "1")),
    ],
)
def test_labels_without_metadata(
    tmp_path: Path, labels: Any, keys_: list[str], order: tuple[str, ...] | None
) -> None:
    columns = {"photo": pa.array([b"1", b"2"]), "label": labels}
    source, found = listed(write(tmp_path / "t.parquet", columns), tmp_path)
    assert (keys(found), source.class_order) == (keys_, order)


def test_choice_of_the_label(tmp_path: Path) -> None:
    columns = {"image": images((b"1", "1.png")), "fine_label": [1], "coarse_label": [0]}
    classes = {"fine_label": ["a", "b/c"], "coarse_label": ["d"]}
    file = write(tmp_path / "t.parquet", columns, classes)
    assert keys(listed(file, tmp_path)[1]) == ["b_c/1.png"]
    assert keys(listed(f"{file}:coarse_label", tmp_path)[1]) == ["d/1.png"]  # a spool of its own
    with pytest.raises(DataError, match=r"no column 'x'; it has image \(struct\), fine_label \("):
        listed(f"{file}:x", tmp_path)


LATIN_1 = pa.array([b"\xe9"]).view(pa.string())
ONE = {"image": images((b"1", "1.png"))}


@pytest.mark.parametrize(
    ("columns", "classes", "message"),
    [
        (
            {**ONE, "label": pa.array([None], pa.int8())},
            {},
            r"1 row has no usable label: t.parquet row 0 \(none\)",
        ),
        ({**ONE, "label": [-2]}, {}, r"row 0 \(-2\)"),
        ({**ONE, "label": [1 << 24]}, {}, r"row 0 \(16777216\)"),
        ({**ONE, "label": [3]}, {"label": NAMES}, r"row 0 \(3, but 3 classes are named\)"),
        ({**ONE, "label": [""]}, {}, r"row 0 \(none\)"),
        (
            {**ONE, "label": LATIN_1},
            {},
            r"t.parquet: a label or path is no text in UTF-8 \(.* 0xe9",
        ),
        (
            {
                "image": pa.StructArray.from_arrays([[b"1"], LATIN_1], ["bytes", "path"]),
                "label": [0],
            },
            {},
            r"t.parquet: a label or path is no text in UTF-8 \(.* 0xe9",
        ),
        ({"image": [{"bytes": [1, 2]}], "label": [0]}, {}, r"no images; .*image \(struct\)"),
        ({"image": [{"bytes": "1"}], "label": [0]}, {}, r"no images; .*image \(struct\)"),
        ({**ONE, "label": [0]}, {"label": [1, 2]}, "classes of column label are no list of texts"),
        ({**ONE, "label": [0]}, {"label": ["\ud83d"]}, "is no text .surrogates not allowed"),
        ({**ONE, "label": [0]}, {"label": "xy"}, "classes of column label are no list of texts"),
        ({**ONE, "label": [[1, 2]]}, {}, "label has several labels an image, but only one can"),
        ({**ONE, "label": [0.5]}, {}, "column label is double; labels are whole numbers or text"),
        ({**ONE, "a": [0], "b": [0]}, {}, r"no label among its columns .*; name one as .*:COLUMN"),
        ({**ONE, "a": [0], "b": [0]}, {"a": ["x"], "b": ["y"]}, "several columns may be the label"),
        ({**ONE, "label": [0]}, {"label": ["x", "x"]}, "has no name, or that of another"),
        ({**ONE, "label": [0]}, {"label": ["x/", "x_"]}, "classes that differ only in / and _: x/"),
        ({"text": ["1"], "label": [0]}, {}, r"no images; .*text \(string\).* must be named image"),
        ({"a": [b"1"], "b": [b"1"], "label": [0]}, {}, "several columns may be images: a, b"),
        (
            {"image": images((None, "1.png")), "label": [0]},
            {},
            "t.parquet: row 0 has no image bytes; files that it names by path are not read",
        ),
    ],
)
def test_unusable_tables(
    tmp_path: Path, columns: dict[str, Any], classes: dict[str, Sequence[str]], message: str
) -> None:
    file = write(tmp_path / "t.parquet", columns, classes)
    with pytest.raises(DataError, match=message):
        listed(file, tmp_path)
    assert list(tmp_path.iterdir()) == [file]


def test_label_too_large() -> None:
    """Whatever source it is of."""
    entries_ = _entries(Unpacked([Path("a.mat")], None, [(1 << 24, "0.png", b"")]))
    with pytest.raises(DataError, match=r"a.mat: 0.png: label 16777216 is more than 16777215$"):
        list(entries_)


def test_several_splits_or_schemas(tmp_path: Path) -> None:
    data = two_files(tmp_path / "data")
    write(data / "test-00000-of-00001.parquet", {**ONE, "label": [0]}, {"label": ["x"]})
    with pytest.raises(
        DataError, match=r"several splits: test \(1 file\), train \(2 files\); .*/train\*"
    ):
        listed(data, tmp_path)
    with pytest.raises(
        DataError, match=r"train-.*: its columns or classes are not those of .*test-"
    ):
        listed(f"{data}/*", tmp_path)
    with pytest.raises(DataError, match=r"no file fits 1 name of this pattern: .*train-3"):
        listed(f"{data}/{{train-3,test*}}", tmp_path)
    (data / "x.tar").touch()
    with pytest.raises(DataError, match=r"x.tar, but a pattern must name parquet files or webd"):
        listed(f"{data}/*[tx]*", tmp_path)


@pytest.mark.parametrize("name", ["ant/1.jpg", "1.jpg"])
def test_parquet_beside_images(tmp_path: Path, name: str) -> None:
    """Then it is metadata: the images are packed, as without it."""
    write(tmp_path / "in/metadata.parquet", {**ONE, "label": [0]})
    make_tree(tmp_path / "in", {name: b"1", "README.md": b""})
    (tmp_path / "labels").write_text("1.jpg ant\n")
    assert entries(tmp_path / "in", tmp_path, labels=tmp_path / "labels") == [("ant/1.jpg", b"1")]


def test_damaged_file(tmp_path: Path) -> None:
    file = write(tmp_path / "t.parquet", {**ONE, "label": [0]})
    whole = file.read_bytes()
    for damaged in (b"", whole[:-9], b"PAR1" + bytes(len(whole) - 12) + whole[-8:]):
        file.write_bytes(damaged)
        assert "t.parquet: damaged or no parquet file" in refuse(
            "--src", file, "--out", tmp_path / "out", status=4
        )


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "t.parquet", {**ONE, "label": [0]})
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ConfigError, match=r"needs pyarrow: pip install 'mpl_fast\[parquet\]'"):
        listed(file, tmp_path)
