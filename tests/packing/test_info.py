"""What a folder tells about itself, and one record of it found by DALI's words, id or name."""

import json
from pathlib import Path

import pytest
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline

from mpl_fast.data.manifest import MANIFEST
from mpl_fast.errors import DataError, OutputError
from mpl_fast.packing.check.info import info, info_lines
from mpl_fast.packing.check.lookup import extract, find, locate, save
from tests.packing.packs import image_tree, jpeg, pack, run
from tests.packing.small_pack import SmallPack, make_pack

SECOND = "train-00001-of-00002.rec"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallPack:
    root = tmp_path_factory.mktemp("inspection") / "rec"
    return make_pack(root, shards={"train": [4, 4], "val": [3]}, labeled={0, 5}, skipped={2})


def test_info_tells_what_a_finished_folder_holds(small: SmallPack) -> None:
    told = json.loads(json.dumps(info(small.root)))
    assert told["finished"]
    assert told["classes"] == 3
    assert told["layout"] == "shared"
    assert told["shards"] == {"train": 2, "val": 1}
    assert {name: split["records"] for name, split in told["splits"].items()} == {
        "train": 7,
        "labeled": 2,
        "unlabeled": 7,
        "val": 3,
    }
    size = sum(path.stat().st_size for path in small.root.glob("train*.rec"))
    assert told["splits"]["labeled"]["shard_bytes"] == size
    assert told["splits"]["train"]["per_class_min"] == 1
    assert told["splits"]["train"]["per_class_max"] == 3
    lines = info_lines(told)
    column = lines[0].index("shared")
    names = [line[:column].rstrip() for line in lines]
    assert names[:7] == ["layout", "packed", "classes", "train", "labeled", "unlabeled", "val"]
    assert all(line[column - 2 : column] == "  " for line in lines)
    assert any(
        line.startswith("labeled") and " 2 records, 0 to 1 a class" in line for line in lines
    )
    assert any("split_seed 0" in line for line in lines if line.startswith("options"))


def test_info_tells_how_far_an_unfinished_folder_is(tmp_path: Path) -> None:
    tree = image_tree(tmp_path)
    sources = ("--src", tree / "train", "--val", tree / "val", "--shards", 2, "--labeled", 3)
    out = pack(*sources, "--part", "1/2", out=tmp_path / "rec")
    told = info(out)
    assert not told["finished"]
    assert (told["shards_done"], told["shards_planned"]) == (2, 4)
    assert told["records_planned"] == 30
    assert 0 < told["records_done"] < 30
    assert len(told["missing"]) == 2
    lines = info_lines(told)
    assert lines[0].startswith("state")
    assert lines[0].endswith("not finished; run the same pack command again, for every part")
    assert f"2 of 4 done; missing: {told['missing'][0]}" in lines[1]
    with pytest.raises(DataError, match="its packing is not finished"):
        find(out, "1")
    with pytest.raises(DataError, match="its packing is not finished"):
        locate(out, "train.rec 0")


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
def test_dalis_words_find_a_record(small: SmallPack, text: str) -> None:
    record = small.records[5]
    assert record.offset > 0
    found = locate(small.root, text.format(record.offset))
    assert found.id == 5
    assert found.image == "cat/train_5.jpg"
    assert found.label == 2
    assert found.source == str(small.root.parent / "rec-source" / "cat" / "train_5.jpg")
    assert found.splits == ("train", "labeled", "unlabeled")
    assert (found.shard, found.offset, found.size) == (SECOND, record.offset, len(record.image))
    assert locate(small.root, text.format(record.offset + 99)) == found
    assert f"image   {record.key}" in found.lines()
    assert json.loads(json.dumps(found.as_json()))["splits"] == ["train", "labeled", "unlabeled"]


def test_what_dali_prints_for_a_broken_record_finds_it(tmp_path: Path) -> None:
    """The offset is that in the record's own file, although the index counts over all files."""
    pack = make_pack(tmp_path / "rec", shards={"train": [4, 4]})
    record = pack.records[6]
    path = pack.root / SECOND
    content = bytearray(path.read_bytes())
    content[record.offset + 6] ^= 0x40  # its length
    path.write_bytes(content)
    with Pipeline(batch_size=8, num_threads=1, device_id=None) as pipeline:
        paths = [str(path) for path in sorted(pack.root.glob("train-*.rec"))]
        records = fn.readers.mxnet(path=paths, index_path=[str(pack.root / "train.idx")])
        pipeline.set_outputs(*records)
    pipeline.build()
    with pytest.raises(RuntimeError, match="at index") as error:
        pipeline.run()
    assert locate(pack.root, str(error.value)).id == 6


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("something else", "names no record; give what DALI prints"),
        ("train-00007-of-00009.rec at index 0", "has no train-00007-of-00009.rec; its files are"),
        (f"{SECOND} at index 99999999", r"has \d+ bytes, so no record at 99999999"),
    ],
)
def test_words_that_find_nothing_say_why(small: SmallPack, text: str, told: str) -> None:
    with pytest.raises(DataError, match=told):
        locate(small.root, text)


