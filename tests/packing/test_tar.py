"""Archives: every image is listed with its bytes, and every fault is reported with its place."""

import os
import random
import tarfile
from itertools import islice
from pathlib import Path

import pytest

from mpl_fast.errors import DataError, OutputError
from mpl_fast.packing.sources.source import Request
from mpl_fast.packing.sources.spool import spooled
from mpl_fast.packing.sources.tar import first_members
from tests.packing.made_sources import content, entries, keys, listed, opened
from tests.packing.packs import make_tar

CONTENTS = {
    "train/ant/a.jpg": b"one",
    "train/ant/b.JPEG": b"two, longer",
    "train/bee/a.png": b"three" * 300,
    "test/ant/a.jpg": b"four",
}
IMAGES = [(f"ant/{number}.jpg", b"x" * 600) for number in range(4)]
MEMBER = 512 + 1024  # bytes that one of IMAGES takes in an archive


def set_checksum(data: bytearray, header: int) -> None:
    """Make the checksum of the tar header at this byte valid."""
    data[header + 148 : header + 156] = b" " * 8
    data[header + 148 : header + 156] = b"%06o\0 " % sum(data[header : header + 512])


@pytest.mark.parametrize("mode", ["w", "w:xz", "w:gz", "w:bz2"])
@pytest.mark.parametrize("prefix", ["", "./"])
def test_folder_of_an_archive(tmp_path: Path, mode: str, prefix: str) -> None:
    rows = [(prefix + name, data) for name, data in CONTENTS.items()]
    archive = make_tar(tmp_path / "data.archive", rows, mode)
    for folder in ("train", "./train", "train/"):
        source, images = listed(f"{archive}:{folder}", tmp_path)
        assert (source.spec, source.kind) == (f"{archive}:{folder}", "archive")
        assert source.class_order is None
        assert keys(images) == ["ant/a.jpg", "ant/b.JPEG", "bee/a.png"]
        assert [image.path for image in images] == keys(images)
        assert [content(source, image) for image in images] == list(CONTENTS.values())[:3]
    for folder in ("trian", "trai"):
        with pytest.raises(DataError, match=rf"no folder '{folder}' .* it holds train, test"):
            listed(f"{archive}:{folder}", tmp_path)


def test_compressed_archive_is_unpacked_once(tmp_path: Path) -> None:
    archive = make_tar(tmp_path / "data.tar.xz", CONTENTS.items(), "w:xz")
    plain = make_tar(tmp_path / "data.tar", CONTENTS.items())
    os.utime(archive, ns=(5, 1_000_000_007))
    lines: list[str] = []
    spool = opened(archive, tmp_path, report=lines.append).file
    assert spool.read_bytes() == plain.read_bytes()
    assert spool.stat().st_mtime_ns == 1_000_000_007
    assert spool.name.startswith("spool-") and spool.suffix == ".tar"
    assert sorted(tmp_path.iterdir()) == sorted([archive, plain, spool])
    assert opened(archive, tmp_path, report=lines.append).file == spool
    assert lines == [f"unpacking {archive} into a temporary file in {tmp_path}"]
    os.utime(archive, ns=(5, 1_000_000_008))  # another archive, by its time
    assert opened(archive, tmp_path, report=lines.append).file != spool
    assert len(lines) == 2
    assert opened(plain, tmp_path).file == plain
    with pytest.raises(OutputError, match=r"none.*: No such file"):
        opened(archive, tmp_path / "none")


def test_time_of_a_spool_tells_of_any_changed_file(tmp_path: Path) -> None:
    """An older file that changes does not pass for unchanged because a newer one is the same."""
    files = (tmp_path / "old", tmp_path / "new")
    for file in files:
        file.write_bytes(b"same size")
    where = Request(
        "spec", files[0], "", None, None, tmp_path, lambda line: None, unlabeled=False, files=files
    )
    stamps = []
    for at in (1000, 2000, 1000):
        for file, stamp in zip(files, (at, 3_000_000), strict=True):
            os.utime(file, ns=(0, stamp))
        spool = spooled(where, [b"x"], files, "part")
        stamps.append(spool.stat().st_mtime_ns)
        spool.unlink()
    assert stamps[0] == stamps[2] != stamps[1]
    assert spooled(where, [b"x"], files[1:], "part").stat().st_mtime_ns == 3_000_000


