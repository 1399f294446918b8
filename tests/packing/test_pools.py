"""Images without labels, from --unlabeled-src or with label -1: packed, listed, found, split."""

import os
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nvidia.dali import fn, pipeline_def, types

from mpl_fast.data.manifest import read_manifest
from mpl_fast.errors import DataError
from mpl_fast.packing.options import PackOptions, SplitOptions
from mpl_fast.packing.plan.table import TABLE
from mpl_fast.packing.resplit import resplit
from tests.packing.packs import (
    CLASSES,
    KEEP,
    Planned,
    hashes,
    image_tree,
    jpeg,
    make_records,
    make_tar,
    make_tree,
    manifest_of,
    pack,
    plan_work,
    read_split,
    refuse,
    run,
    verified,
)
from tests.packing.test_resplit import contents

FILES = {f"{number}.jpg": jpeg(5000 + number) for number in range(4)}  # flat
FILES |= {f"a/b/c/{number}.jpg": jpeg(6000 + number) for number in range(3)}
FILES |= {"ant/0.jpg": jpeg(6100)}  # a folder named as a class


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """train/ (3 classes of 8), val/ (3 classes of 2) and pool/, 8 images in folders of any kind."""
    tree = image_tree(tmp_path)
    make_tree(tree / "pool", FILES)
    return tree


def common(tree: Path, *more: object) -> tuple[object, ...]:
    return ("--src", tree / "train", "--val", tree / "val", *more)


def packed_pool(tree: Path, out: Path, *more: object) -> Path:
    return pack(*common(tree, "--unlabeled-src", tree / "pool", *more), out=out)


def unlabeled(out: Path) -> dict[str, bytes]:
    """Return the unlabeled images that have no label."""
    return {key: image for _, label, key, image in read_split(out, "train_unlabel") if label == -1}


def write_kind(tmp_path: Path, kind: str) -> tuple[Path, dict[str, bytes]]:
    """Write the pool as a source of some kind; return it, and its images by their paths in it."""
    pool = make_tree(tmp_path / "images", FILES)
    if kind == "folder":
        return pool, FILES
    if kind in ("tar", "tar.gz"):
        path = tmp_path / f"pool.{kind}"
        return make_tar(path, FILES.items(), "w:gz" if kind == "tar.gz" else "w"), FILES
    if kind == "folder of a tar":
        members = [(f"all/in/{name}", image) for name, image in FILES.items()]
        make_tar(tmp_path / "pool.tar", [*members, ("all/other/x.jpg", jpeg(1))])
        return tmp_path / "pool.tar:all/in", FILES
    if kind in ("paths", "list with labels"):
        row = "{}" if kind == "paths" else "7\t3.5\tsome\t{}"  # whatever stands there is not read
        lines = "".join(f"{row.format(name)}\n" for name in FILES)
        make_tree(pool, {"pool.lst": lines.encode()})
        return pool / "pool.lst", FILES
    labels = 5.0 if kind == "records" else -1.0
    rows = [(labels, number, image) for number, image in enumerate(FILES.values(), 100)]
    path = make_records(tmp_path / "pool.rec", rows)
    if kind == "records with two labels":
        for number, image in ((1, jpeg(1)), (2, jpeg(2))):
            payload = struct.pack("<IfQQ2f", 2, 0.0, number, 0, 4.0, 9.0) + image
            head = struct.pack("<II", 0xCED7230A, len(payload))
            path.write_bytes(path.read_bytes() + head + payload + bytes(-len(payload) % 4))
            rows.append((0.0, number, image))
    return path, {f"{number}.jpg": image for _, number, image in rows}


@pytest.mark.parametrize(
    "kind",
    [
        *("folder", "tar", "tar.gz", "folder of a tar", "paths", "list with labels"),
        *("records", "records with label -1", "records with two labels"),
    ],
)
def test_a_pool_may_be_any_source(tmp_path: Path, kind: str) -> None:
    tree = image_tree(tmp_path)
    source, images = write_kind(tmp_path, kind)
    args = common(tree, "--unlabeled-src", source)
    done = run("pack", *args, "--out", tmp_path / "out")
    assert "warning" not in done.stderr
    out = tmp_path / "out"
    assert unlabeled(out) == images
    assert (out / "classes.txt").read_text().split() == list(CLASSES)
    labeled = read_split(out, "train_label")
    assert len(labeled) == 24 and {label for _, label, _, _ in labeled} == {0, 1, 2}
    assert {label for _, label, _, _ in read_split(out, "val")} == {0, 1, 2}
    splits = manifest_of(out)["splits"]
    assert "with_label" not in splits["labeled"] and "with_label" not in splits["val"]
    for name in ("train", "unlabeled"):
        assert splits[name]["records"] == 24 + len(images)
        assert splits[name]["with_label"] == 24
        assert splits[name]["per_class_min"] == splits[name]["per_class_max"] == 8
    assert [s.get("unlabeled", False) for s in manifest_of(out)["sources"]] == [False, False, True]
    assert not verified(out, deep=True).problems


