"""make_rec pack from every kind of source: which images the records hold, and what is printed."""

import itertools
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import simplejpeg

from mpl_fast.data.manifest import read_manifest
from tests.packing.packs import (
    CLASSES,
    LIMIT,
    TOOL,
    command_line,
    environment,
    hashes,
    image_tree,
    jpeg,
    make_tar,
    manifest_of,
    names,
    pack,
    png,
    read_split,
    refuse,
    run,
)

COMMANDS = ("pack", "resplit", "verify", "finish", "info", "locate", "extract")
ALWAYS = {"classes.txt", "records.sqlite", "manifest.json", ".lock"}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return image_tree(tmp_path)


def files_of(*stems: str, kinds: tuple[str, ...] = ("rec", "idx", "lst")) -> set[str]:
    return {f"{stem}.{kind}" for stem in stems for kind in kinds}


def images_of(out: Path, stem: str = "train") -> dict[str, bytes]:
    return {key: image for _, _, key, image in read_split(out, stem)}


def images_in(folder: Path) -> dict[str, bytes]:
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in folder.glob("*/*.*")}


def test_shared_layout_holds_every_image_once(tree: Path) -> None:
    # A clock that jumped: neither times to come nor the oldest ones mean anything.
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
    assert {row[2] for row in rows["train"]} == images_in(tree / "train").keys()
    assert read_split(out, "train_unlabel") == rows["train"]
    assert Counter(row[1] for row in rows["train_label"]) == {0.0: 2, 1.0: 2, 2.0: 2}
    # Shuffled: sorted labels would change twice over the 24 records.
    labels = [row[1] for row in rows["train"]]
    assert sum(a != b for a, b in itertools.pairwise(labels)) > 6
    *lines, total = done.stdout.splitlines()
    assert lines == [
        "train: 24 records, 8 a class, 1 shard",
        "labeled: 6 records, 2 a class, 1 shard",
        "unlabeled: 24 records, 8 a class, 1 shard",
        "val: 6 records, 2 a class, 1 shard",
    ]
    size = sum(path.stat().st_size for path in out.glob("*.rec"))
    assert total.startswith(f"out/rec: 30 records, 3 classes, {size} bytes in 2 shards, ")


def test_json_is_the_manifest(tree: Path, tmp_path: Path) -> None:
    done = run("pack", "--src", tree / "train", "--val", tree / "val", "--labeled", 7,
               "--shards", 3, "--json", "--out", tmp_path / "out")  # fmt: skip
    stored = manifest_of(tmp_path / "out")
    assert json.loads(done.stdout) == stored
    assert done.stderr == ""
    assert stored["format"] == "mpl_fast.rec/2"
    assert stored["options"]["labeled"] == "7"
    assert (stored["totals"]["images"], stored["bad"]) == (30, [])
    labeled = stored["splits"]["labeled"]
    assert sum(shard["multipart"] for shard in stored["shards"]) == 1
    assert (labeled["per_class_min"], labeled["per_class_max"]) == (2, 3)
    sizes = [sum(map(len, images_in(tree / part).values())) for part in ("train", "val")]
    sources = [(source["images"], source["bytes"]) for source in stored["sources"]]
    assert sources == [(24, sizes[0]), (6, sizes[1])]
    assert stored["totals"]["bytes_in"] == sum(sizes)
    written = [path.stat().st_size for path in (tmp_path / "out").glob("*.rec")]
    assert stored["totals"]["bytes_out"] == sum(written)
    assert stored["created"].endswith("+00:00")
    manifest = read_manifest(tmp_path / "out")
    assert manifest.classes == CLASSES
    assert {name: split.records for name, split in manifest.splits.items()} == {
        "train": 24, "labeled": 7, "unlabeled": 24, "val": 6}  # fmt: skip


def test_cutting_into_shards_moves_no_byte(tree: Path, tmp_path: Path) -> None:
    common = ("--src", tree / "train", "--labeled", 6)
    out = pack(*common, "--shards", 3, out=tmp_path / "out")
    one = pack(*common, out=tmp_path / "one")
    shards = [path.read_bytes() for path in sorted(out.glob("*.rec"))]
    assert b"".join(shards) == (one / "train.rec").read_bytes()
    assert (out / "train.idx").read_bytes() == (one / "train.idx").read_bytes()
    assert read_split(out, "train_label") == read_split(one, "train_label")
    # The same by their size: three shards of a third.
    size = (sum(map(len, images_in(tree / "train").values())) + 2) // 3
    by_size = pack(*common, "--shard-size", size, out=tmp_path / "size")
    assert [path.read_bytes() for path in sorted(by_size.glob("*.rec"))] == shards