@pytest.mark.parametrize("mode", ["w:xz", "w:gz"])
def test_damaged_compressed_tar(tmp_path: Path, mode: str) -> None:
    path = make_tar(tmp_path / "data", [("ant/a.jpg", os.urandom(5000))], mode)
    whole = path.read_bytes()
    for damaged in (whole[:3000], whole[:3000] + bytes(100) + whole[3100:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"data: damaged or not a tar archive|data: CRC check"):
            listed(path, tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_tar_inside_a_tar_is_a_class_folder(tmp_path: Path) -> None:
    files = [("./", b""), ("./n01_1.JPEG", b"fish"), ("n01_2.JPEG", b"bird")]
    inner = make_tar(tmp_path / "n01.tar", files)
    other = make_tar(tmp_path / "n02.tar", [("n02_1.JPEG", b"cat")])
    rows = [(path.name, path.read_bytes()) for path in (inner, other)]
    archive = make_tar(tmp_path / "all.tar", rows)
    deeper = make_tar(tmp_path / "deeper.tar", [("in/all.tar", archive.read_bytes())])
    for spec in (archive, f"{deeper}:in/all"):
        assert entries(spec, tmp_path) == [
            ("n01/n01_1.JPEG", b"fish"),
            ("n01/n01_2.JPEG", b"bird"),
            ("n02/n02_1.JPEG", b"cat"),
        ]
        assert listed(spec, tmp_path)[0].warnings == []


def test_cut_or_empty_tar_inside_a_tar(tmp_path: Path) -> None:
    """What follows a cut inner tar is the outer one's: it must not pass for the inner's end."""
    files = [(name.removeprefix("ant/"), data) for name, data in IMAGES]
    whole = make_tar(tmp_path / "inner.tar", files).read_bytes()
    for cut in (whole[: 2 * MEMBER], whole[: 2 * MEMBER + 512 + 300], b""):
        for rows in ([("n1.tar", whole), ("n2.tar", cut)], [("n1.tar", cut), ("n2.tar", whole)]):
            archive = make_tar(tmp_path / "outer.tar", rows)
            with pytest.raises(DataError, match=r"outer.tar: damaged or cut short after n[12]/"):
                listed(archive, tmp_path)
    empty = make_tar(tmp_path / "empty.tar", []).read_bytes()
    archive = make_tar(tmp_path / "outer.tar", [("n1.tar", empty), ("n2.tar", whole)])
    source, images = listed(archive, tmp_path)
    assert len(images) == 4
    assert source.warnings == [f"{archive}: 1 folder holds no image and gives no class: n1"]


def test_joined_tars(tmp_path: Path) -> None:
    """Tar itself reads only the first of two that `cat` joined, without a warning."""
    one, two = (
        make_tar(tmp_path / "one.tar", [(f"ant/{number}.jpg", b"1")]).read_bytes()
        for number in (1, 2)
    )
    both = tmp_path / "both.tar"
    both.write_bytes(one + two)
    with pytest.raises(DataError, match=rf"both.tar: .*second archive begins at byte {len(one)}$"):
        listed(both, tmp_path)
    both.write_bytes(one[:-512] + b"left over in the buffer".ljust(512))
    assert keys(listed(both, tmp_path)[1]) == ["ant/1.jpg"]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_names(tmp_path: Path, form: int) -> None:
    kept = ["BZh9/1.jpg", "ant/caf\udce9.jpg", f"{'d' * 150}/{'é' * 100}.jpg"]  # BZh: as in bzip2
    kept += ["ant/a.jpg"] * 2  # the planner finds duplicates, not the source
    cleaned = {"../ant/1.jpg": "ant/1.jpg", "/bee/2.jpg": "bee/2.jpg", "ant/../3.jpg": "ant/3.jpg"}
    archive = make_tar(
        tmp_path / "data.tar", [(name, os.fsencode(name)) for name in (*kept, *cleaned)], form=form
    )
    expected = [(cleaned.get(name, name), os.fsencode(name)) for name in (*kept, *cleaned)]
    assert entries(archive, tmp_path) == sorted(expected)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.GNUTYPE_SPARSE])
