"""tools/make_rec.py as a user runs it: every image lands in the records, as it is."""

import hashlib
import itertools
import json
import os
import sqlite3
import struct
import subprocess
import sys
import tarfile
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest
import simplejpeg
from tests.packing.packs import (
    CLASSES,
    TOOL,
    hashes,
    image_tree,
    manifest_of,
    names,
    pack,
    read_record,
    read_split,
    refuse,
    run,
)

from mpl_fast.data.manifest import read_manifest

COMMANDS = ("pack", "resplit", "verify", "finish", "info", "locate", "extract")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return image_tree(tmp_path)


def files_of(*stems: str, kinds: tuple[str, ...] = ("rec", "idx", "lst")) -> set[str]:
    return {f"{stem}.{kind}" for stem in stems for kind in kinds}


ALWAYS = {"classes.txt", "records.sqlite", "manifest.json", ".lock"}


def test_shared_layout_holds_every_image_once(tree: Path) -> None:
    # A clock that jumped: neither times to come nor the oldest ones tell anything.
    os.utime(tree / "train" / "ant" / "0.jpg", (4e9, 4e9))
    os.utime(tree / "train" / "ant" / "3.jpg", (0, 0))
    done = run("pack", "--src", "train", "--val", "val", "--out", "out/rec", "--labeled", "6",
               folder=tree)  # fmt: skip
    out = tree / "out" / "rec"
    subsets = files_of("train_label", "train_unlabel", kinds=("idx", "lst"))
    assert names(out) == {*ALWAYS, *files_of("train", "val"), *subsets}
    assert (out / "classes.txt").read_text() == "ant\nbee\ncat\n"
    rows = {stem: read_split(out, stem) for stem in ("train", "train_label", "val")}
    assert [row[0] for row in rows["train"] + rows["val"]] == list(range(24 + 6))
    for stem, folder in (("train", "train"), ("train_label", "train"), ("val", "val")):
        for _, label, key, image in rows[stem]:
            assert image == (tree / folder / key).read_bytes()
            assert CLASSES[int(label)] == key.partition("/")[0]
    every = {f"{path.parent.name}/{path.name}" for path in (tree / "train").rglob("*.*")}
    assert {row[2] for row in rows["train"]} == every
    assert read_split(out, "train_unlabel") == rows["train"]
    assert Counter(row[1] for row in rows["train_label"]) == {0.0: 2, 1.0: 2, 2.0: 2}
    # Shuffled: sorted labels would change twice over the 24 records.
    labels = [row[1] for row in rows["train"]]
    assert sum(a != b for a, b in itertools.pairwise(labels)) > 6
    *lines, total = done.stdout.splitlines()
    assert lines == [
        "train: 24 records, 8 a class, 1 shards",
        "labeled: 6 records, 2 a class, 1 shards",
        "unlabeled: 24 records, 8 a class, 1 shards",
        "val: 6 records, 2 a class, 1 shards",
    ]
    size = sum(path.stat().st_size for path in out.glob("*.rec"))
    assert total.startswith(f"out/rec: 30 records, 3 classes, {size} bytes in 2 shards, ")
    again = run("pack", "--src", "train", "--val", "val", "--out", "out/rec", "--labeled", "6",
                folder=tree)  # fmt: skip
    assert "already complete" in again.stdout


def test_nine_files_of_the_separate_layout(tree: Path, tmp_path: Path) -> None:
    out = pack("--src", tree / "train", "--val", tree / "val", "--labeled", "6", "--shards", 1,
               "--layout", "separate", out=tmp_path / "out")  # fmt: skip
    stems = ("train_label", "train_unlabel", "val")
    assert names(out) == {*ALWAYS, *files_of(*stems)}
    rows = {stem: read_split(out, stem) for stem in stems}
    assert [row[0] for stem in stems for row in rows[stem]] == list(range(6 + 24 + 6))
    for stem, folder in zip(stems, ("train", "train", "val"), strict=True):
        for _, _, key, image in rows[stem]:
            assert image == (tree / folder / key).read_bytes()
    assert {row[2] for row in rows["train_label"]} < {row[2] for row in rows["train_unlabel"]}
    assert list(read_manifest(out).splits) == ["labeled", "unlabeled", "val"]


