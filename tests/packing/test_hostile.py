"""Sources and packs that somebody made to do harm: one line, nothing outside, bounded memory."""

import gzip
import json
import sqlite3
import struct
import subprocess
import sys
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import cv2
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from mpl_fast.data.manifest import read_manifest
from mpl_fast.errors import DataError
from mpl_fast.packing.options import ImageOptions
from mpl_fast.packing.plan.table import TABLE
from mpl_fast.packing.sources import cifar, mnist, spool, svhn
from mpl_fast.packing.sources import zip as zip_source
from mpl_fast.packing.write.image_check import find_fault, too_many_pixels
from mpl_fast.packing.write.pixels import PIXEL_LIMIT, declared_pixels
from mpl_fast.packing.write.process_image import process_image
from mpl_fast.untrusted import npz_arrays
from tests.packing.made_sources import listed
from tests.packing.packs import (
    image_tree,
    jpeg,
    make_records,
    make_tar,
    make_tree,
    pack,
    png,
    refuse,
    run,
)

HOW = ("--labeled", 6, "--quiet")


@pytest.fixture
def rec(tmp_path: Path) -> Path:
    """A finished pack beside a file of somebody else."""
    (tmp_path / "victim").write_text("mine")
    tree = image_tree(tmp_path)
    return pack("--src", tree / "train", "--val", tree / "val", *HOW, out=tmp_path / "rec")


@pytest.mark.parametrize("kind", ["idx", "lst", "file"])
@pytest.mark.parametrize("name", ["../victim", "/etc/passwd", "..", ""])
def test_a_pack_that_names_files_outside_is_not_read(rec: Path, kind: str, name: str) -> None:
    """Neither for training nor by make_rec."""
    manifest = json.loads((rec / "manifest.json").read_text())
    if kind == "file":
        manifest["shards"][0]["file"] = name
    else:
        manifest["splits"]["labeled"][kind] = name
    (rec / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"damaged .*is not the name of a file in this folder"):
        read_manifest(rec)
    for command in ("verify", "info", "resplit"):
        refuse(rec, command=command, status=4)
    assert (rec.parent / "victim").read_text() == "mine"