@pytest.mark.parametrize("what", ["1", "bee/train_1.jpg", "train_1.jpg"])
def test_a_record_gives_back_its_image(small: SmallPack, what: str) -> None:
    """Record 1 is one of several parts."""
    found, image = extract(small.root, what)
    assert found.id == 1
    assert image == small.records[1].image


def test_splits_are_those_of_the_listings(small: SmallPack) -> None:
    assert find(small.root, "0").splits == ("train", "labeled", "unlabeled")
    assert find(small.root, "1").splits == ("train", "unlabeled")
    assert find(small.root, "8").splits == ("val",)


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("77", "has no 77; give an id, class/name or name"),
        ("ant/train_1.jpg", "has no ant/train_1.jpg"),
        ("no/such.jpg", "has no no/such.jpg"),
        ("2", "2 was left out when this was packed"),
        ("9" * 30, "has no 9"),
    ],
)
def test_what_is_not_there_is_said(small: SmallPack, what: str, told: str) -> None:
    with pytest.raises(DataError, match=told):
        find(small.root, what)


def test_one_name_of_several_images_needs_an_id(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for number, place in enumerate(
        ("train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg", "val/b/2.jpg")
    ):
        path = tree / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number))
    (tree / "val/b/1.jpg").write_bytes(jpeg(1))  # that of train/b
    sources = ("--src", tree / "train", "--val", tree / "val", "--labeled", 2)
    out = pack(*sources, out=tmp_path / "rec")
    with pytest.raises(
        DataError, match=r"2 images are called a/1.jpg; give the id of one: \d \(a/"
    ):
        find(out, "a/1.jpg")
    with pytest.raises(DataError, match=r"4 images are called 1.jpg"):
        find(out, "1.jpg")
    assert extract(out, "b/1.jpg")[1] == jpeg(1)
    assert find(out, "b/2.jpg").source == str(tree / "val/b/2.jpg")
    assert find(out, "2.jpg").splits == ("val",)


@pytest.mark.parametrize(("at", "told"), [(3, "begins it"), (300, "its checksum is wrong")])
def test_a_damaged_image_is_not_given_out(tmp_path: Path, at: int, told: str) -> None:
    pack = make_pack(tmp_path / "rec", shards={"train": [4]})
    path = pack.root / "train.rec"
    content = bytearray(path.read_bytes())
    content[pack.records[3].offset + at] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"record 3 \(ant/train_3.jpg\) is damaged: .*{told}"):
        extract(pack.root, "3")
    path.unlink()
    with pytest.raises(DataError, match=r"train\.rec: No such file"):
        extract(pack.root, "3")


def test_an_image_is_saved_whole_and_never_over_another_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    save(b"one", path, force=False)
    with pytest.raises(OutputError, match=r"a\.jpg: is there already; --force replaces it"):
        save(b"two", path, force=False)
    assert path.read_bytes() == b"one"
    save(b"two", path, force=True)
    assert path.read_bytes() == b"two"
    with pytest.raises(OutputError, match="absent"):
        save(b"three", tmp_path / "absent" / "a.jpg", force=False)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.jpg"]


def test_saving_an_image_leaves_other_files_alone(tmp_path: Path) -> None:
    (tmp_path / "a.jpg.tmp").write_bytes(b"of the user")
    save(b"one", tmp_path / "a.jpg", force=False)
    assert (tmp_path / "a.jpg.tmp").read_bytes() == b"of the user"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.jpg", "a.jpg.tmp"]


def test_a_pack_that_was_stopped_while_publishing_says_so(tmp_path: Path) -> None:
    pack = make_pack(tmp_path / "rec", shards={"train": [4]})
    (pack.root / ".pack").mkdir()
    (pack.root / MANIFEST).rename(pack.root / ".pack" / MANIFEST)
    with pytest.raises(DataError, match="stopped during its final renames; run: make_rec"):
        info(pack.root)
    run("finish", pack.root)
    assert info(pack.root)["finished"]