def test_link_or_sparse_file_in_a_tar(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "data.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        item = tarfile.TarInfo("ant/a.jpg")
        item.type, item.linkname = kind, "b.jpg"
        tar.addfile(item)
    with pytest.raises(DataError, match=r"ant/a.jpg is a link or sparse; pack from the unpacked"):
        listed(tmp_path / "data.tar", tmp_path)


def test_damaged_tars(tmp_path: Path) -> None:
    whole = make_tar(tmp_path / "data.tar", CONTENTS.items()).read_bytes()
    third_header = 2 * 1024
    assert whole[third_header:].startswith(b"train/bee/a.png")
    damaged = bytearray(whole)
    damaged[third_header + 150] ^= 1  # in the header's checksum
    cut, no_tar = "cut short after train/ant/b.JPEG", "damaged or not a tar archive"
    for data, message in (
        (whole[: third_header + 600], cut),  # inside an image
        (whole[: third_header + 100], cut),  # inside a header
        (whole[:third_header], cut),  # between two images
        (bytes(damaged), cut),
        (b"no tar at all " * 100, no_tar),
        (b"", no_tar),
    ):
        (tmp_path / "data.tar").write_bytes(data)
        with pytest.raises(DataError, match=message):
            listed(tmp_path / "data.tar", tmp_path)


def test_header_that_leads_back_to_itself(tmp_path: Path) -> None:
    data = bytearray(make_tar(tmp_path / "data.tar", IMAGES).read_bytes())
    size = (-512).to_bytes(12, "big", signed=True)  # so that the next header is this one
    data[MEMBER + 124 : MEMBER + 136] = size
    set_checksum(data, MEMBER)
    (tmp_path / "data.tar").write_bytes(data)
    endless = opened(tmp_path / "data.tar", tmp_path).images()
    with pytest.raises(DataError, match=r"data.tar: damaged or cut short after ant/0.jpg"):
        list(islice(endless, 100))


@pytest.mark.parametrize("mode", ["w", "w:xz", "w:gz", "w:bz2"])
@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_header_of_any_size(tmp_path: Path, mode: str, form: int) -> None:
    """It is read as a whole, and a few compressed MB may be one of many GB."""
    rows = [("ant/1.jpg", b"1"), (f"ant/{'x' * (1 << 20)}.jpg", b"2")]
    archive = make_tar(tmp_path / "data", rows, mode, form)
    with pytest.raises(
        DataError, match=r"data: damaged .* bytes to be read at once, more than 1048576"
    ):
        listed(archive, tmp_path)
    assert first_members(make_tar(archive, rows[::-1], mode, form)) == []


def test_a_thousand_tars_in_each_other(tmp_path: Path) -> None:
    archive, item = make_tar(tmp_path / "data.tar", IMAGES), tarfile.TarInfo("in.tar")
    data, heads = archive.read_bytes(), []
    for depth in range(1100):
        item.size = len(data) + depth * (512 + 1024)  # header and end mark of each
        heads.append(item.tobuf())
    archive.write_bytes(b"".join(heads[::-1]) + data + bytes(1024 * len(heads)))
    with pytest.raises(DataError, match=r"data.tar: in/in.* is in more than 100 folders or tars"):
        listed(archive, tmp_path)


@pytest.mark.slow
def test_damaged_headers_never_raise_anything_else(tmp_path: Path) -> None:
    """A byte of size or type is changed and the checksum made valid."""
    long = ("d" * 150 + "/a.jpg", b"1" * 700)
    seeded = random.Random(0)
    path = tmp_path / "data.tar"
    outcomes = {"listed": 0, "refused": 0}
    for turn in range(400):
        form = (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)[turn % 2]
        data = bytearray(make_tar(path, [long, *IMAGES], form=form).read_bytes())
        header = 512 * seeded.randrange(8)
        data[header + seeded.choice((*range(124, 136), 156))] = seeded.choice(b"\x00\x80\xff7LKxSg")
        set_checksum(data, header)
        path.write_bytes(data)
        try:
            outcomes["listed"] += bool(list(opened(path, tmp_path).images()))
        except DataError as error:
            assert str(error).startswith(f"{path}: ")
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 20
