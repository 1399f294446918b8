"""Webdataset shards: labels beside the images, one shard or many, and what no sample is."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from mpl_fast.errors import DataError
from mpl_fast.packing.plan.table import TABLE, open_table
from tests.packing.made_sources import content, entries, keys, listed, opened
from tests.packing.packs import hashes, jpeg, make_tar, make_tree, pack, png, refuse

IMAGES = {
    f"{name}_{at}": (name, jpeg(10 * at + len(name))) for name in ("ant", "bee") for at in range(6)
}

Contents = dict[str, bytes | str]


def shard(path: Path, contents: Contents, mode: str = "w") -> Path:
    rows = [
        (name, text.encode() if isinstance(text, str) else text) for name, text in contents.items()
    ]
    return make_tar(path, rows, mode)


def shards(folder: Path, suffix: str = ".cls", modes: Sequence[str] = ("w",)) -> Path:
    """Write IMAGES in shards of five, whose modes take turns."""
    folder.mkdir(parents=True)
    names = list(IMAGES)
    for number, first in enumerate(range(0, len(names), 5)):
        contents: Contents = {}
        for name in names[first : first + 5]:
            class_name, image = IMAGES[name]
            label = (
                json.dumps({"width": 3, "label": class_name}) if suffix == ".json" else class_name
            )
            contents |= {f"{name}{suffix}": label, f"{name}.jpg": image}
        shard(folder / f"data-{number:04}.tar", contents, modes[number % len(modes)])
    return folder


@pytest.mark.parametrize("suffix", [".cls", ".json", ".txt"])
@pytest.mark.parametrize("pattern", ["*.tar", "data-{0000..0002}.tar"])
def test_shards(tmp_path: Path, suffix: str, pattern: str) -> None:
    where = shards(tmp_path / "in", suffix)
    lines: list[str] = []
    source = opened(f"{where}/{pattern}", tmp_path, report=lines.append)
    found = sorted(source.images())
    assert (source.kind, source.file, source.class_order) == ("shards", where, None)
    expected = {f"{name}/{key}.jpg": image for key, (name, image) in IMAGES.items()}
    assert {
        key: content(source, of) for key, of in zip(keys(found), found, strict=True)
    } == expected
    assert found[0].path == "data-0000.tar//ant_0.jpg"
    assert source.warnings == []
    place = ".json, as label" if suffix == ".json" else suffix
    assert lines == [
        f"{where}/{pattern}: read as webdataset samples, their classes are names in {place}"
    ]


@pytest.mark.parametrize("modes", [("w",), ("w:gz",), ("w:xz", "w")])
def test_packed_like_a_folder(tmp_path: Path, modes: Sequence[str]) -> None:
    where = shards(tmp_path / "in", modes=modes)
    tree = make_tree(
        tmp_path / "tree", {f"{name}/{key}.jpg": image for key, (name, image) in IMAGES.items()}
    )
    how = ("--labeled", "4", "--shards", "2")
    packs = [
        pack("--src", src, *how, *more, out=tmp_path / str(number))
        for number, (src, more) in enumerate(
            [(tree, ()), (f"{where}/*.tar", ()), (f"{where}/*.tar", ("--read-threads", 0, "-j", 1))]
        )
    ]
    one, other, third = map(hashes, packs)
    assert other.keys() == one.keys()
    differ = {name for name in one if one[name] != other[name]}
    assert differ == {"manifest.json", "records.sqlite"}  # the sources
    assert third == other
    assert not (packs[1] / ".pack").exists()  # into which they are unpacked
    with open_table(packs[1] / TABLE) as table:
        assert table.sources()[0].file == (f"{where}/*.tar" if modes != ("w",) else str(where))


def test_one_shard(tmp_path: Path) -> None:
    contents: Contents = {"0.jpg": jpeg(0), "0.cls": "7", "x/1.png": png(1), "x/1.cls": b"2\n"}
    for mode in ("w", "w:gz"):
        path = shard(tmp_path / f"{mode[-1]}.tar", contents, mode)
        source, found = listed(path, tmp_path)
        assert (source.kind, keys(found)) == ("archive", ["2/1.png", "7/0.jpg"])
        assert source.class_order == tuple(map(str, range(8)))
        assert [content(source, image) for image in found] == [png(1), jpeg(0)]
    assert keys(listed(f"{tmp_path}/w.tar:x", tmp_path)[1]) == ["2/1.png"]
    (tmp_path / "classes.txt").write_text("".join(f"n{number}\n" for number in range(9)))
    source, found = listed(path, tmp_path)
    assert keys(found) == ["n2/1.png", "n7/0.jpg"]
    assert source.class_order is not None and source.class_order[8] == "n8"


def test_names_with_dots(tmp_path: Path) -> None:
    contents: Contents = {"a.1.jpg": b"1", "a.1.cls": "x", "a.2.jpg": b"2", "a.2.cls": "y"}
    contents |= {
        "b.img.jpg": b"3",
        "b.target.cls": "z",
        "c.jpg": b"4",
        "c.json": "{}",
        "c.cls": "z",
    }
    contents |= {
        "d.WEBP": b"5",
        "d.cls": "z",
        "._e.jpg": b"",
        ".f": b"",
        "g.json": "{}",
        "g.cls": "z",
    }
    path = shard(tmp_path / "t.tar", contents)
    assert entries(path, tmp_path) == [
        *(("x/a.1.jpg", b"1"), ("y/a.2.jpg", b"2"), ("z/b.img.jpg", b"3")),
        *(("z/c.jpg", b"4"), ("z/d.WEBP", b"5")),
    ]
    assert listed(path, tmp_path)[0].warnings == [
        f"{path}: 1 sample has no image and is left out: g.json"
    ]


def test_images_of_any_suffix(tmp_path: Path) -> None:
    contents: Contents = {"a.JFIF": jpeg(1), "a.cls": "x", "b.img": png(2), "b.cls": "y"}
    contents |= {"c": jpeg(3), "c.cls": "y", "d.npy": b"no image", "d.cls": "y"}
    path = shard(tmp_path / "t.tar", contents)
    found = [("x/a.JFIF", jpeg(1)), ("y/b.img", png(2)), ("y/c", jpeg(3))]
    assert entries(path, tmp_path) == found
    left_out = "1 sample has no image and is left out: d.npy"
    assert listed(path, tmp_path)[0].warnings == [f"{path}: {left_out}"]


def test_what_is_no_shard(tmp_path: Path) -> None:
    """Class folders with texts are class folders; a labels file goes before what is in the tar."""
    folders = shard(tmp_path / "1.tar", {"ant/a.jpg": b"1", "ant/a.txt": "x", "ant/a.json": "{}"})
    assert entries(folders, tmp_path) == [("ant/a.jpg", b"1")]
    flat = shard(tmp_path / "2.tar", {"a.jpg": b"1", "a.txt": "a caption"})
    (tmp_path / "labels").write_text("a.jpg cat\n")
    assert entries(flat, tmp_path, labels=tmp_path / "labels") == [("cat/a.jpg", b"1")]


GOOD: Contents = {"0.jpg": b"1", "0.cls": "3"}


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (
            {**GOOD, "1.jpg": b"1"},
            r"1.jpg has no label beside it \(looked for .cls, .json, .txt\)$",
        ),
        ({**GOOD, "1.a.jpg": b"", "1.b.jpg": b"", "1.cls": "1"}, r"2 images are called 1\.\*"),
        (
            {**GOOD, "1.jpg": b"1", "1.cls": "ant"},
            "1.cls: 'ant': labels are both numbers and names",
        ),
        (
            {**GOOD, "1.jpg": b"1", "1.txt": "3"},
            "1.txt: its label is in .txt, that of others in .cls",
        ),
        ({**GOOD, "1.jpg": b"1", "1.cls": " "}, "1.cls: no label, but nothing"),
        ({**GOOD, "1.jpg": b"1", "1.cls": "1\n2"}, "1.cls: no label, but several lines"),
        ({**GOOD, "1.jpg": b"1", "1.cls": b"\xff"}, r"1.cls: no label \('utf-8' codec"),
        ({**GOOD, "1.jpg": b"1", "1.cls": "-2"}, "1.cls: label -2 is not 0 to 16777215$"),
        ({**GOOD, "1.jpg": b"1", "1.cls": f"{1 << 24}"}, "label 16777216 is not 0 to 16777215$"),
        ({**GOOD, "1.jpg": b"1", "1.cls": "7" * 5000}, r"label 7{20}\.\.\. is not 0 to 16777215$"),
        (
            {"0.jpg": b"1", "0.json": '{"label": 1e300}'},
            r"label 10{10}\d+\.\.\. is not 0 to 16777215$",
        ),
        ({"0.jpg": b"1", "0.cls": "a/b"}, "0.cls: a class with a slash in it: 'a/b'"),
        ({"0.jpg": b"1", "0.json": '{"label": [1, 2]}'}, r"\[1, 2\] for one label: only one an im"),
        ({"0.jpg": b"1", "0.json": '{"id": 1}'}, r"0.json: no label \(none of label, cls, "),
        ({"0.jpg": b"1", "0.json": "[]"}, r"0.json: no label \(none of label, cls, "),
        ({"0.jpg": b"1", "0.json": "{"}, r"0.json: no label \(Expecting"),
        ({"0.jpg": b"1", "0.json": "[" * 300_000}, r"0.json: no label \(nested too deep"),
        ({"0.jpg": b"1", "0.json": r'{"label": "\ud83d"}'}, r"0.json: no label \('utf-8' codec"),
        ({"0.jpg": b"1", "0.txt": "x" * (1 << 20) + "x"}, "0.txt has 1048577 bytes: no label"),
    ],
)
def test_unusable_samples(tmp_path: Path, contents: Contents, message: str) -> None:
    path = shard(tmp_path / "t.tar", contents)
    with pytest.raises(DataError, match=message):
        listed(path, tmp_path)


def test_names_twice(tmp_path: Path) -> None:
    """Samples that follow each other under one name are refused: only one would be packed."""
    path = make_tar(tmp_path / "t.tar", [("same.png", png(0)), ("same.cls", b"1")] * 4)
    with pytest.raises(DataError, match=r"t.tar: same.png is there twice$"):
        listed(path, tmp_path)


def test_captions_are_no_classes(tmp_path: Path) -> None:
    contents: Contents = {}
    for number in range(12):
        contents |= {f"{number}.jpg": b"1", f"{number}.txt": f"a photo of {number // 2} dogs"}
    assert len(listed(shard(tmp_path / "t.tar", contents), tmp_path)[1]) == 12
    contents["0.txt"] = "a sunset"
    with pytest.raises(DataError, match=r"7 different texts in .txt beside 12 images: captions"):
        listed(shard(tmp_path / "t.tar", contents), tmp_path)


def test_compressed_shards(tmp_path: Path) -> None:
    """They are unpacked once; another state of any of them is another source."""
    shards(tmp_path / "in/2", modes=("w:bz2",))
    other = shard(tmp_path / "in/1.tar.gz", {"0.jpg": b"1", "0.cls": "ant"}, "w:gz")
    spec, lines = f"{tmp_path}/in/{{1.tar.gz,2/*.tar}}", list[str]()
    for _ in range(2):
        source = opened(spec, tmp_path, report=lines.append)
        assert {image.path.partition("//")[0] for image in source.images()} == {
            "1.tar.gz",
            *(f"2/data-{number:04}.tar" for number in range(3)),
        }
    unpacked = [line.split()[1] for line in lines if line.startswith("unpacking ")]
    assert unpacked == [str(other), *map(str, sorted((tmp_path / "in/2").iterdir()))]
    os.utime(other, ns=(5, 5))
    assert opened(spec, tmp_path).file != source.file


def test_damaged_shards(tmp_path: Path) -> None:
    whole = shard(tmp_path / "1.tar", {**GOOD, "1.jpg": b"1", "1.cls": "1"}).read_bytes()
    (tmp_path / "1.tar").write_bytes(whole[:1600])
    with pytest.raises(DataError, match=r"1.tar: damaged or cut short after 0.jpg"):
        listed(f"{tmp_path}/1.ta[r]", tmp_path)


def test_shard_changed_while_packing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = shards(tmp_path / "in")
    from mpl_fast.packing import pack as command

    plan = command._plan

    def plan_and_touch(*arguments: object) -> None:
        plan(*arguments)  # type: ignore[arg-type]
        os.utime(where / "data-0001.tar", ns=(5, 5))

    monkeypatch.setattr(command, "_plan", plan_and_touch)
    line = refuse("--src", f"{where}/*.tar", "--out", tmp_path / "out", "--labeled", 2, status=4)
    assert "/*.tar: data-0001.tar//" in line and "changed while it was being packed" in line
