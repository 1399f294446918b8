"""Zip archives, and Tiny-ImageNet's as it is downloaded: every image, and every fault."""

import io
import random
import struct
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import pytest

from mpl_fast.errors import DataError
from tests.packing.made_sources import content, entries, keys, listed, opened
from tests.packing.packs import (
    hashes,
    image_tree,
    jpeg,
    make_tree,
    pack,
    read_split,
    refuse,
    verified,
)

CONTENTS = {
    "train/ant/a.jpg": b"one",
    "train/ant/b.JPEG": b"two, longer",
    "train/bee/a.png": b"three" * 300,
    "test/ant/a.jpg": b"four",
}


def make_zip(
    path: Path, contents: Iterable[tuple[str, bytes]], method: int = zipfile.ZIP_DEFLATED
) -> Path:
    """Write a zip archive, which is returned; a name that ends in "/" is a folder's."""
    with zipfile.ZipFile(path, "a" if path.exists() else "w", method) as archive:
        for name, data in contents:
            archive.writestr(zipfile.ZipInfo(name), data, method)
    return path


def decoded(spec: Path | str, work: Path) -> list[tuple[str, bytes]]:
    source, images = listed(spec, work)
    found = [source.decode(content(source, image)) for image in images]
    return [*zip(keys(images), found, strict=True)]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_folder_of_an_archive(tmp_path: Path, method: int) -> None:
    rows = [("train/", b""), ("train/empty/", b""), ("x.txt", b""), *CONTENTS.items()]
    archive = make_zip(tmp_path / "data.zip", rows, method)
    expected = [(key.removeprefix("train/"), data) for key, data in [*CONTENTS.items()][:3]]
    for folder in ("train", "./train", "train/"):
        source, images = listed(f"{archive}:{folder}", tmp_path)
        assert (source.kind, source.file, source.class_order) == ("zip", archive, None)
        assert decoded(f"{archive}:{folder}", tmp_path) == expected
        assert [image.path for image in images] == [key for key, _ in expected]
        assert [text.partition(": ")[2] for text in source.warnings] == [
            "1 folder holds no image and gives no class: empty"
        ]
    with pytest.raises(DataError, match=r"no folder 'trian' .* it holds train, x.txt, test"):
        listed(f"{archive}:trian", tmp_path)


def test_packed_like_the_folder(tmp_path: Path) -> None:
    tree = image_tree(tmp_path)
    files = sorted(path for path in tree.rglob("*") if path.is_file())
    rows = [(str(path.relative_to(tree)), path.read_bytes()) for path in files]
    archive = make_zip(tmp_path / "data.zip", rows)
    how = ("--labeled", 6)
    one = pack("--src", tree / "train", "--val", tree / "val", *how, out=tmp_path / "1")
    two = pack("--src", f"{archive}:train", "--val", f"{archive}:val", *how, out=tmp_path / "2")
    before, after = hashes(one), hashes(two)
    differ = {name for name in before | after if before.get(name) != after.get(name)}
    assert differ == {"manifest.json", "records.sqlite"}  # the sources
    assert verified(two, deep=True).problems == ()


class Stream(io.BytesIO):
    """A pipe: sizes and checksums follow the data."""

    def seekable(self) -> bool:
        return False

    def seek(self, *_: int) -> int:
        raise io.UnsupportedOperation


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_written_to_a_pipe(tmp_path: Path, method: int) -> None:
    stream = Stream()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, data in CONTENTS.items():
            archive.writestr(name, data)
    path, whole = tmp_path / "data.zip", stream.getvalue()
    path.write_bytes(whole)
    expected = [*CONTENTS.values()][:3]
    assert [data for _, data in decoded(f"{path}:train", tmp_path)] == expected
    checksum = struct.pack("<4sI", b"PK\7\x08", zlib.crc32(b"one"))
    damages = [(whole.replace(checksum, checksum[:-1] + b"?"), "wrong checksum of a member")]
    if method == zipfile.ZIP_STORED:
        damages += [(whole.replace(b"one", b"onE"), "wrong checksum of a member")]
    for damaged, message in damages:
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=message):
            decoded(f"{path}:train", tmp_path)
    # The mark before the checksum may be left out.
    path.write_bytes(whole.replace(checksum, checksum[4:] + checksum[:4]))
    assert [data for _, data in decoded(f"{path}:train", tmp_path)] == expected