@pytest.mark.parametrize("layout", ["shared", "separate"])
@pytest.mark.parametrize("which", ["all", "rest"])
def test_splits(tree: Path, tmp_path: Path, layout: str, which: str) -> None:
    """The rest of the labeled source keeps its labels."""
    out = packed_pool(
        tree, tmp_path / "out", "--labeled", 6, "--unlabeled", which, "--layout", layout
    )
    rows = read_split(out, "train_unlabel")
    with_label = 24 if which == "all" else 18
    assert sum(label == -1 for _, label, _, _ in rows) == 8
    assert sum(key.split("/")[0] == CLASSES[int(label)] for _, label, key, _ in rows if label >= 0)
    split = manifest_of(out)["splits"]["unlabeled"]
    assert (split["records"], split["with_label"]) == (with_label + 8, with_label)
    alone = packed_pool(tree, tmp_path / "alone", "--unlabeled", "rest", "--layout", layout)
    split = manifest_of(alone)["splits"]["unlabeled"]
    assert unlabeled(alone) == FILES
    assert (split["records"], split["with_label"], split["per_class_max"]) == (8, 0, 0)
    assert not verified(alone, deep=True).problems


def test_dali_reads_minus_one(tree: Path, tmp_path: Path) -> None:
    out = packed_pool(tree, tmp_path / "out", "--shards", 2)
    split = read_manifest(out).splits["unlabeled"]

    @pipeline_def(batch_size=32, num_threads=1, device_id=None)  # type: ignore[untyped-decorator]
    def pipeline() -> Any:
        paths = [str(path) for path in split.shards]
        _, label = fn.readers.mxnet(path=paths, index_path=[str(split.index)])
        return fn.cast(label, dtype=types.INT64)

    built = pipeline()
    built.build()
    (labels,) = built.run()
    found = np.asarray(labels.as_tensor())[:, 0].tolist()
    assert found == [int(label) for _, label, _, _ in read_split(out, "train_unlabel")]
    assert found.count(-1) == 8


NAMES = [
    "a",
    "B",
    "ant",
    "0",
    "é",
    "x y",
    "'q\"",
    "n01",
    "caf\udce9",
    "train",
    "images",
    "a.jpg",
    ".hid",
]
ENDS = [".jpg", ".JPEG", ".png", ".jpeg"]


@pytest.mark.parametrize("seed", range(20))
def test_any_tree_is_a_pool(tmp_path: Path, seed: int) -> None:
    """The packed paths are those of a plain walk, whatever the folders are called."""
    draw, picture = random.Random(seed), jpeg(0)
    files: dict[str, bytes] = {}
    for number in range(draw.randint(1, 30)):
        folders = [draw.choice(NAMES) for _ in range(draw.randint(0, 4))]
        name = "/".join([*folders, f"{draw.choice(NAMES)}_{number}{draw.choice(ENDS)}"])
        if not any(other.startswith(f"{name}/") for other in files):
            files[name] = picture
    taken = {name for name in files if not any(part.startswith(".") for part in name.split("/"))}
    train = make_tree(tmp_path / "train", {"ant/0.jpg": picture})
    pool = make_tree(tmp_path / "pool", files)
    options = PackOptions(src=(str(train),), unlabeled_src=(str(pool),), out=tmp_path / "out",
                          split=SplitOptions(labeled="all"), image=KEEP, quiet=True)  # fmt: skip
    if not taken:
        with pytest.raises(DataError, match="no image found"):
            plan_work(options)
        return
    plan = Planned(plan_work(options) / TABLE)
    found = [key for key, row in zip(plan.keys, plan.rows, strict=True) if row.label == -1]
    assert len(found) == len(taken) and {*found} == taken
    assert plan.classes == ["ant"] and [row.labeled for row in plan.rows].count(1) == 1