@pytest.mark.slow
def test_bytes_do_not_depend_on_processes(tree: Path, tmp_path: Path) -> None:
    common = ("--src", tree / "train", "--val", tree / "val", "--labeled", "50%", "--shards", 2)
    alone = pack(*common, out=tmp_path / "alone")
    pooled = pack(*common, "-j", 9, "--read-threads", 3, out=tmp_path / "pooled", pool=True)
    assert hashes(pooled) == hashes(alone)
    other = pack(*common, "--shuffle-seed", 1, out=tmp_path / "other")
    assert images_of(other, "train_label") == images_of(alone, "train_label")
    assert hashes(other)["train.lst"] != hashes(alone)["train.lst"]


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
    common = ("pack", "--src", tree / "train", "--val", tree / "val", "--labeled", 7,
              "--shards", 2, "--unlabeled", "rest", "--out", out)  # fmt: skip
    planned = json.loads(run(*common, "--dry-run", "--json").stdout)
    lines = run(*common, "--dry-run").stdout.splitlines()
    assert lines[-1] == f"dry run: nothing was written to {out}"
    assert "unlabeled: 17 records, 5 to 6 a class" in lines
    assert not out.exists()
    run(*common)
    stored = manifest_of(out)
    counted = ("records", "per_class_min", "per_class_max")
    assert planned["splits"] == {
        name: {key: split[key] for key in counted} for name, split in stored["splits"].items()
    }
    assert [(shard["file"], shard["records"]) for shard in planned["shards"]] == [
        (shard["file"], shard["records"]) for shard in stored["shards"]
    ]
    assert planned["images"] == stored["totals"]["images"] == 30
    assert planned["bytes_in"] == stored["totals"]["bytes_in"]
    written = sum(path.stat().st_size for path in out.glob("*.[ril][eds][cxt]"))
    assert stored["totals"]["bytes_out"] < written <= planned["bytes_out_at_most"]


def test_compressed_archive_is_unpacked_after_cheap_checks(tree: Path, tmp_path: Path) -> None:
    files = [(str(path.relative_to(tree)), path.read_bytes()) for path in tree.rglob("*.jpg")]
    archive = make_tar(tmp_path / "all.tar.xz", files, "w:xz")
    common = ("--src", f"{archive}:train", "--out", tmp_path / "out")
    none = tmp_path / "none"
    for more, status, message in (
        (("--labeled", "40x"), 2, "--labeled 40x: give a share (10%)"),
        (("--labeled", "1.2.3%"), 2, "--labeled 1.2.3%: not a share such as 10%"),
        (("--val", none), 4, f"{none}: no such folder or file"),
        (("--labels", none), 4, f"{none}: No such file"),
    ):
        (line,) = run("pack", *common, *more, status=status).stderr.splitlines()
        assert message in line  # and not "unpacking" before
    done = run("pack", *common, "--labeled", 3, "--dry-run")
    assert "unpacking" in done.stderr
    assert "(from a sample; neither the disk nor unpacking is in it)" in done.stdout
    plain = ("--src", tree / "train", "--out", tmp_path / "out", "--labeled", 3)
    assert "(from a sample; the disk is not in it)" in run("pack", *plain, "--dry-run").stdout
    planned = json.loads(run("pack", *common, "--labeled", 3, "--dry-run", "--json").stdout)
    assert planned["unpacked"] == [f"{archive}:train"]
    assert not (tmp_path / "out").exists()


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
    imported = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert imported.stdout == "set()\n"