def test_manifest_and_table_tell_the_truth(tree: Path, tmp_path: Path) -> None:
    done = run("pack", "--src", tree / "train", "--val", tree / "val", "--labeled", 7,
               "--shards", 3, "--json", "--out", tmp_path / "out")  # fmt: skip
    out = tmp_path / "out"
    stored = manifest_of(out)
    assert json.loads(done.stdout) == stored
    assert done.stderr == ""
    assert stored["format"] == "mpl_fast.rec/2"
    assert stored["options"]["labeled"] == "7"
    assert stored["totals"]["images"] == 30
    assert stored["bad"] == []
    for entry in (*stored["splits"].values(), *stored["shards"]):
        for kind in {"idx", "lst"} & entry.keys():
            content = (out / entry[kind]).read_bytes()
            assert hashlib.sha256(content).hexdigest() == entry[f"{kind}_sha256"]
    for shard in stored["shards"]:
        content = (out / shard["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == shard["sha256"]
        assert len(content) == shard["bytes"]
    labeled = stored["splits"]["labeled"]
    assert (labeled["per_class_min"], labeled["per_class_max"]) == (2, 3)
    assert sum(shard["multipart"] for shard in stored["shards"]) == 1
    images = [path for path in tree.rglob("*.*") if path.is_file()]
    assert stored["totals"]["bytes_in"] == sum(path.stat().st_size for path in images)
    manifest = read_manifest(out)
    assert manifest.classes == CLASSES
    assert {name: split.records for name, split in manifest.splits.items()} == {
        "train": 24, "labeled": 7, "unlabeled": 24, "val": 6}  # fmt: skip
    with closing(sqlite3.connect(out / "records.sqlite")) as table:
        rows = table.execute(
            "SELECT records.id, path, offset, written.size FROM records JOIN written USING (id)"
        )
        places = {number: row for number, *row in rows}
    assert len(places) == 30
    for shard in stored["shards"]:
        content = (out / shard["file"]).read_bytes()
        folder = tree / ("train" if shard["prefix"] == "train" else "val")
        for number in range(shard["first_id"], shard["first_id"] + shard["records"]):
            path, offset, size = places[number]
            image = read_record(content, offset)[24:]
            assert image == (folder / path).read_bytes()
            assert len(image) == size


def test_shards_hold_local_indexes(tree: Path, tmp_path: Path) -> None:
    out = pack("--src", tree / "train", "--labeled", 6, "--shards", 3, out=tmp_path / "out")
    one = pack("--src", tree / "train", "--labeled", 6, out=tmp_path / "one")
    joined = b""
    for number in range(3):
        stem = f"train-{number:05d}-of-00003"
        content = (out / f"{stem}.rec").read_bytes()
        joined += content
        for line in (out / f"{stem}.idx").read_text().splitlines():
            record_id, offset = map(int, line.split("\t"))
            assert struct.unpack_from("<Q", read_record(content, offset), 8) == (record_id,)
    # Cutting into shards moves no byte: joined, they are the one file.
    assert joined == (one / "train.rec").read_bytes()
    assert (out / "train.idx").read_bytes() == (one / "train.idx").read_bytes()
    assert read_split(out, "train_label") == read_split(one, "train_label")
    # The same by their size: three shards of a third.
    size = (sum(path.stat().st_size for path in (tree / "train").rglob("*.*")) + 2) // 3
    by_size = pack("--src", tree / "train", "--labeled", 6, "--shard-size", size,
                   out=tmp_path / "size")  # fmt: skip
    assert {path.read_bytes() for path in by_size.glob("*.rec")} == {
        path.read_bytes() for path in out.glob("*.rec")
    }


def test_bytes_do_not_depend_on_processes(tree: Path, tmp_path: Path) -> None:
    common = ("--src", tree / "train", "--val", tree / "val", "--labeled", "50%", "--shards", 2)
    ways = {"1": ("-j", 1), "2": ("-j", 2, "--read-threads", 3), "9": ("-j", 9)}
    for name, way in ways.items():  # 9 are more than there are shards
        pack(*common, *way, out=tmp_path / name)
    assert hashes(tmp_path / "1") == hashes(tmp_path / "2") == hashes(tmp_path / "9")
    other = pack(*common, "--shuffle-seed", 1, out=tmp_path / "other")
    assert {row[2] for row in read_split(other, "train_label")} == {
        row[2] for row in read_split(tmp_path / "1", "train_label")
    }
    assert hashes(other)["train.lst"] != hashes(tmp_path / "1")["train.lst"]


def test_dali_decodes_every_record(tree: Path, tmp_path: Path) -> None:
    dali = pytest.importorskip("nvidia.dali")
    fn = pytest.importorskip("nvidia.dali.fn")
    out = pack("--src", tree / "train", "--labeled", 3, "--shards", 4, out=tmp_path / "out")
    for name, stem in (("unlabeled", "train_unlabel"), ("labeled", "train_label")):
        split = read_manifest(out).splits[name]
        pipeline = dali.Pipeline(batch_size=split.records, num_threads=1, device_id=None)
        with pipeline:
            content, label = fn.readers.mxnet(
                path=[str(path) for path in split.shards],
                index_path=[str(split.index)],
                name="reader",
            )
            pipeline.set_outputs(content, label, fn.decoders.image(content, device="cpu"))
        pipeline.build()
        contents, labels, images = pipeline.run()
        rows = read_split(out, stem)
        assert pipeline.epoch_size("reader") == split.records == len(rows)
        for row, (_, number, key, image) in enumerate(rows):
            assert contents.at(row).tobytes() == image
            assert labels.at(row)[0] == number
            shape = (9, 7, 3) if image.startswith(b"\x89PNG") else (12, 12, 3)
            assert images.at(row).shape == shape
            assert key.startswith(CLASSES[int(number)])


def test_dry_run_counts_what_is_packed_then(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    common = ("--src", tree / "train", "--val", tree / "val", "--labeled", 7, "--shards", 2,
              "--unlabeled", "rest", "--out", out)  # fmt: skip
    told = json.loads(run("pack", *common, "--dry-run", "--json").stdout)
    lines = run("pack", *common, "--dry-run").stdout.splitlines()
    assert lines[-1] == "dry run: nothing was written"
    assert "unlabeled: 17 records, 5 to 6 a class" in lines
    assert not out.exists()
    run("pack", *common)
    stored = manifest_of(out)
    counted = ("records", "per_class_min", "per_class_max")
    assert told["splits"] == {
        name: {key: split[key] for key in counted} for name, split in stored["splits"].items()
    }
    assert [(shard["file"], shard["records"]) for shard in told["shards"]] == [
        (shard["file"], shard["records"]) for shard in stored["shards"]
    ]
    assert told["images"] == stored["totals"]["images"] == 30
    assert told["bytes_in"] == stored["totals"]["bytes_in"]
    written = sum(path.stat().st_size for path in out.glob("*.[ril][eds][cxt]"))
    assert stored["totals"]["bytes_out"] < written <= told["bytes_out_at_most"]


def test_quiet_and_help(tree: Path, tmp_path: Path) -> None:
    done = run("pack", "--src", tree / "train", "--out", tmp_path / "o", "--labeled", 6, "--quiet")
    assert (done.stdout, done.stderr) == ("", "")
    overview = run("--help").stdout
    assert all(f"\n    {command} " in overview for command in COMMANDS)
    for command in COMMANDS:
        text = run(command, "--help").stdout
        assert text.startswith(f"usage: make_rec {command} ")
        assert "--json" in text
    script = f"import sys; sys.argv = ['x']; sys.path.insert(0, {str(TOOL.parent)!r})\n"
    heavy = {"numpy", "cv2", "torch", "nvidia", "simplejpeg", "ray"}
    script += f"import make_rec; print({heavy} & set(sys.modules))"
    done_import = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done_import.stdout == "set()\n"


def test_names_that_are_not_utf8(tree: Path, tmp_path: Path) -> None:
    folder = os.fsencode(tree / "train" / "b") + b"\xe9te"
    os.rename(tree / "train" / "bee", folder)  # noqa: PTH104 (bytes)
    archive = tmp_path / os.fsdecode(b"\xe9.tgz")
    with tarfile.open(archive, "w:gz", errors="surrogateescape") as tar:
        tar.add(tree / "train", "train")
    out = tmp_path / os.fsdecode(b"o\xe9t")
    common = ("--src", f"{archive}:train", "--labeled", 6, "--out", out)
    run("pack", *common, "--quiet")
    assert (out / "classes.txt").read_bytes() == b"ant\nb\xe9te\ncat\n"
    assert read_manifest(out).classes == ("ant", "b\udce9te", "cat")
    assert {row[2] for row in read_split(out, "train")} >= {"b\udce9te/0.jpg", "ant/0.jpg"}
    done = subprocess.run(
        [sys.executable, TOOL, "pack", *map(os.fspath, map(str, common))],
        env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"},  # as where a UTF-8 locale is set
        capture_output=True,
        check=True,
    )
    assert done.stdout.startswith(os.fsencode(out) + b": already complete")


def test_nine_files_from_the_imagenet_sample(shared_data: Path, tmp_path: Path) -> None:
    archive, out = shared_data / "imagenet-1000.tar", tmp_path / "out"
    common = ("--src", archive, "--val", archive, "--out", out, "--layout", "separate",
              "--shards", 1)  # fmt: skip
    line = refuse(*common, status=2)
    assert "--labeled 10%: 100 labeled images for 1000 classes leave 900 classes" in line
    assert not out.exists()
    run("pack", *common, "--labeled", 1000)
    assert names(out) == {*ALWAYS, *files_of("train_label", "train_unlabel", "val")}
    for stem in ("train_label", "train_unlabel", "val"):
        rows = read_split(out, stem)
        assert sorted(row[1] for row in rows) == list(range(1000))
        assert all(simplejpeg.is_jpeg(row[3]) for row in rows)
    assert manifest_of(out)["duplicates"]["across_splits"] == 1000