def test_after_more_than_4_gb(tmp_path: Path) -> None:
    """Offsets of 64 bits; what stands before the archive does not count."""
    for size in (1000, 5 << 30):
        path = tmp_path / f"{size}.zip"
        path.write_bytes(b"PK\3\4")
        with path.open("r+b") as file:
            file.truncate(size)  # a hole
        make_zip(path, CONTENTS.items())
        assert decoded(f"{path}:test", tmp_path) == [("ant/a.jpg", b"four")]
        path.unlink()


def test_names(tmp_path: Path) -> None:
    kept = ["ant/é.jpg", "b ee/\U0001f41d.jpg", f"{'d' * 150}/{'é' * 100}.jpg"]
    cleaned = {"../ant/1.jpg": "ant/1.jpg", "/bee/2.jpg": "bee/2.jpg", "ant/../3.jpg": "ant/3.jpg"}
    archive = make_zip(tmp_path / "data.zip", [(name, name.encode()) for name in (*kept, *cleaned)])
    expected = [(cleaned.get(name, name), name.encode()) for name in (*kept, *cleaned)]
    assert decoded(archive, tmp_path) == sorted(expected)
    # Without the mark of UTF-8, as old tools write: UTF-8 if it can be, else DOS.
    for stored in ("é".encode(), b"\x82"):
        archive.unlink()
        make_zip(archive, [(f"ant/{'X' * len(stored)}.jpg", b"1")])
        archive.write_bytes(archive.read_bytes().replace(b"X" * len(stored), stored))
        assert decoded(archive, tmp_path) == [("ant/é.jpg", b"1")]


def with_link(path: Path) -> None:
    link = zipfile.ZipInfo("ant/link.jpg")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(link, "a.jpg")


def test_links_and_other_methods(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "data.zip", [("ant/a.jpg", b"1"), ("readme", b"2")])
    with_link(archive)
    with pytest.raises(DataError, match=r"ant/link.jpg is a link; pack from the unpacked tree"):
        listed(archive, tmp_path)
    other = make_zip(tmp_path / "other.zip", [("ant/a.jpg", b"1")])
    make_zip(other, [("readme", b"2")], zipfile.ZIP_LZMA)  # not read, no fault
    assert decoded(other, tmp_path) == [("ant/a.jpg", b"1")]
    make_zip(other, [("ant/b.jpg", b"2")], zipfile.ZIP_LZMA)
    with pytest.raises(DataError, match=r"ant/b.jpg is compressed by method 14, not deflate"):
        listed(other, tmp_path)
    data = bytearray(make_zip(tmp_path / "third.zip", [("ant/a.jpg", b"1")]).read_bytes())
    data[data.rindex(b"PK\1\2") + 8] |= 1
    (tmp_path / "third.zip").write_bytes(data)
    with pytest.raises(DataError, match=r"ant/a.jpg is encrypted"):
        listed(tmp_path / "third.zip", tmp_path)


def test_damage_where_content_decides(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "data.zip", [("ant/a.dat", jpeg(0))])
    assert decoded(path, tmp_path) == [("ant/a.dat", jpeg(0))]
    data = bytearray(path.read_bytes())
    data[30 + len("ant/a.dat")] = 0xFF  # no kind of block
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"damaged zip archive: ant/a.dat "):
        listed(path, tmp_path)


