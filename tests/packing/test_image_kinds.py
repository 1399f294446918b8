"""What is an image: files with a known suffix, and those that begin as an image does."""

from pathlib import Path
from unittest import mock

import pytest

from mpl_fast.config import DataConfig
from mpl_fast.data.manifest import read_manifest
from mpl_fast.errors import DataError
from mpl_fast.packing.image_kinds import PEEKED, kind_of
from mpl_fast.packing.sources.class_folders import Entry
from mpl_fast.packing.sources.folder import FolderSource
from tests.data.numbered_images import eval_loader, train_loader
from tests.packing.hazard_images import UNUSABLE, USABLE
from tests.packing.made_sources import keys, listed, opened
from tests.packing.packs import (
    jpeg,
    make_tar,
    make_tree,
    manifest_of,
    pack,
    read_split,
    refuse,
    run,
)
from tests.packing.test_containers import write_zip

DISGUISED = {
    "ant/a.dat": USABLE["png"],
    "ant/without": jpeg(1),
    "ant/d.html": USABLE["webp"],
    "ant/e.txt.old": USABLE["bmp"],
    "bee/B.PNG": USABLE["png gray"],
    "bee/C.JFIF": jpeg(2),
    "bee/f.webp": USABLE["webp alpha"],
    "bee/G.Bmp": USABLE["bmp palette"],
}
OTHERS = {
    "ant/notes.txt": b"BM is how a bitmap begins, II a list\n" * 20,
    "bee/clip.mp4": b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41" + bytes(500),
    "bee/empty": b"",
    "bee/x.npy": b"\x93NUMPY\1\0v\0{'descr': '<f4'}",
}


@pytest.mark.parametrize("form", ["tree", "tar", "zip"])
def test_images_in_any_disguise(tmp_path: Path, form: str) -> None:
    (folder := tmp_path / "in").mkdir()
    files = DISGUISED | OTHERS
    if form == "zip":
        source = write_zip(folder, files)
    elif form == "tar":
        source = str(make_tar(folder / "a.tar", files.items()))
    else:
        source = str(make_tree(folder, files))
    done = run("pack", "--src", source, "--labeled", "all", "--out", tmp_path / "out")
    found = {key: image for *_, key, image in read_split(tmp_path / "out", "train")}
    assert found == DISGUISED
    assert f"{source}: 4 files are not images, left out: " in done.stderr


def test_a_file_with_a_known_suffix_is_not_opened(tmp_path: Path) -> None:
    suffixes = ["bmp", "dib", "gif", "jfif", "jpe", "jpeg", "jpg", "png", "tif", "tiff", "webp"]
    names = [f"ant/1.{suffix}" for suffix in suffixes] + ["ant/2.WebP", "ant/3.JPG"]
    tree = make_tree(tmp_path / "in", dict.fromkeys(["a.gz", *names], b""))
    with mock.patch.object(FolderSource, "_head", return_value=b"") as head:
        assert keys(listed(tree, tmp_path)[1]) == names
    assert [call.args[0].path for call in head.call_args_list] == ["a.gz"]


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    source = opened(make_tree(tmp_path / "in", {"ant/1.jpg": jpeg(1)}), tmp_path)
    assert isinstance(source, FolderSource)
    with pytest.raises(DataError, match=r"in/ant/gone: No such file"):
        source._head(Entry("ant/gone", -1, 9))


@pytest.mark.parametrize("name", [*USABLE, *UNUSABLE])
def test_a_few_bytes_give_the_kind(name: str) -> None:
    image, fault = UNUSABLE.get(name) or (USABLE[name], "")
    kind = kind_of(image[:PEEKED])
    assert kind == kind_of(image)
    assert bool(kind) == (fault not in ("no image by its first bytes", "empty file"))


@pytest.mark.parametrize(
    ("on_bad", "action"), [("skip", "skipped"), ("convert", "converted"), ("fail", "")]
)
def test_what_dali_cannot_decode(tmp_path: Path, on_bad: str, action: str) -> None:
    names = ("gif", "gif animated", "webp animated", "webp exif", "tiff", "pnm")
    images = {f"bee/{name.replace(' ', '_')}": UNUSABLE[name][0] for name in names}
    reasons = {key: UNUSABLE[name][1] for key, name in zip(images, names, strict=True)}
    tree = make_tree(tmp_path / "in", {"ant/1.jpg": jpeg(1), "bee/2.jpg": jpeg(2), **images})
    how = ("pack", "--src", tree, "--labeled", "all", "--on-bad", on_bad, "--out", tmp_path / "out")
    if on_bad == "fail":
        done = run(*how, status=4)
        assert "6 images cannot be used, nothing was published" in done.stderr
        assert all(f"{key}: {reason}" in done.stderr for key, reason in reasons.items())
        return
    run(*how)
    bad = manifest_of(tmp_path / "out")["bad"]
    assert {row["image"]: row["action"] for row in bad} == dict.fromkeys(images, action)
    assert all(row["reason"].startswith(reasons[row["image"]]) for row in bad)
    kept = {key: image for *_, key, image in read_split(tmp_path / "out", "train")}
    assert len(kept) == (8 if on_bad == "convert" else 2)
    assert {kind_of(image) for image in kept.values()} == {"JPEG"}


def test_the_advice_to_convert_can_be_followed(tmp_path: Path) -> None:
    """Beside a finished shard, which other options would lose."""
    gif = UNUSABLE["gif"][0]
    tree = make_tree(tmp_path / "in", {"ant/1.jpg": jpeg(1), "bee/2.jpg": jpeg(2), "bee/3": gif})
    how = ("--src", tree, "--labeled", "all", "--shards", 3, "--out", tmp_path / "out")
    line = refuse(*how, status=4)
    assert line.endswith("with --on-bad convert --force, which packs finished shards again")
    run("pack", *how, "--on-bad", "convert", "--force")
    assert len(read_split(tmp_path / "out", "train")) == 3


def test_the_advice_to_skip_after_a_conversion_can_be_followed(tmp_path: Path) -> None:
    """Where one image can be converted and another cannot."""
    gif = UNUSABLE["gif"][0]
    files = {f"ant/{number}.jpg": jpeg(number) for number in range(40)}
    tree = make_tree(
        tmp_path / "in", files | {"bee/3": gif, "bee/4.jpg": jpeg(4)[:200], "bee/5.jpg": jpeg(5)}
    )
    how = ("--src", tree, "--labeled", "all", "--shards", 2, "--out", tmp_path / "out")
    refuse(*how, status=4)
    line = refuse(*how, "--on-bad", "convert", "--force", status=4)
    assert "bee/4.jpg" in line and "bee/3:" not in line
    assert "leave them out with --on-bad skip --force, which also leaves out what could" in line
    run("pack", *how, "--on-bad", "skip", "--force")
    assert len(read_split(tmp_path / "out", "train")) == 41


def test_training_reads_every_kind(tmp_path: Path) -> None:
    kinds = {f"ant/{number}.jpg": image for number, image in enumerate(USABLE.values())}
    tree = make_tree(tmp_path / "in", kinds | {"bee/a.jpg": jpeg(1)})
    manifest = read_manifest(
        pack("--src", tree, "--val", tree, "--labeled", "all", out=tmp_path / "out")
    )
    config = DataConfig(image_size=16)
    read = sum(count for _, _, count in eval_loader(manifest, config))
    assert read == len(USABLE) + 1
    batch = next(train_loader(manifest, config, labeled=read, unlabeled=read))
    assert len(batch.labels) == read
