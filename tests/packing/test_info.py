"""What a folder holds, and one record of it found by what DALI prints, by id or by name."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline

from mpl_fast.data.manifest import MANIFEST
from mpl_fast.errors import DataError, OutputError
from mpl_fast.packing.check.info import info, info_lines
from mpl_fast.packing.check.lookup import Found, extract, find, locate, save
from tests.packing.packs import image_tree, jpeg, make_tree, pack, run
from tests.packing.small_pack import SmallPack, make_pack

SECOND = "train-00001-of-00002.rec"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallPack:
    root = tmp_path_factory.mktemp("inspection") / "rec"
    return make_pack(root, shards={"train": [4, 4], "val": [3]}, labeled={0, 5}, skipped={2})


def test_info_of_a_finished_folder(small: SmallPack) -> None:
    found = json.loads(json.dumps(info(small.root)))
    assert (found["finished"], found["classes"], found["layout"]) == (True, 3, "shared")
    assert found["shards"] == {"train": 2, "val": 1}
    counts = {name: split["records"] for name, split in found["splits"].items()}
    assert counts == {"train": 7, "labeled": 2, "unlabeled": 7, "val": 3}
    size = sum(path.stat().st_size for path in small.root.glob("train*.rec"))
    assert found["splits"]["labeled"]["shard_bytes"] == size
    assert found["splits"]["train"]["per_class_min"] == 1
    assert found["splits"]["train"]["per_class_max"] == 3
    lines = info_lines(found)
    column = lines[0].index("shared")
    assert all(line[column - 2 : column] == "  " for line in lines)
    rows = {line[:column].rstrip(): line[column:] for line in lines}
    names = ["layout", "packed", "classes", "train", "labeled", "unlabeled", "val", "written"]
    assert list(rows) == [*names, "source", "options", "transform", "bad images", "duplicates"]
    shared = "2 .rec, shared with other splits, by train_label.idx"
    assert rows["labeled"].endswith(f" 2 records, 0 to 1 a class, in {shared}")
    assert rows["train"].endswith(f"in 2 .rec, {size / 1e9:.3f} GB, by train.idx")
    assert f"src {small.source}," in rows["options"]
    assert "split_seed 0" in rows["options"]
    assert rows["bad images"] == "skipped 1"
    total: Counter[str] = Counter()
    for entry in info(small.root, classes=True)["per_class"]:
        total.update(entry["records"])
    assert total == counts


def test_info_of_an_unfinished_folder(tmp_path: Path) -> None:
    tree = image_tree(tmp_path)
    sources = ("--src", tree / "train", "--val", tree / "val", "--shards", 2, "--labeled", 3)
    out = pack(*sources, "--part", "1/2", out=tmp_path / "rec")
    found = info(out)
    assert not found["finished"]
    assert (found["shards_done"], found["shards_planned"]) == (2, 4)
    assert found["records_planned"] == 30
    assert 0 < found["records_done"] < 30
    assert len(found["missing"]) == 2
    state, shards, *_ = info_lines(found)
    assert state.startswith("state")
    assert state.endswith("not finished; run the same pack command again, for every part")
    assert f"2 of 4 done; missing: {found['missing'][0]}" in shards
    for lookup in (find, locate):
        with pytest.raises(DataError, match="its packing is not finished"):
            lookup(out, "1")
    run("pack", *sources, "--part", "2/2", "--out", out)
    assert info_lines(info(out))[0].endswith("all parts are there; run make_rec.py finish")


@pytest.mark.parametrize(
    "text",
    [
        "/data/rec/train-00001-of-00002.rec at index {}",
        "Invalid RecordIO file: /a b/train-00001-of-00002.rec at index {} (record payload requires "
        "18025 bytes, but only 876 bytes are available).",
        "train-00001-of-00002.rec {}",
        "train-00001-of-00002.rec index {}",
        "'rec.rec/train-00001-of-00002.rec' at index {}",
    ],
)
def test_what_dali_prints_finds_a_record(small: SmallPack, text: str) -> None:
    record = small.records[5]
    assert record.offset > 0
    found = locate(small.root, text.format(record.offset))
    assert (found.id, found.label, found.image) == (5, 2, "cat/train_5.jpg")
    assert found.source == str(small.source / "cat" / "train_5.jpg")
    assert found.splits == ("train", "labeled", "unlabeled")
    assert (found.shard, found.offset, found.size) == (SECOND, record.offset, len(record.image))
    assert locate(small.root, text.format(record.offset + 99)) == found
    assert f"image   {record.key}" in found.lines()
    assert json.loads(json.dumps(found.as_json()))["splits"] == ["train", "labeled", "unlabeled"]


def test_what_this_dali_prints_for_a_broken_record_finds_it(tmp_path: Path) -> None:
    """The offset is that in the record's own file, although the index counts over all files."""
    pack = make_pack(tmp_path / "rec", shards={"train": [4, 4]})
    path = pack.root / SECOND
    flip(path, pack.records[6].offset + 6)  # its length
    with Pipeline(batch_size=8, num_threads=1, device_id=None) as pipeline:
        paths = [str(path) for path in sorted(pack.root.glob("train-*.rec"))]
        records = fn.readers.mxnet(path=paths, index_path=[str(pack.root / "train.idx")])
        pipeline.set_outputs(*records)
    pipeline.build()
    with pytest.raises(RuntimeError, match="at index") as error:
        pipeline.run()
    assert locate(pack.root, str(error.value)).id == 6


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x40
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("lookup", "what", "message"),
    [
        (locate, "something else", "names no record; give what DALI prints"),
        (locate, "train-00007-of-00009.rec at index 0",
         "has no train-00007-of-00009.rec; its files are"),
        (locate, f"{SECOND} at index 99999999", r"has \d+ bytes, so no record at 99999999"),
        (find, "77", "has no 77; give an id, class/name or name"),
        (find, "ant/train_1.jpg", "has no ant/train_1.jpg"),
        (find, "no/such.jpg", "has no no/such.jpg"),
        (find, "2", "2 was left out when this was packed"),
        (find, "9" * 30, "has no 9"),
    ],
)  # fmt: skip
def test_nothing_is_found(
    small: SmallPack, lookup: Callable[[Path, str], Found], what: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        lookup(small.root, what)


def test_extract_returns_the_image(small: SmallPack) -> None:
    for what in ("1", "bee/train_1.jpg", "train_1.jpg"):  # of several parts
        found, image = extract(small.root, what)
        assert (found.id, found.splits) == (1, ("train", "unlabeled"))
        assert image == small.records[1].image
    assert find(small.root, "0").splits == ("train", "labeled", "unlabeled")
    assert find(small.root, "8").splits == ("val",)


def test_one_name_of_several_images_needs_an_id(tmp_path: Path) -> None:
    tree = make_tree(
        tmp_path / "tree",
        {
            "train/a/1.jpg": jpeg(0),
            "train/b/1.jpg": jpeg(1),
            "val/a/1.jpg": jpeg(2),
            "val/b/1.jpg": jpeg(1),
            "val/b/2.jpg": jpeg(3),
        },
    )
    sources = ("--src", tree / "train", "--val", tree / "val", "--labeled", 2)
    out = pack(*sources, out=tmp_path / "rec")
    message = r"2 images are called a/1.jpg; give the id of one: \d \(a/"
    with pytest.raises(DataError, match=message):
        find(out, "a/1.jpg")
    with pytest.raises(DataError, match=r"4 images are called 1.jpg"):
        find(out, "1.jpg")
    assert extract(out, "b/1.jpg")[1] == jpeg(1)
    assert find(out, "b/2.jpg").source == str(tree / "val/b/2.jpg")
    assert find(out, "2.jpg").splits == ("val",)


def test_a_damaged_image_is_not_extracted(tmp_path: Path) -> None:
    pack = make_pack(tmp_path / "rec", shards={"train": [4]})
    path = pack.root / "train.rec"
    for at, message in ((300, "its checksum is wrong"), (3, "begins it")):
        flip(path, pack.records[3].offset + at)
        with pytest.raises(DataError, match=rf"record 3 \(ant/train_3.jpg\) is damaged.*{message}"):
            extract(pack.root, "3")
    path.unlink()
    with pytest.raises(DataError, match=r"train\.rec: No such file"):
        extract(pack.root, "3")


def test_an_image_is_saved_whole_and_never_over_another_file(tmp_path: Path) -> None:
    path, other = tmp_path / "a.jpg", tmp_path / "a.jpg.tmp"
    other.write_bytes(b"of the user")
    save(b"one", path, force=False)
    with pytest.raises(OutputError, match=r"a\.jpg: is there already; --force replaces it"):
        save(b"two", path, force=False)
    assert path.read_bytes() == b"one"
    save(b"two", path, force=True)
    assert path.read_bytes() == b"two"
    missing = f"{tmp_path}/absent/a.jpg: there is no folder {tmp_path}/absent$"
    with pytest.raises(OutputError, match=missing):
        save(b"three", tmp_path / "absent" / "a.jpg", force=False)
    assert sorted(tmp_path.iterdir()) == [path, other]
    assert other.read_bytes() == b"of the user"


def test_a_pack_that_was_stopped_while_publishing(tmp_path: Path) -> None:
    pack = make_pack(tmp_path / "rec", shards={"train": [4]})
    (pack.root / ".pack").mkdir()
    (pack.root / MANIFEST).rename(pack.root / ".pack" / MANIFEST)
    with pytest.raises(DataError, match="stopped during its final renames; run: make_rec"):
        info(pack.root)
    run("finish", pack.root)
    assert info(pack.root)["finished"]