def test_damage(tmp_path: Path) -> None:
    image = jpeg(0)
    path = make_zip(tmp_path / "data.zip", [("ant/a.jpg", image), ("bee/b.jpg", jpeg(1))])
    whole = path.read_bytes()
    second, directory = whole.index(b"PK\3\4", 4), whole.index(b"PK\1\2")
    for data, message in (
        (whole[:-30], "damaged or not complete: no zip directory at its end"),
        (whole[:directory] + whole[directory + 9 :], "its directory is not where it should be"),
        (whole[: directory + 1] + b"?" + whole[directory + 2 :], "its directory ends at byte"),
        (whole[:second] + b"?" + whole[second + 1 :], "bee/b.jpg is not where it should be"),
        (b"PK\3\4", "no zip directory at its end"),
    ):
        path.write_bytes(data)
        with pytest.raises(DataError, match=message):
            listed(path, tmp_path)
    for at in (second - 20, 15):  # in the first image's data; in its checksum
        data_ = bytearray(whole)
        data_[at] ^= 1
        path.write_bytes(data_)
        line = refuse("--src", path, "--out", tmp_path / "out", "--labeled", 2, status=4)
        assert "ant/a.jpg: " in line and "damaged zip archive" in line


def with_values(whole: bytes, size: int, start: int) -> bytes:
    """Return an archive of one member with other values of 64 bits in its directory."""
    directory, end = whole.index(b"PK\1\2"), whole.index(b"PK\5\6")
    head = bytearray(whole[directory:end])
    extra = struct.pack("<HHQQ", 1, 16, size, start)
    head[20:24] = head[42:46] = b"\xff" * 4  # compressed size; start
    head[30:32] = struct.pack("<H", len(extra))
    tail = bytearray(whole[end:])
    tail[12:16] = struct.pack("<I", len(head) + len(extra))
    return whole[:directory] + head + extra + tail


@pytest.mark.parametrize("name", ["ant/a.jpg", "val_annotations.txt", "readme"])
@pytest.mark.parametrize(
    ("size", "start"),
    [(3_500_000_000, 0), ((1 << 64) - 1, 0), (3, 1 << 63), (3, (1 << 64) - 1), (100, 0)],
)
def test_members_that_end_after_the_file(tmp_path: Path, name: str, size: int, start: int) -> None:
    whole = make_zip(tmp_path / "data.zip", [(name, b"one")], zipfile.ZIP_STORED).read_bytes()
    (tmp_path / "data.zip").write_bytes(with_values(whole, max(size, len(whole) - 10), start))
    with pytest.raises(DataError, match=f"damaged zip archive: {name} ends after the file"):
        listed(tmp_path / "data.zip", tmp_path)


def test_directory_that_is_after_the_file(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "data.zip", [("ant/a.jpg", b"one")])
    whole = path.read_bytes()
    end = whole.index(b"PK\5\6")
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, 1 << 63, 1)
    path.write_bytes(whole[:end] + locator + whole[end:])
    with pytest.raises(DataError, match="its directory is cut short"):
        listed(path, tmp_path)


@pytest.mark.parametrize("name", ["ant/a.jpg", "val_annotations.txt"])
def test_members_too_large_to_be_read(tmp_path: Path, name: str) -> None:
    path = make_zip(tmp_path / "data.zip", [(name, b"one")], zipfile.ZIP_STORED)
    whole = path.read_bytes()
    directory = whole.index(b"PK\1\2")
    size = (1 << 29) + 1
    with path.open("r+b") as file:  # a hole between the member and the directory
        file.seek(directory + size)
        file.write(with_values(whole, size, 0)[directory:])
        offset = file.tell() - 6
        file.seek(offset)
        file.write(struct.pack("<I", directory + size))
    with pytest.raises(DataError, match=f"{name} has {size} bytes, more than {1 << 29}"):
        listed(path, tmp_path)


@pytest.mark.slow
def test_damage_never_raises_anything_else(tmp_path: Path) -> None:
    seeded = random.Random(0)
    path = make_zip(tmp_path / "data.zip", [*CONTENTS.items()][:3])
    whole = path.read_bytes()
    outcomes = {"listed": 0, "refused": 0}
    for _ in range(1500):
        data = bytearray(whole)
        data[seeded.randrange(len(data))] = seeded.randrange(256)
        path.write_bytes(data)
        try:
            source = opened(path, tmp_path)
            for image in source.images():
                source.decode(content(source, image))
            outcomes["listed"] += 1
        except DataError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 100


# Tiny-ImageNet.

WNIDS = ("n02", "n01")


