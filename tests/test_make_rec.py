"""tools/make_rec.py as a user runs it: every image lands in the records, as it is."""

import hashlib
import itertools
import json
import os
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import simplejpeg

from mpl_fast.data.manifest import read_manifest
from tests.pack_command import (
    CLASSES,
    DATA,
    TOOL,
    make_tree,
    names,
    read_record,
    read_split,
    refuse,
    run,
    sizes_and_hashes,
)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return make_tree(tmp_path)


def test_pack_holds_every_image(tree: Path, tmp_path: Path) -> None:
    done = run("pack", "--src", "train", "--val", "val", "--out", "out/rec", "--labeled", "6",
               folder=tree)  # fmt: skip
    out = tree / "out" / "rec"
    splits = ("train_label", "train_unlabel", "val")
    files = {f"{split}.{suffix}" for split in splits for suffix in ("rec", "idx", "lst")}
    assert names(out) == {*files, "classes.txt", "manifest.json", ".lock"}
    assert (out / "classes.txt").read_text() == "ant\nbee\ncat\n"
    rows = {split: read_split(out, split) for split in splits}
    assert [row[0] for split in splits for row in rows[split]] == list(range(6 + 24 + 6))
    for split, folder in zip(splits, ("train", "train", "val"), strict=True):
        for _, label, key, image in rows[split]:
            assert image == (tree / folder / key).read_bytes()
            assert CLASSES[int(label)] == key.partition("/")[0]
    every = {f"{p.parent.name}/{p.name}" for p in (tree / "train").rglob("*.*")}
    assert {row[2] for row in rows["train_unlabel"]} == every
    assert Counter(row[1] for row in rows["train_label"]) == {0.0: 2, 1.0: 2, 2.0: 2}
    # Shuffled: sorted labels would change twice over the 24 records.
    labels = [row[1] for row in rows["train_unlabel"]]
    assert sum(a != b for a, b in itertools.pairwise(labels)) > 6
    assert done.stdout.splitlines()[:3] == [
        f"labeled: 6 records, 2 a class, {(out / 'train_label.rec').stat().st_size} bytes, "
        "1 shards",
        f"unlabeled: 24 records, 8 a class, {(out / 'train_unlabel.rec').stat().st_size} bytes, "
        "1 shards",
        f"val: 6 records, 2 a class, {(out / 'val.rec').stat().st_size} bytes, 1 shards",
    ]
    assert done.stdout.splitlines()[3].startswith("out/rec: 36 records, 3 classes, ")