def test_names_that_are_not_utf8(tree: Path, tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9/x.jpg")
    pool = make_tree(tmp_path / "odd", {name: jpeg(0)})
    out = pack(*common(tree, "--unlabeled-src", pool), out=tmp_path / "out")
    assert unlabeled(out) == {name: jpeg(0)}
    assert run("extract", out, name, "--to", tmp_path / "x.jpg").stdout.count(name) == 2
    assert not verified(out).problems


def test_order_of_pools_of_equal_names(tree: Path, tmp_path: Path) -> None:
    """Both images of a name are packed, in an order that no run changes."""
    pools = (make_tree(tmp_path / name, {"n.jpg": jpeg(at)}) for at, name in enumerate("xy"))
    args = common(tree, "--unlabeled-src", *pools, "--order", "list")
    out = pack(*args, out=tmp_path / "out")
    assert [key for _, _, key, _ in read_split(out, "train")][:2] == ["n.jpg", "n.jpg"]
    assert [image for *_, image in read_split(out, "train")][:2] == [jpeg(0), jpeg(1)]
    assert "2 images are called n.jpg; give the id of one: 0 (n.jpg), 1 (n.jpg)" in refuse(
        out, "n.jpg", status=4, command="extract"
    )


def test_parts_processes_and_a_second_run_give_the_same_bytes(tree: Path, tmp_path: Path) -> None:
    make_tar(tmp_path / "more.tar", [(f"{n}.jpg", jpeg(7000 + n)) for n in range(9)])
    args = common(tree, "--unlabeled-src", tree / "pool", tmp_path / "more.tar", "--shards", 3)
    whole = pack(*args, out=tmp_path / "whole", pool=True)
    parts = tmp_path / "parts"
    for part in ("2/2", "1/2"):
        run("pack", *args, "--out", parts, "--part", part)
    changed = refuse(*common(tree), "--labeled", "all", "--out", parts, "--part", "1/2", status=3)
    assert f"unlabeled_src was {[str(args[5]), str(args[6])]}, now None" in changed
    info = run("info", parts).stdout
    assert "more.tar (archive, unlabeled)" in info
    run("finish", parts)
    assert hashes(parts) == hashes(whole)
    assert "already complete" in run("pack", *args, "--out", whole).stdout
    (whole / "train-00001-of-00003.rec").unlink()
    assert "packed again" in run("pack", *args, "--out", whole).stdout
    assert hashes(parts) == hashes(whole)
    other = refuse(*args[:6], "--out", whole, status=3)
    assert "unlabeled_src was" in other


def test_resplit_is_pack(tree: Path, tmp_path: Path) -> None:
    out = packed_pool(tree, tmp_path / "out")
    drawn: dict[str, Any] = {"labeled": "6", "split_seed": 4, "balance": "count"}
    resplit(out, drawn | {"unlabeled": "rest"})
    flags = ("--labeled", 6, "--split-seed", 4, "--unlabeled", "rest")
    assert contents(out) == contents(packed_pool(tree, tmp_path / "new", *flags))
    back = ("--labeled", "all", "--split-seed", 0, "--unlabeled", "all")
    printed = run("resplit", out, *back).stdout
    assert "labeled: 6 records before, 24 now, 8 a class" in printed
    assert "unlabeled: 26 records before, 32 now, 24 of them with a label, 8 a class" in printed
    assert contents(out) == contents(packed_pool(tree, tmp_path / "again"))
    names = tmp_path / "names.txt"
    names.write_text("a/b/c/0.jpg\n")
    assert "fits no image" in refuse(out, "--labeled", names, status=4, command="resplit")


def test_a_record_is_found_by_its_path(tree: Path, tmp_path: Path) -> None:
    out = packed_pool(tree, tmp_path / "out")
    done = run("extract", out, "a/b/c/1.jpg", "--to", tmp_path / "x.jpg").stdout
    assert (tmp_path / "x.jpg").read_bytes() == FILES["a/b/c/1.jpg"]
    assert "label   none\nimage   a/b/c/1.jpg\n" in done
    assert f"source  {tree}/pool/a/b/c/1.jpg\nsplits  train, unlabeled\n" in done
    offset = next(line.split()[1] for line in done.splitlines() if line.startswith("offset"))
    found = run("locate", out, "train.rec", offset, "--json").stdout
    assert '"label": null' in found and '"image": "a/b/c/1.jpg"' in found
    # Beside an image of the pool, one of the training and one of the validation images.
    several = refuse(out, "ant/0.jpg", status=4, command="extract")
    assert "3 images are called ant/0.jpg" in several
    content = bytearray((out / "train.rec").read_bytes())
    content[int(offset) + 40] ^= 1
    (out / "train.rec").write_bytes(content)
    (problem,) = verified(out).problems
    assert (problem.image, problem.source) == ("a/b/c/1.jpg", f"{tree}/pool/a/b/c/1.jpg")


def test_info_and_dry_run(tree: Path, tmp_path: Path) -> None:
    out = packed_pool(tree, tmp_path / "out", "--unlabeled", "rest")
    lines = run("info", out).stdout
    assert " 8 records, none of them with a label, in 1 .rec" in lines
    assert f"source      {tree}/pool (folder, 8 images, " in lines and ", unlabeled)\n" in lines
    args = common(tree, "--unlabeled-src", tree / "pool", "--labeled", 6)
    printed = run("pack", *args, "--out", tmp_path / "dry", "--dry-run").stdout
    assert "labeled: 6 records, 2 a class\n" in printed
    assert "unlabeled: 32 records, 24 of them with a label, 8 a class\n" in printed
    assert not (tmp_path / "dry").exists()


def test_an_image_in_the_same_file_is_packed_once(tree: Path, tmp_path: Path) -> None:
    """The pool is what is left of a folder that has everything."""
    done = run("pack", *common(tree, "--unlabeled-src", tree), "--out", tmp_path / "out")
    assert f"{tree}: 24 of its images are in {tree}/train, too: packed once" in done.stderr
    assert f"{tree}: 6 of its images are in {tree}/val, too: packed once" in done.stderr
    assert unlabeled(tmp_path / "out") == {f"pool/{name}": image for name, image in FILES.items()}
    pools = ("--unlabeled-src", tree / "pool/a", tree / "pool")
    done = run("pack", *common(tree, *pools), "--out", tmp_path / "both")
    assert f"{tree}/pool: 3 of its images are in {tree}/pool/a, too: packed once" in done.stderr
    assert unlabeled(tmp_path / "both").keys() == {name.removeprefix("a/") for name in FILES}
    # A list of the labeled ones, and the folder of all.
    lines = [f"{n}\t{n % 2}\tpool/{n}.jpg" for n in range(4)]
    make_tree(tree, {"some.lst": "\n".join(lines).encode()})
    out = pack("--src", tree / "some.lst", "--unlabeled-src", tree / "pool", out=tmp_path / "list")
    assert len(read_split(out, "train_label")) == 4
    assert unlabeled(out).keys() == {name for name in FILES if "/" in name}
    # One part of an archive, and all of it; the same archive under another name.
    members = [(f"{folder}/ant/{n}.jpg", jpeg(9 * n)) for folder in "xy" for n in range(3)]
    archive = make_tar(tmp_path / "all.tar", members)
    (tmp_path / "link.tar").symlink_to(archive)
    out = pack("--src", f"{archive}:x", "--unlabeled-src", tmp_path / "link.tar", "--quiet",
               out=tmp_path / "tar")  # fmt: skip
    assert unlabeled(out).keys() == {f"y/ant/{n}.jpg" for n in range(3)}
    line = refuse(*common(tree, "--unlabeled-src", tree / "val"), "--out", out, status=4)
    assert line.endswith("/val: all its images are other sources': leave it out")


def test_equal_images_are_counted(tree: Path, tmp_path: Path) -> None:
    twins = {"x.jpg": (tree / "train/bee/1.jpg").read_bytes(), "y.jpg": jpeg(3), "z.jpg": jpeg(3)}
    twins["v.jpg"] = (tree / "val/bee/1.jpg").read_bytes()
    pool = make_tree(tmp_path / "twins", twins)
    done = run("pack", *common(tree, "--unlabeled-src", pool), "--out", tmp_path / "out")
    assert (
        "6 images are there more than once, in 3 groups, 1 of them in training and validation "
        "both, 2 of them with a label and without one: "
    ) in done.stderr
    assert "bee/1.jpg (train) = x.jpg (train)" in done.stderr
    assert manifest_of(tmp_path / "out")["duplicates"]["with_and_without_label"] == 2


def test_label_minus_one_in_a_source(tree: Path, tmp_path: Path) -> None:
    """Those images are unlabeled, with a message; a pack is packed again from its own files."""
    lines = [f"{n}\t{n % 2 if n < 3 else -1}\tpool/{n}.jpg" for n in range(4)]
    make_tree(tree, {"some.lst": "\n".join(lines).encode()})
    done = run("pack", "--src", tree / "some.lst", "--labeled", "all", "--out", tmp_path / "one")
    warning = f"{tree}/some.lst: 1 image has no label (-1): unlabeled images only"
    assert warning in done.stderr
    assert unlabeled(tmp_path / "one").keys() == {"pool/3.jpg"}
    first = packed_pool(tree, tmp_path / "first")
    second = pack("--src", first / "train.rec", "--val", first / "val.rec", "--labeled", "all",
                  out=tmp_path / "second")  # fmt: skip
    assert {r[1:] for r in read_split(first, "train")} == {
        r[1:] for r in read_split(second, "train")
    }
    for split in ("labeled", "unlabeled"):
        counts = (manifest_of(out)["splits"][split] for out in (first, second))
        assert len({(c["records"], c.get("with_label")) for c in counts}) == 1


def test_bad_input_is_one_line(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make_tree(tmp_path / "tab", {"a\tb/c/0.jpg": jpeg(0)})
    make_tree(tmp_path / "text", {"a/b.txt": b"x"})
    twice = make_tar(tmp_path / "twice.tar", [("a/0.jpg", jpeg(0)), ("a/0.jpg", jpeg(1))])
    none = make_tree(tree, {"none.lst": b"0\t-1\tpool/0.jpg\n"}) / "none.lst"
    for arguments, status, words in (
        (("--unlabeled-src", ""), 4, "--unlabeled-src: its value is empty"),
        (("--unlabeled-src", "nowhere"), 4, "nowhere: no such folder or file"),
        (("--unlabeled-src", tmp_path / "text"), 4, "text: no image found"),
        (("--unlabeled-src", tmp_path / "tab"), 4, "has a tab or line break in its name"),
        (("--unlabeled-src", twice), 4, "1 name occurs more than once in one source: a/0.jpg"),
        (("--unlabeled-src", tmp_path), 2, f"--out {out}: is inside the source {tmp_path}"),
        (("--val", none), 4, "pool/0.jpg: has no label (-1), which validation images need"),
        (("--src", none), 4, "none of its images has a label"),
    ):  # fmt: skip
        given = arguments if arguments[0] == "--src" else ("--src", tree / "train", *arguments)
        assert words in refuse(*given, "--out", out, status=2 if "empty" in words else status)
    bad = make_tree(tmp_path / "bad", {"deep/er/0.jpg": jpeg(0)[:-9]})
    line = refuse(*common(tree, "--unlabeled-src", bad), "--out", out, status=4)
    assert f"{bad}/deep/er/0.jpg: cut short" in line
    done = pack(
        *common(tree, "--unlabeled-src", bad, tree / "pool"), "--on-bad", "skip", "--force", out=out
    )
    assert [entry["image"] for entry in manifest_of(done)["bad"]] == ["deep/er/0.jpg"]
    assert unlabeled(done) == FILES


def test_labels_files_are_not_for_pools(tree: Path, tmp_path: Path) -> None:
    flat = make_tree(tmp_path / "flat", {f"{n}.jpg": jpeg(n) for n in range(4)})
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"{n}.jpg {CLASSES[n % 2]}\n" for n in range(4)))
    out = pack("--src", flat, "--labels", labels, "--unlabeled-src", tree / "pool",
               out=tmp_path / "out")  # fmt: skip
    assert unlabeled(out) == FILES
    assert (out / "classes.txt").read_text() == "ant\nbee\n"


def test_a_plan_without_pools_is_as_before(tree: Path, tmp_path: Path) -> None:
    out = pack(*common(tree), "--labeled", 6, out=tmp_path / "out")
    assert "unlabeled_src" not in manifest_of(out)["options"]
    assert not any("with_label" in split for split in manifest_of(out)["splits"].values())
    assert min(row.label for row in Planned(out / "records.sqlite").rows) == 0