def tiny_imagenet() -> dict[str, bytes]:
    files = {"wnids.txt": b"n02\nn01\n", "words.txt": b"n01\tfish\n"}
    lines = []
    for label, wnid in enumerate(WNIDS):
        for number in range(3):
            files[f"train/{wnid}/images/{wnid}_{number}.JPEG"] = jpeg(10 * label + number)
        files[f"train/{wnid}/{wnid}_boxes.txt"] = b"n01_0.JPEG\t0\t0\t9\t9\n"
        files[f"val/images/val_{label}.JPEG"] = jpeg(100 + label)
        lines.append(f"val_{label}.JPEG\t{wnid}\t0\t32\t44\t62\n")
        files[f"test/images/test_{label}.JPEG"] = jpeg(200 + label)
    return files | {"val/val_annotations.txt": "".join(lines).encode()}


@pytest.mark.parametrize("form", ["zip", "folder"])
def test_tiny_imagenet(tmp_path: Path, form: str) -> None:
    files = {f"tiny-imagenet-200/{name}": data for name, data in tiny_imagenet().items()}
    where = f"{make_tree(tmp_path / 'in', files)}/tiny-imagenet-200/"
    everything = where
    if form == "zip":
        everything = f"{make_zip(tmp_path / 'tiny-imagenet-200.zip', files.items())}"
        where = f"{everything}:tiny-imagenet-200/"
    assert keys(listed(f"{where}train", tmp_path)[1]) == [
        f"{name}/{name}_{at}.JPEG" for name in ("n01", "n02") for at in range(3)
    ]
    assert keys(listed(f"{where}val", tmp_path)[1]) == ["n01/val_1.JPEG", "n02/val_0.JPEG"]
    message = (
        r"val/val_annotations.txt gives the classes of images beside it; name .*val as a source"
    )
    with pytest.raises(DataError, match=message):
        listed(everything, tmp_path)
    out = pack(
        *("--src", f"{where}train", "--val", f"{where}val", "--labeled", 2), out=tmp_path / "out"
    )
    rows = {key: (label, image) for _, label, key, image in read_split(out, "val")}
    assert rows == {"n01/val_1.JPEG": (0, jpeg(101)), "n02/val_0.JPEG": (1, jpeg(100))}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("val_0.JPEG\tn01\t0\n", r"1 name does not fit .*: images/val_1.JPEG \(no line\)"),
        ("val_0.JPEG n01\n", r"val_annotations.txt: line 1: 'val_0.JPEG n01' is not `name TAB"),
        ("val_0.JPEG\tn01\nval_0.JPEG\tn02\n", "line 2: val_0.JPEG is on line 1 already"),
        ("", "val_annotations.txt: has no line for any of the 2 images"),
    ],
)
def test_faulty_annotations(tmp_path: Path, lines: str, message: str) -> None:
    files = {f"val/images/val_{number}.JPEG": b"1" for number in range(2)}
    make_tree(tmp_path / "in", files | {"val/val_annotations.txt": lines.encode()})
    with pytest.raises(DataError, match=message):
        listed(tmp_path / "in/val", tmp_path)


def test_damaged_annotations(tmp_path: Path) -> None:
    line = b"val_0.JPEG\tn01\t0\n"
    files = [("images/val_0.JPEG", jpeg(0)), ("val_annotations.txt", line)]
    path = make_zip(tmp_path / "val.zip", files, zipfile.ZIP_STORED)
    path.write_bytes(path.read_bytes().replace(line, line.upper()))
    with pytest.raises(DataError, match=r"val.zip: val_annotations.txt: damaged zip archive"):
        listed(path, tmp_path)


@pytest.mark.parametrize("other", ["a/text/2.jpg", "a/3.jpg"])
def test_images_beside_other_folders(tmp_path: Path, other: str) -> None:
    """It is uncertain whether `images` is a class; below the top it always is one."""
    tree = make_tree(tmp_path / "tree", {"a/images/1.jpg": b"1", other: b"2"})
    with pytest.raises(
        DataError, match=r"which folders are the classes, the first ones \(1: a 2\)"
    ):
        listed(tree, tmp_path)
    if other != "a/3.jpg":
        assert entries(tree / "a", tmp_path) == [("images/1.jpg", b"1"), ("text/2.jpg", b"2")]