def test_manifest_tells_the_truth(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("pack", "--src", tree / "train", "--out", out, "--labeled", "7", "--shards", 3)
    stored = json.loads((out / "manifest.json").read_text())
    assert stored["format"] == "mpl_fast.rec/1"
    assert list(stored["splits"]) == ["labeled", "unlabeled"]
    assert stored["options"]["labeled"] == "7"
    assert stored["totals"]["images"] == 31
    for split in stored["splits"].values():
        for name in ("idx", "lst"):
            content = (out / split[name]).read_bytes()
            assert hashlib.sha256(content).hexdigest() == split[f"{name}_sha256"]
        for shard in split["shards"]:
            content = (out / shard["file"]).read_bytes()
            assert hashlib.sha256(content).hexdigest() == shard["sha256"]
            assert len(content) == shard["bytes"]
    labeled, unlabeled = stored["splits"].values()
    assert (labeled["per_class_min"], labeled["per_class_max"]) == (2, 3)
    assert [shard["records"] for shard in labeled["shards"]] == [2, 2, 3]
    assert sum(shard["multipart"] for shard in unlabeled["shards"]) == 1
    assert stored["totals"]["bytes_out"] == sum(p.stat().st_size for p in out.glob("*.rec"))
    keys = [row[2] for row in read_split(out, "train_label") + read_split(out, "train_unlabel")]
    read = sum((tree / "train" / key).stat().st_size for key in keys)
    assert stored["totals"]["bytes_in"] == read
    manifest = read_manifest(out)
    assert manifest.classes == CLASSES
    assert manifest.splits["unlabeled"].records == 24


def test_shards_hold_local_indexes(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("pack", "--src", tree / "train", "--out", out, "--labeled", "6", "--shards", 3)
    run("pack", "--src", tree / "train", "--out", tmp_path / "one", "--labeled", "6")
    joined = b""
    for number in range(3):
        stem = f"train_unlabel-{number:05d}-of-00003"
        content = (out / f"{stem}.rec").read_bytes()
        joined += content
        for line in (out / f"{stem}.idx").read_text().splitlines():
            record_id, offset = map(int, line.split("\t"))
            assert struct.unpack_from("<Q", read_record(content, offset), 8) == (record_id,)
    # Cutting into shards moves no byte: joined, they are the one file.
    assert joined == (tmp_path / "one" / "train_unlabel.rec").read_bytes()
    assert names(out) >= {"train_label.idx", "train_unlabel.idx", "train_label.lst"}
    assert (out / "train_unlabel.idx").read_text() == (
        tmp_path / "one" / "train_unlabel.idx"
    ).read_text()


def test_bytes_do_not_depend_on_processes(tree: Path, tmp_path: Path) -> None:
    common = ("--src", tree / "train", "--val", tree / "val", "--labeled", "50%", "--shards", 4)
    for processes in (1, 3):
        run("pack", *common, "-j", processes, "--out", tmp_path / f"{processes}")
    assert sizes_and_hashes(tmp_path / "1") == sizes_and_hashes(tmp_path / "3")
    run("pack", *common, "--shuffle-seed", 1, "--out", tmp_path / "other")
    assert {row[2] for row in read_split(tmp_path / "other", "train_label")} == {
        row[2] for row in read_split(tmp_path / "1", "train_label")
    }
    other, first = sizes_and_hashes(tmp_path / "other"), sizes_and_hashes(tmp_path / "1")
    assert other["train_label.lst"] != first["train_label.lst"]


def test_dali_decodes_every_record(tree: Path, tmp_path: Path) -> None:
    dali = pytest.importorskip("nvidia.dali")
    fn = pytest.importorskip("nvidia.dali.fn")
    out = tmp_path / "out"
    run("pack", "--src", tree / "train", "--out", out, "--labeled", "6", "--shards", 3)
    split = read_manifest(out).splits["unlabeled"]
    pipeline = dali.Pipeline(batch_size=24, num_threads=1, device_id=None)
    with pipeline:
        content, label = fn.readers.mxnet(
            path=[str(path) for path in split.shards],
            index_path=[str(split.index)],
            name="reader",
        )
        pipeline.set_outputs(content, label, fn.decoders.image(content, device="cpu"))
    pipeline.build()
    contents, labels, images = pipeline.run()
    assert pipeline.epoch_size("reader") == split.records == 24
    for row, (_, label, key, image) in enumerate(read_split(out, "train_unlabel")):
        assert contents.at(row).tobytes() == image
        assert labels.at(row)[0] == label
        assert images.at(row).shape == ((9, 7, 3) if image.startswith(b"\x89PNG") else (12, 12, 3))
        assert key.startswith(CLASSES[int(label)])


def test_rest_leaves_the_labeled_images_out(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("pack", "--src", tree / "train", "--out", out, "--labeled", "25%", "--unlabeled", "rest")
    labeled = {row[2] for row in read_split(out, "train_label")}
    unlabeled = {row[2] for row in read_split(out, "train_unlabel")}
    assert (len(labeled), len(unlabeled), labeled & unlabeled) == (6, 18, set())


def test_listed_labels(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("ant/3.jpg\nbee/1.jpg\n1.JPEG\n")
    out = tmp_path / "out"
    run("pack", "--src", tree / "train", "--out", out, "--labeled", tmp_path / "list.txt")
    keys = {row[2] for row in read_split(out, "train_label")}
    assert keys == {"ant/3.jpg", "bee/1.jpg", "cat/1.JPEG"}


def test_names_that_are_not_utf8(tree: Path, tmp_path: Path) -> None:
    folder = os.fsencode(tree / "train" / "b") + b"\xe9te"
    os.rename(tree / "train" / "bee", folder)  # noqa: PTH104 (bytes)
    run("pack", "--src", tree / "train", "--out", tmp_path / "out", "--labeled", "6")
    assert (tmp_path / "out" / "classes.txt").read_bytes() == b"ant\nb\xe9te\ncat\n"
    assert read_manifest(tmp_path / "out").classes == ("ant", "b\udce9te", "cat")


@pytest.mark.skipif(not DATA.is_dir(), reason="shared data sets are absent")
def test_cifar10(tmp_path: Path) -> None:
    archive, out = DATA / "cifar10-jpeg.tar.xz", tmp_path / "out"
    run("pack", "--src", f"{archive}:train", "--val", f"{archive}:test", "--labeled", 4000,
        "--out", out)  # fmt: skip
    manifest = read_manifest(out)
    records = {name: split.records for name, split in manifest.splits.items()}
    assert records == {"labeled": 4000, "unlabeled": 50000, "val": 10000}
    assert manifest.classes[0] == "airplane"
    labels = Counter(row[1] for row in read_split(out, "train_label"))
    assert labels == dict.fromkeys(map(float, range(10)), 400)
    assert len({row[3] for row in read_split(out, "val")}) > 9990  # images, hardly any twice


@pytest.mark.skipif(not DATA.is_dir(), reason="shared data sets are absent")
def test_imagenet_sample(tmp_path: Path) -> None:
    archive, out = DATA / "imagenet-1000.tar", tmp_path / "out"
    common = ("--src", archive, "--out", out)
    line = refuse(*common, status=2)
    assert "--labeled 10%: 100 labeled images for 1000 classes leave 900 classes" in line
    run("pack", *common, "--labeled", 1000, "--shards", 2)
    rows = read_split(out, "train_unlabel")
    assert sorted(row[1] for row in rows) == list(range(1000))
    assert all(simplejpeg.is_jpeg(row[3]) for row in rows)


def test_out_that_is_not_utf8(tree: Path, tmp_path: Path) -> None:
    name = os.fsdecode(b"o\xe9t")
    common = ("--src", tree / "train", "--out", tmp_path / name, "--labeled", "6")
    run("pack", *common, "--quiet")
    done = subprocess.run(
        [sys.executable, TOOL, "pack", *common],
        env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"},  # as where a UTF-8 locale is set
        capture_output=True,
        check=True,
    )
    assert done.stdout == os.fsencode(tmp_path) + b"/o\xe9t: already complete, nothing to do\n"