def test_names_that_are_not_utf8(tree: Path, tmp_path: Path) -> None:
    odd = os.fsdecode(b"\xff %'\"")
    bee = (tree / "train" / "bee").rename(tree / "train" / "b\udce9te")
    (bee / "0.jpg").rename(bee / f"{odd}.jpg")
    archive = tmp_path / os.fsdecode(b"\xe9.tgz")
    with tarfile.open(archive, "w:gz", errors="surrogateescape") as tar:
        tar.add(tree / "train", "train")
    out = tmp_path / os.fsdecode(b"o\xe9t")
    common = ("pack", "--src", f"{archive}:train", "--labeled", 6, "--out", out)
    run(*common, "--quiet")
    assert (out / "classes.txt").read_bytes() == b"ant\nb\xe9te\ncat\n"
    assert read_manifest(out).classes == ("ant", "b\udce9te", "cat")
    assert images_of(out).keys() >= {f"b\udce9te/{odd}.jpg", "ant/0.jpg"}
    done = subprocess.run(
        command_line(*common),
        env=environment() | {"PYTHONIOENCODING": "utf-8:strict"},  # as where a UTF-8 locale is set
        capture_output=True,
        check=True,
        timeout=LIMIT,
    )
    assert done.stdout.startswith(os.fsencode(out) + b": already complete")


@pytest.mark.slow
def test_nine_files_from_the_imagenet_sample(shared_data: Path, tmp_path: Path) -> None:
    archive, out = shared_data / "imagenet-1000.tar", tmp_path / "out"
    common = ("--src", archive, "--val", archive, "--out", out, "--layout", "separate",
              "--shards", 1)  # fmt: skip
    line = refuse(*common, status=2)
    assert (
        "--labeled 10%: 100 labeled images for 1000 classes, so that 900 classes have none" in line
    )
    assert not out.exists()
    run("pack", *common, "--labeled", 1000)
    assert names(out) == {*ALWAYS, *files_of("train_label", "train_unlabel", "val")}
    for stem in ("train_label", "train_unlabel", "val"):
        rows = read_split(out, stem)
        assert sorted(row[1] for row in rows) == list(range(1000))
        assert all(simplejpeg.is_jpeg(row[3]) for row in rows)
    assert manifest_of(out)["duplicates"]["across_splits"] == 1000
    assert list(read_manifest(out).splits) == ["labeled", "unlabeled", "val"]


# Sources.