MANIFESTS = {
    "list": "[]",
    "cut": "{",
    "deep": "[" * 100_000,
    "no list": '{"shards": 3}',
    "no UTF-8": "\udcff",
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_damaged_manifest_is_one_line(rec: Path, kind: str) -> None:
    """Of a pack, and of one that waits to be published."""
    text = MANIFESTS[kind].encode("utf-8", "surrogateescape")
    (rec / ".pack").mkdir()
    (rec / ".pack" / "manifest.json").write_bytes(text)
    line = refuse(rec, command="finish", status=3)
    assert f"{rec}/.pack/manifest.json: damaged" in line and f"remove {rec}/.pack" in line
    (rec / ".pack" / "manifest.json").unlink()
    (rec / ".pack").rmdir()
    (rec / "manifest.json").write_bytes(text)
    for command in ("verify", "info"):
        assert f"{rec}/manifest.json: " in refuse(rec, command=command, status=4)


def unfinished(tmp_path: Path) -> tuple[Path, list[object]]:
    """A pack of which one part of two is done, and the command of the other."""
    tree = image_tree(tmp_path)
    command: list[object] = ["--src", tree / "train", "--val", tree / "val", *HOW, "--shards", 2]
    out = pack(*command, "--part", "1/2", out=tmp_path / "rec")
    return out, [*command, "--part", "2/2", "--out", out]


def test_a_plan_that_names_a_file_outside(tmp_path: Path) -> None:
    """Of which a shard would be written over it."""
    out, rest = unfinished(tmp_path)
    (tmp_path / "victim.rec").write_text("mine")
    with sqlite3.connect(out / ".pack" / TABLE) as table:
        table.execute("UPDATE shards SET file = '../../victim.rec' WHERE number = 1")
    line = refuse(*rest, status=4)
    assert "'../../victim.rec' is not the name of a file in this folder" in line
    assert refuse(out, command="finish", status=4).count("is not the name of a file") == 1
    assert (tmp_path / "victim.rec").read_text() == "mine"


@pytest.mark.parametrize("name", [f"{TABLE}.tmp", "plan.lock", "train-00001-of-00002.rec.tmp", ""])
def test_a_link_where_make_rec_writes(tmp_path: Path, name: str) -> None:
    out, rest = unfinished(tmp_path)
    victim = tmp_path / "victim"
    victim.write_text("mine")
    link = out / ".pack" / name
    if name:
        link.unlink(missing_ok=True)
        link.symlink_to(victim)
    else:
        (out / ".pack").rename(tmp_path / "moved")
        (out / ".pack").symlink_to(tmp_path / "moved")
    for line in (refuse(*rest, status=3), refuse(out, command="finish", status=3)):
        assert f"{out}/.pack" in line and "a link to elsewhere; remove" in line
    assert victim.read_text() == "mine"


def test_a_lock_that_is_a_link(tmp_path: Path) -> None:
    out, rest = unfinished(tmp_path)
    (out / ".lock").unlink()
    (out / ".lock").symlink_to(tmp_path / "made")
    assert f"{out}: Too many levels of symbolic links" in refuse(*rest, status=3)
    assert not (tmp_path / "made").exists()


# Labels that would need names for millions of classes.


def numbered(folder: Path, kind: str, highest: int) -> Path:
    """A source of two images, whose labels are 0 and `highest`."""
    images = {"a/0.jpg": jpeg(0), "b/1.jpg": jpeg(1)}
    labels = [0, highest]
    if kind == "list":
        make_tree(folder, images)
        path = folder / "all.lst"
        rows = zip(labels, images, strict=True)
        path.write_text(
            "".join(f"{at}\t{label}\t{name}\n" for at, (label, name) in enumerate(rows))
        )
        return path
    if kind == "records":
        rows_ = [(float(label), at, jpeg(at)) for at, label in enumerate(labels)]
        return make_records(folder / "all.rec", rows_)
    samples = [(f"{at}.{end}", data) for at, label in enumerate(labels)
               for end, data in (("jpg", jpeg(at)), ("cls", str(label).encode()))]  # fmt: skip
    return make_tar(folder / "all.tar", samples)


@pytest.mark.parametrize("kind", ["list", "records", "webdataset"])
def test_a_label_in_the_millions_takes_no_memory(tmp_path: Path, kind: str) -> None:
    """It took 4.6 GB before it was refused."""
    source = numbered(tmp_path, kind, (1 << 24) - 1)
    tracemalloc.start()
    with pytest.raises(DataError) as refused:
        listed(source, tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    line = "its labels go up to 16777215, but it has only 2 images: each number is a class, so"
    assert str(refused.value).startswith(f"{source}: {line}")
    assert peak < 20e6
    _, images = listed(numbered(tmp_path, kind, 20_000), tmp_path)
    assert sorted(image.class_name for image in images)[0] in ("0", "a")


# Archives.


@pytest.mark.parametrize("mode", ["w:gz", "w:xz", "w:bz2"])
def test_a_compressed_tar_that_fills_the_disk(
    tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "_ALWAYS", 1 << 20)
    bomb = make_tar(tmp_path / f"bomb.tar.{mode[2:]}", [("a/0.jpg", bytes(20 << 20))], mode)
    line = refuse("--src", bomb, "--out", tmp_path / "out", *HOW, status=4)
    assert f"{bomb}: it unpacks to more than 100 times its size" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("column", ["image", "label", "path"])
def test_a_parquet_of_one_value_for_all_rows(
    column: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arrow copied it for each of the rows in memory: 2.2 GB for a file of 1,014 bytes."""
    rows, value = 300, "x" * (1 << 20)
    once = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([value]))
    images = [jpeg(0)] * rows
    paths = once if column == "path" else pa.array([f"{row}.jpg" for row in range(rows)])
    content = once.cast(pa.large_binary()) if column == "image" else pa.array(images)
    table = {
        "image": pa.StructArray.from_arrays([content, paths], ["bytes", "path"]),
        "label": once if column == "label" else pa.array(["a"] * rows),
    }
    bomb = tmp_path / "bomb.parquet"
    how: dict[str, Any] = {"dictionary_pagesize_limit": 1 << 30, "store_schema": False}
    parquet.write_table(pa.table(table), bomb, compression="zstd", **how)
    monkeypatch.setattr(spool, "_ALWAYS", 1 << 20)
    before = pa.default_memory_pool()
    counted = pa.proxy_memory_pool(before)
    pa.set_memory_pool(counted)
    status = 0 if column == "path" else 4  # equal paths name no image, so they are left out
    try:
        done = run("pack", "--src", bomb, "--out", tmp_path / "out", *HOW, status=status)
    finally:
        pa.set_memory_pool(before)
    assert ("it unpacks to more than 100 times its size" in done.stderr) is bool(status)
    assert counted.max_memory() < 16 << 20


def test_arrays_are_not_compressed(tmp_path: Path) -> None:
    """This program writes none such: a thousandth of a gigabyte would be one in memory."""
    np.savez(tmp_path / "a.npz", a=np.arange(9))
    assert npz_arrays(tmp_path / "a.npz")["a"].tolist() == [*range(9)]
    np.savez_compressed(tmp_path / "a.npz", a=np.zeros(1 << 20))
    with pytest.raises(ValueError, match="ValueError: it is compressed"):
        npz_arrays(tmp_path / "a.npz")
    (tmp_path / "a.npz").write_bytes(b"PK\3\4")
    with pytest.raises(ValueError, match=r"BadZipFile: "):
        npz_arrays(tmp_path / "a.npz")


def test_a_zip_of_overlapping_members(tmp_path: Path) -> None:
    """One image as a hundred members."""
    path, data = tmp_path / "bomb.zip", jpeg(0)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/0.jpg", data)
        archive.filelist *= 100
    line = refuse("--src", path, "--out", tmp_path / "out", *HOW, status=4)
    assert line.endswith("damaged zip archive: its members overlap")


def test_a_zip_that_declares_a_member_of_gigabytes(tmp_path: Path) -> None:
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/0.jpg", jpeg(0))
        archive.filelist[0].file_size = 3 << 30
    line = refuse("--src", path, "--out", tmp_path / "out", *HOW, status=4)
    assert line.endswith("a/0.jpg has 3221225472 bytes, more than 536870912")


def idx(path: Path, count: int, shape: tuple[int, int]) -> Path:
    path.write_bytes(struct.pack(">4sIII", b"\0\0\x08\x03", count, *shape) + bytes(100))
    labels = struct.pack(">4sI", b"\0\0\x08\x01", count) + bytes(count)
    path.with_name(path.name.replace("images-idx3", "labels-idx1")).write_bytes(labels)
    return path


def test_labels_of_idx_that_never_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a few kilobytes that unpack to gigabytes, more than the limit are not read."""
    file = idx(tmp_path / "train-images-idx3-ubyte", 2, (5, 10))
    labels = tmp_path / "train-labels-idx1-ubyte"
    labels.unlink()
    content = struct.pack(">4sI", b"\0\0\x08\x01", 64 << 20) + bytes(64 << 20)
    labels.with_suffix(".gz").write_bytes(gzip.compress(content, 1))
    monkeypatch.setattr(mnist, "_LABEL_BYTES", 1 << 20)
    tracemalloc.start()
    line = refuse("--src", file, "--out", tmp_path / "out", *HOW, status=4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert line.endswith("train-labels-idx1-ubyte.gz: no idx file of labels, or cut short")
    assert peak < 16e6


@pytest.mark.parametrize(
    ("limit", "least", "end"),
    [("_LABELS", 10, "y has the shape (10, 1)"), ("PIXEL_LIMIT", 16, "images of 4 x 4 pixels")],
)
def test_sides_in_svhn(
    limit: str, least: int, end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels, labels = np.zeros((4, 4, 3, 10), np.uint8), np.ones((10, 1), np.uint8)
    pytest.importorskip("scipy.io").savemat(tmp_path / "x.mat", {"X": pixels, "y": labels})
    monkeypatch.setattr(svhn, limit, least)
    listed(tmp_path / "x.mat", tmp_path)
    (tmp_path / "x.mat").touch()  # to be unpacked again
    monkeypatch.setattr(svhn, limit, least - 1)
    line = refuse("--src", tmp_path / "x.mat", "--out", tmp_path / "out", *HOW, status=4)
    assert line.endswith(f"x.mat: damaged: {end}")


def test_a_batch_of_cifar_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is unpickled in memory."""
    monkeypatch.setattr(cifar, "_LARGEST", 1 << 16)
    content = [("cifar-10-batches-py/batches.meta", bytes((1 << 16) + 1))]
    content += [(f"cifar-10-batches-py/data_batch_{n}", b"x") for n in range(1, 6)]
    archive = make_tar(tmp_path / "cifar.tar.gz", content, "w:gz")
    line = refuse("--src", f"{archive}:train", "--out", tmp_path / "out", *HOW, status=4)
    assert line.endswith("batches.meta has 65537 bytes: no batch as published")


def test_a_member_of_a_zip_that_inflates_beyond_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zip_source, "_SIZE_LIMIT", 1 << 20)
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in (f"{folder}/{number}.jpg" for folder in "ab" for number in range(4)):
            archive.writestr(name, bytes(8 << 20))
        for member in archive.filelist:
            member.file_size = 100
    tracemalloc.start()
    line = refuse("--src", path, "--out", tmp_path / "out", *HOW, status=4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "a member is cut short or too large" in line and peak < 6e6


def test_zeros_behind_a_tar_are_not_read(tmp_path: Path) -> None:
    """A hole in a file has any length."""
    tar = make_tar(tmp_path / "a.tar", [(f"{c}/{n}.jpg", jpeg(n)) for c in "ab" for n in range(4)])
    with tar.open("r+b") as file:
        file.truncate(1 << 28)
    tracemalloc.start()
    run("pack", "--src", tar, "--out", tmp_path / "out", *HOW)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64e6


def test_sides_of_raw_pixels(tmp_path: Path) -> None:
    file = idx(tmp_path / "train-images-idx3-ubyte", 2, (1 << 31, 1 << 31))
    line = refuse("--src", file, "--out", tmp_path / "out", *HOW, status=4)
    assert f"{file}: damaged: images of 2147483648 x 2147483648 pixels" in line


# Images: what the header declares decides, before anything is decoded.

SIDE = 30_000


def large_png() -> bytes:
    head = struct.pack(">4sIIBBBBB", b"IHDR", SIDE, SIDE, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    parts = [(head, 13), (b"IDAT" + body, len(body)), (b"IEND", 0)]
    chunks = (struct.pack(">I", n) + c + struct.pack(">I", zlib.crc32(c)) for c, n in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def large_jpeg() -> bytes:
    image, size = jpeg(0), struct.pack(">HH", 12, 12)
    return image.replace(b"\x08" + size, b"\x08" + struct.pack(">HH", SIDE, SIDE), 1)


def large_bmp() -> bytes:
    image = bytes(cv2.imencode(".bmp", np.zeros((9, 7, 3), np.uint8))[1])
    return image[:18] + struct.pack("<ii", SIDE, -SIDE) + image[26:]


LARGE: dict[str, Callable[[], bytes]] = {
    "png": large_png,
    "jpg": large_jpeg,
    "bmp": large_bmp,
    "gif": lambda: b"GIF89a" + struct.pack("<HH", SIDE, SIDE) + bytes(100),
    "ppm": lambda: f"P6 #x\n{SIDE} {SIDE} 255 ".encode() + bytes(100),
}


@pytest.mark.parametrize("kind", LARGE)
@pytest.mark.parametrize("action", ["fail", "skip", "convert"])
def test_a_small_file_of_a_large_image_is_not_decoded(
    kind: str, action: str, tmp_path: Path
) -> None:
    image = LARGE[kind]()
    assert declared_pixels(image) == (SIDE, SIDE)
    fault = f"{SIDE} x {SIDE} pixels are more than {PIXEL_LIMIT}"
    with (
        mock.patch("simplejpeg.decode_jpeg", side_effect=AssertionError),
        mock.patch("cv2.imdecode", side_effect=AssertionError),
        mock.patch("cv2.imdecodemulti", side_effect=AssertionError),
    ):
        for check in ("decode", "header"):
            assert fault in str(find_fault(image, check)) or kind in ("gif", "ppm")
            done = process_image(image, "x", ImageOptions(check=check, on_bad=action))
            assert done.image is None and done.reason == fault
            assert done.action == ("skipped" if action == "skip" else "failed")


CONVERTED = """import sys
from pathlib import Path
from mpl_fast.packing.options import ImageOptions
from mpl_fast.packing.write.process_image import process_image
print(process_image(Path(sys.argv[1]).read_bytes(), "x", ImageOptions(on_bad="convert")).reason)"""


def test_images_of_other_kinds_are_refused_by_opencv(root: Path, tmp_path: Path) -> None:
    """TIFF, JPEG 2000, AVIF, HEIC: it compares their headers with the same limit, which it reads
    when it is imported; its own is four times as high."""
    ok, encoded = cv2.imencode(".tiff", np.zeros((9, 7, 3), np.uint8))
    assert ok
    image = bytes(encoded)
    for tag, side in ((256, 7), (257, 9)):  # as 16 or 32 bits
        forms = (struct.pack("<HHIHH", tag, 3, 1, side, 0), struct.pack("<HHII", tag, 4, 1, side))
        (old,) = (form for form in forms if image.count(form) == 1)
        image = image.replace(old, struct.pack("<HHII", tag, 4, 1, 20_000))
    (tmp_path / "x").write_bytes(image)
    command = [sys.executable, "-c", CONVERTED, str(tmp_path / "x")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert "OpenCV cannot decode this TIFF (pixels <= CV_IO_MAX_IMAGE_PIXELS)" in done.stdout
    small = process_image(bytes(encoded), "x", ImageOptions(on_bad="convert", max_pixels=62))
    assert small.image is None and small.reason.endswith("7 x 9 pixels are more than 62")
    whole = process_image(bytes(encoded), "x", ImageOptions(on_bad="convert", max_pixels=63))
    assert whole.image


class Counted(bytes):
    """Counts how often a part of it is taken."""

    taken = 0

    def __getitem__(self, key: Any) -> Any:
        self.taken += 1
        return super().__getitem__(key)


def test_fill_bytes_before_a_marker_take_no_time() -> None:
    """Each was a step of Python: half a gigabyte of them took minutes."""
    image = jpeg(0)
    filled = Counted(image[:2] + b"\xff" * (1 << 20) + image[2:])
    assert declared_pixels(filled) == declared_pixels(image) == (12, 12)
    assert filled.taken < 100


def test_the_limit_is_an_option(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", {f"{c}/{n}.jpg": jpeg(n) for c in "ab" for n in range(3)})
    (tree / "a" / "large.png").write_bytes(png(1))  # 7 x 9
    (tree / "b" / "small.jpg").write_bytes(jpeg(7, 5))
    out = tmp_path / "out"
    line = refuse("--src", tree, "--out", out, *HOW, "--max-pixels", 62, status=4)
    assert "7 images cannot be used" in line and "large.png: 7 x 9 pixels are more than 62" in line
    for wrong in (0, PIXEL_LIMIT + 1):
        line = refuse("--src", tree, "--out", out, *HOW, "--max-pixels", wrong, status=2)
        assert f"--max-pixels {wrong}: must be 1 to {PIXEL_LIMIT}" in line
    run("pack", "--src", tree, "--out", out, "--labeled", 2, "--quiet", "--max-pixels", 144)
    assert "max_pixels 144" in run("info", out).stdout


def test_an_image_within_the_limit_is_no_fault() -> None:
    assert too_many_pixels(jpeg(0), 144) == "" != too_many_pixels(jpeg(0), 143)
    assert declared_pixels(b"no image") == (0, 0)


# Names: no command prints what a terminal would obey.

NAME = "\x1b]0;own\x07\x1b[31m\x9b2J\u202ex"
ESCAPED = r"\x1b]0;own\x07\x1b[31m\x9b2J\u202ex"


def test_names_of_images_and_classes_are_printed_escaped(tmp_path: Path) -> None:
    images = {f"{c}{NAME}/{NAME}{n}.jpg": jpeg(n + ord(c)) for c in "ab" for n in range(3)}
    tree = make_tree(tmp_path / f"tree{NAME}", images)
    (tree / f"a{NAME}" / f"bad{NAME}.jpg").write_bytes(b"no image")
    out = tmp_path / f"out{NAME}"
    command = ("pack", "--src", tree, "--labeled", 2, "--out", out)
    done = [run(*command, status=4), run(*command, "--on-bad", "skip"), run(*command, status=3)]
    done += [run("info", out, "--classes"), run("extract", out, 0, "--to", tmp_path / f"x{NAME}")]
    done += [run("locate", out, f"train.rec at index 0{NAME}"), run("locate", out, NAME, status=4)]
    content = bytearray((out / "train.rec").read_bytes())
    content[40] ^= 1
    (out / "train.rec").write_bytes(content)
    done += [run("verify", out, status=4), run("extract", out, NAME, status=4)]
    for one in done:
        assert ESCAPED in one.stdout + one.stderr
        for text in (one.stdout, one.stderr):
            assert not [c for c in text if c != "\n" and not c.isprintable()]