def test_nested_archive_and_flat_validation(tree: Path, tmp_path: Path) -> None:
    # A tar for each class within a tar, and images in no folder, as ImageNet's.
    tars = []
    for name in CLASSES:
        inner = [(path.name, path.read_bytes()) for path in (tree / "train" / name).iterdir()]
        tars.append((f"{name}.tar", make_tar(tmp_path / name, inner).read_bytes()))
    archive = make_tar(tmp_path / "train.tar", tars)
    files = sorted((tree / "val").rglob("*.jpg"), key=lambda file: (file.name, file.parent.name))
    images = [(f"ILSVRC2012_val_{at:08}.JPEG", file.read_bytes()) for at, file in enumerate(files)]
    val, labels = make_tar(tmp_path / "val.tar", images), tmp_path / "validation_labels.txt"
    labels.write_text("".join(f"{file.parent.name}\n" for file in files))
    out = pack("--src", archive, "--val", val, "--val-labels", labels, "--labeled", 6,
               "--shards", 2, out=tmp_path / "out")  # fmt: skip
    folder = pack("--src", tree / "train", "--val", tree / "val", "--labeled", 6, "--shards", 2,
                  out=tmp_path / "folder")  # fmt: skip
    # Wherever the images come from, the records are the same.
    for name in ("train-00000-of-00002.rec", "train-00001-of-00002.rec", "train_label.idx"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    rows = read_split(out, "val")
    assert sorted((CLASSES[int(row[1])], row[3]) for row in rows) == sorted(
        (key.partition("/")[0], image) for key, image in images_in(tree / "val").items()
    )
    assert all(row[2].partition("/")[2].startswith("ILSVRC2012_val_") for row in rows)


def test_list_and_records(tree: Path, tmp_path: Path) -> None:
    lines = [
        f"{number}\t{2 - CLASSES.index(key.partition('/')[0])}\ttrain/{key}\n"
        for number, key in enumerate(sorted(images_in(tree / "train")))
    ]
    (tmp_path / "train.lst").write_text("".join(lines))
    out = pack("--src", tmp_path / "train.lst", "--root", tree, "--labeled", 6,
               "--order", "list", out=tmp_path / "out")  # fmt: skip
    assert images_of(out) == images_in(tree / "train")
    # The list's labels are kept, and with them the order of the classes.
    assert (out / "classes.txt").read_text() == "cat\nbee\nant\n"
    keys = [row[2] for row in read_split(out, "train")]
    assert keys == sorted(keys, key=lambda key: ("cat bee ant".index(key[:3]), key))
    again = pack("--src", out / "train.rec", "--labeled", 6, "--shards", 3, out=tmp_path / "again")
    assert (again / "classes.txt").read_text() == "cat\nbee\nant\n"
    assert images_of(again) == images_of(out)
    assert {(row[1], row[2]) for row in read_split(again, "train")} == {
        (row[1], row[2]) for row in read_split(out, "train")
    }
    # The draw is by names, so it is the same; the record of two parts is again one.
    assert images_of(again, "train_label") == images_of(out, "train_label")
    assert sum(shard["multipart"] for shard in manifest_of(again)["shards"]) == 1


def test_several_sources_are_joined(tree: Path, tmp_path: Path) -> None:
    more = tmp_path / "more" / "bee"
    more.mkdir(parents=True)
    (more / "new.jpg").write_bytes(jpeg(77))
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        tar.add(tree, "tree")
    out = pack("--src", f"{tmp_path}/all.tar:tree/train", more.parent, "--labeled", 6,
               "--val", f"{tmp_path}/all.tar:tree/val", out=tmp_path / "out")  # fmt: skip
    assert images_of(out) == images_in(tree / "train") | {"bee/new.jpg": jpeg(77)}
    assert images_of(out, "val") == images_in(tree / "val")
    assert [source["images"] for source in manifest_of(out)["sources"]] == [24, 1, 6]


# Images that are damaged, odd or too large.


def damage(train: Path) -> dict[str, str]:
    """Damage images; return a part of each one's reason."""
    large = jpeg(0, 100)
    faults = {
        "ant/0.jpg": (b"", "empty file"),
        "ant/2.jpg": (b"words", "no image by its first bytes"),
        "ant/3.jpg": (large[: len(large) // 2] + large[-2:], "Corrupt JPEG data"),
        "cat/2.png": (png(3)[:-20], "cut short"),
    }
    for key, (content, _) in faults.items():
        (train / key).write_bytes(content)
    return {key: reason for key, (_, reason) in faults.items()}


@pytest.mark.parametrize("layout", ["shared", "separate"])
def test_skipped_labeled_images_are_a_warning(tree: Path, tmp_path: Path, layout: str) -> None:
    common = ("--src", tree / "train", "--labeled", "3", "--layout", layout)
    drawn = read_split(pack(*common, out=tmp_path / "sound"), "train_label")[0][2]
    (tree / "train" / drawn).write_bytes(b"words")
    out = tmp_path / "out"
    done = run("pack", *common, "--on-bad", "skip", "--out", out)
    what = f"labeled images left out as bad: 1 of 3; 1 class has none now ({drawn.split('/')[0]}): "
    assert f"warning: {what}draw more, or repair them" in done.stderr
    assert "1 image was skipped; the manifest names it" in done.stdout
    assert done.stdout.endswith("\nno validation images: training needs --val\n")
    assert "\nno validation images: " in run("pack", *common, "--dry-run", "--out", out).stdout


def test_faulty_images_are_all_named(tree: Path, tmp_path: Path) -> None:
    train, val, out = tree / "train", tree / "val", tmp_path / "out"
    faults = damage(train)
    (val / "ant" / "0.jpg").write_bytes(b"words")
    common = ("--src", train, "--val", val, "--out", out, "--labeled", "12", "--layout", "separate")
    line = refuse(*common, status=4)
    # Once each, although the labeled images are in two files.
    head, _, rest = line.partition(" nothing was published: ")
    assert head.endswith("error: 5 images cannot be used,")
    listed, _, advice = rest.rpartition("; ")
    named = dict(part.split(": ", 1) for part in listed.split("; "))
    assert list(named) == [*(str(train / key) for key in faults), str(val / "ant" / "0.jpg")]
    for key, reason in faults.items():
        assert reason in named[str(train / key)]
    assert advice == (
        "repair or remove them, or leave them out with --on-bad skip, which keeps every "
        "finished shard, or make JPEGs of what can be decoded of them with --on-bad convert"
    )
    assert not out.exists()
    # Looking only at the ends misses what is wrong in the middle, and nothing else.
    line = refuse(*common, "--check", "header", status=4)
    assert "4 images cannot" in line
    assert "ant/3.jpg" not in line
    assert line.endswith("with --on-bad convert --check decode")
    line = refuse(*common, "--check", "none", status=4)
    assert f"1 image cannot be used, nothing was published: {train}/ant/0.jpg: empty file" in line


def test_many_faulty_images_have_a_line_each(tree: Path, tmp_path: Path) -> None:
    bad = [tree / "train" / "ant" / f"bad{number:02d}.jpg" for number in range(15)]
    for path in bad:
        path.write_bytes(b"words")
    common = ("--src", tree / "train", "--out", tmp_path / "out", "--labeled", "6")
    *each, last = run("pack", *common, status=4).stderr.splitlines()
    assert [line.split(": ")[2] for line in each] == list(map(str, bad))
    assert "error: 15 images cannot be used" in last
    assert "published: those in the lines above; repair or remove them" in last
    assert all("no image by its first bytes" in line for line in each)
    assert "convert" not in last  # which would make nothing of them


def test_skip_leaves_gaps_and_the_manifest_names_them(tree: Path, tmp_path: Path) -> None:
    train, out = tree / "train", tmp_path / "out"
    faults = damage(train)
    common = ("--src", train, "--labeled", "12", "--shards", 2, "--out", out)
    done = run("pack", *common, "--on-bad", "skip")
    assert "4 images were skipped; the manifest names them" in done.stdout
    assert images_of(out) == {
        key: image for key, image in images_in(train).items() if key not in faults
    }
    remarks = manifest_of(out)["bad"]
    assert {remark["image"] for remark in remarks} == faults.keys()
    assert all(faults[remark["image"]] in remark["reason"] for remark in remarks)
    assert "already complete" in run("pack", *common, "--on-bad", "skip").stdout
    # A run without --on-bad skip does not pass over what was left out.
    line = refuse(*common, status=3)
    assert "holds a pack that left out 4 images that cannot be used (" in line
    assert line.endswith(
        " and 1 more); --on-bad skip agrees with that, or choose another --out, or --force to "
        "replace it"
    )


def test_convert_keeps_what_can_be_decoded(tree: Path, tmp_path: Path) -> None:
    train, large = tree / "train", jpeg(0, 100)
    (train / "ant" / "3.jpg").write_bytes(large[: len(large) // 2])
    common = ("--src", train, "--labeled", 6, "--on-bad", "convert", "--out", tmp_path / "out")
    done = run("pack", *common)
    bad = {remark["image"]: remark for remark in manifest_of(tmp_path / "out")["bad"]}
    assert {key: remark["action"] for key, remark in bad.items()} == {
        "ant/3.jpg": "converted", "cat/0.jpg": "converted"}  # fmt: skip
    assert bad["cat/0.jpg"]["reason"] == "a PNG named .jpg"
    assert "cut short" in bad["ant/3.jpg"]["reason"]
    assert "2 images were converted; the manifest names them" in done.stdout
    rows = images_of(tmp_path / "out")
    assert len(rows) == 24
    shapes = {key: simplejpeg.decode_jpeg(rows[key]).shape for key in bad}
    assert shapes == {"ant/3.jpg": (100, 100, 3), "cat/0.jpg": (9, 7, 3)}
    for key in rows.keys() - bad.keys():
        assert rows[key] == (train / key).read_bytes()


def test_short_side_only_shrinks(tree: Path, tmp_path: Path) -> None:
    train = tree / "train"
    (train / "ant" / "0.jpg").write_bytes(jpeg(0, 96))
    (train / "ant" / "1.jpg").write_bytes(jpeg(1, 34))
    common = ("--src", train, "--labeled", 6, "--shards", 3, "--short-side", 32)
    out = pack(*common, "--quality", 80, out=tmp_path / "out")
    rows = images_of(out)
    assert simplejpeg.decode_jpeg(rows["ant/0.jpg"]).shape == (32, 32, 3)
    # 34 is less than 1.1 times 32, all others are smaller: their bytes stay.
    for key in rows.keys() - {"ant/0.jpg"}:
        assert rows[key] == (train / key).read_bytes()
    stored = manifest_of(out)
    transform = stored["transform"]
    assert (transform["mode"], transform["short_side"], transform["quality"]) == (
        "short-side", 32, 80)  # fmt: skip
    assert stored["totals"]["reencoded"] == 1
    better = pack(*common, "--quality", 95, "--min-shrink", 1, out=tmp_path / "better")
    assert manifest_of(better)["totals"]["reencoded"] == 2
    assert (better / "train.lst").read_bytes() == (out / "train.lst").read_bytes()
    line = refuse("--out", out, *common, status=3)
    assert "holds another pack (quality was 80, now 90)" in line
