"""The benchmark of packing counts right and rejects lost images; no time is looked at."""

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg

from mpl_fast.errors import ConfigError, DataError
from tools.bench import pack, pack_data, pack_rows, pack_variants
from tools.bench.pack_readers import Counts, tally
from tools.bench.pack_variants import Setting, Variant
from tools.bench.results import Row, Spread

ROOT = Path(__file__).resolve().parents[2]
BYTES = 300_000
ADDED = 12  # bytes of the numbered comment in each copy of a photograph
# A stand-in for webdataset, which may be absent: it writes the same files, perhaps with a fault.
PEER = """
import io, tarfile, time

class ShardWriter:
    def __init__(self, pattern, maxsize, verbose):
        self.tar, self.written = tarfile.open(pattern % 0, "w"), 0
    def __enter__(self):
        return self
    def __exit__(self, *error):
        self.tar.close()
    def write(self, sample):
        self.written += 1
        image = sample["jpg"]
        if self.written == 2:
            {fault}
        for suffix, content in (("jpg", image), ("cls", str(sample["cls"]).encode())):
            member = tarfile.TarInfo(sample["__key__"] + "." + suffix)
            member.size = len(content)
            self.tar.addfile(member, io.BytesIO(content))
"""


@pytest.fixture(scope="module")
def photographs() -> list[bytes]:
    chance = np.random.RandomState(0)
    pixels = [chance.randint(0, 256, (60 + n, 80, 3), np.uint8) for n in range(5)]
    return [simplejpeg.encode_jpeg(image, quality=80) for image in pixels]


@pytest.fixture(scope="module")
def archive(photographs: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photographs") / "images.tar"
    with tarfile.open(path, "w") as tar:
        for number, image in enumerate(photographs):
            member = tarfile.TarInfo(f"train/{number}.JPEG")
            member.size = len(image)
            tar.addfile(member, BytesIO(image))
    return path


@pytest.fixture(autouse=True)
def same_signal_handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def peers(tmp_path: Path, fault: str) -> Path:
    """An environment in which a stand-in for webdataset is installed."""
    library = tmp_path / "library"
    metadata = library / "webdataset-9.9.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: webdataset\nVersion: 9.9\n")
    (library / "webdataset.py").write_text(PEER.format(fault=fault))
    python = tmp_path / "peers" / "streams" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nPYTHONPATH={library} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return tmp_path / "peers"


def arguments(archive: Path, tmp_path: Path, *more: object) -> list[str]:
    places = ["--images", archive, "--work", tmp_path / "work", "--out", tmp_path / "out.json"]
    size = ["--gigabytes", BYTES / 1e9, "--large-images", 10, "--rows", 2000]
    return [str(part) for part in (*places, *size, *more)]


def run(archive: Path, tmp_path: Path, *more: object, status: int = 0) -> dict[str, Any]:
    assert pack.main(arguments(archive, tmp_path, *more)) == status
    result: dict[str, Any] = json.loads((tmp_path / "out.json").read_text())
    return result


def test_every_variant_writes_every_byte(
    archive: Path, photographs: list[bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["copy", "tar", "webdataset", "ours-none-j2"]
    options = ["--only", ",".join(names), "--peers", peers(tmp_path, "pass"), "--rounds", 2]
    result = run(archive, tmp_path, *options)

    images, size = 0, 0
    for image in itertools.cycle(photographs):
        if size >= BYTES:
            break
        images, size = images + 1, size + len(image) + ADDED
    counted = result["data"]["images"]
    assert (counted["images"], counted["bytes"]) == (images, size)
    assert counted["short_sides"] == [60, 64]

    assert result["failed"] == {}
    variants = {one["name"]: one for one in result["variants"]}
    assert sorted(variants) == sorted(names)
    for one in variants.values():
        assert len(one["runs"]) == 2
        assert all({"seconds", "wall", "cpu", "peak_mib"} <= set(run) for run in one["runs"])
        assert str(tmp_path / "work") not in one["command"]
    peak = max(run["peak_mib"] for run in variants["ours-none-j2"]["runs"])
    assert 10 < peak < 190  # no memory of this process, in which PyTorch is
    assert result["peers"] == {"webdataset": "9.9"}
    assert [line.partition(":")[0] for line in result["skipped"]] == ["mds", "im2rec"]
    assert set(result["disk"]) == {"filesystem", "kernel", "tar"}

    printed = capsys.readouterr().out
    assert all(f"\n| pass: {name} |" in printed for name in names)
    assert "| pass: ours-none-j2 / webdataset |" in printed
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.slow
def test_smoke_runs_every_command(tmp_path: Path) -> None:
    out, work = tmp_path / "out.json", tmp_path / "work"
    assert pack.main(["--smoke", "--out", str(out), "--work", str(work)]) == 0
    result = json.loads(out.read_text())
    assert result["data"]["large"]["images"] == pack.TINY["large_images"]
    assert result["data"]["large"]["short_sides"] == [750, 750]
    assert result["data"]["members"]["images"] == pack.TINY["rows"]
    rows = {(row["name"], row["unit"]) for row in result["rows"]}
    jobs = [f"ours-480{data}-j{n}" for data in ("", "-photos") for n in (1, 2)]
    checks = [f"ours-{check}-j{n}" for check in ("none", "header", "decode") for n in (1, 2)]
    readers = ["verify", "verify-deep", "list", "resplit", "ours-help"]
    others = ["copy", "tar", "codecs-480"]
    names = {one["name"] for one in result["variants"]}
    assert names == {*jobs, *checks, *readers, *others}
    assert {("plan: resplit", "s"), ("verify: verify-deep", "img/s")} <= rows
    assert not list(work.iterdir())


@pytest.mark.parametrize(
    ("fault", "word"),
    [
        ("return", "checksum"),
        ("image = image[:40] + b'?' + image[41:]", "checksum"),
        ("raise OSError('no more')", "no more"),
    ],
    ids=["lost", "changed", "failed"],
)
def test_a_variant_that_loses_an_image_fails(
    archive: Path, tmp_path: Path, fault: str, word: str
) -> None:
    options = ["--only", "copy,webdataset", "--rounds", 2, "--peers", peers(tmp_path, fault)]
    result = run(archive, tmp_path, *options, status=1)
    assert list(result["failed"]) == ["webdataset"]
    assert word in result["failed"]["webdataset"]
    runs = {one["name"]: one["runs"] for one in result["variants"]}
    assert len(runs["copy"]) == 2
    assert len(runs["webdataset"]) == 1  # it is not run again
    assert not any("webdataset" in row["name"] for row in result["rows"])


def test_an_interrupt_leaves_nothing(archive: Path, tmp_path: Path) -> None:
    options = ["--only", "webdataset", "--peers", peers(tmp_path, "time.sleep(1000)")]
    line = [sys.executable, "-m", "tools.bench", "pack", *arguments(archive, tmp_path, *options)]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stderr is not None
    while "1/5: webdataset" not in process.stderr.readline():
        assert process.poll() is None
    os.kill(process.pid, signal.SIGINT)
    assert "temporary data is removed" in process.communicate()[1]
    assert process.returncode == 130
    assert not list((tmp_path / "work").iterdir())


def test_a_small_disk_is_refused_before_anything_is_made(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pack.main(arguments(archive, tmp_path, "--gigabytes", "1e9")) == 2
    assert "GB needed" in capsys.readouterr().err
    assert not list((tmp_path / "work").iterdir())


def test_photographs_are_needed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], archive: Path
) -> None:
    assert pack.main(["--out", str(tmp_path / "out.json"), "--images", "/nowhere.tar"]) == 2
    assert "--images: give a tar file with JPEG photographs" in capsys.readouterr().err
    empty = tmp_path / "empty.tar"
    tarfile.open(empty, "w").close()
    with pytest.raises(DataError, match="has no JPEG file"):
        pack_data.photographs(empty, 100)
    assert len(pack_data.photographs(archive, 1)) == 1
    assert tally(pack_data.photographs(None, 1)).short_sides == (375, 375)


def new_setting(tmp_path: Path, **data: Counts) -> Setting:
    options = argparse.Namespace(rows=2000, peers=tmp_path)
    return Setting(options, tmp_path, {}, data)


def test_patterns_choose_variants(tmp_path: Path) -> None:
    every = pack_variants.all_variants(new_setting(tmp_path))
    names = [one.name for one in pack.choose(every, "copy,ours-none-*")]
    assert names == ["copy", "ours-none-j1", "ours-none-j2"]
    with pytest.raises(ConfigError, match="--only magic: there are copy, tar"):
        pack.choose(every, "magic")


def wrong(setting: Setting, name: str, printed: str = "") -> str:
    """What the check of a variant of `new_setting` finds."""
    every = {one.name: one for one in pack_variants.all_variants(setting)}
    made = every.get(name) or every["ours-480-j1"]._replace(name=name)
    return pack_variants.difference(setting, made, setting.folder, printed)


@pytest.mark.parametrize(
    ("name", "given", "found", "right"),
    [
        ("ours-480-j1", (375, 1600), (375, 528), True),
        ("ours-480-j1", (375, 1600), (375, 480), True),
        ("ours-480-j1", (375, 1600), (375, 529), False),
        ("ours-480-j1", (375, 1600), (374, 480), False),
        ("ours-480-j1", (750, 750), (480, 480), True),
        ("ours-480-j1", (750, 750), (479, 480), False),
        ("ours-480-j1", (100, 300), (100, 300), True),
        ("ours-480-j1", (100, 300), (100, 299), False),
        ("im2rec-480", (375, 1600), (480, 480), True),
        ("im2rec-480", (375, 1600), (375, 480), False),
        ("im2rec-480", (375, 1600), (480, 481), False),
    ],
)
def test_smaller_images_have_the_short_side(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    given: tuple[int, int],
    found: tuple[int, int],
    right: bool,
) -> None:
    """Ours keep their size if they are hardly larger than it; im2rec enlarges."""
    setting = new_setting(tmp_path, large=Counts(7, 0, 0, given))
    monkeypatch.setattr(pack_variants, "count", lambda *_: Counts(7, 5, 5, found))
    assert (wrong(setting, name) == "") == right
    monkeypatch.setattr(pack_variants, "count", lambda *_: Counts(6, 5, 5, found))
    assert "not 7 images" in wrong(setting, name)


def test_a_plan_and_a_split_of_another_length_are_wrong(tmp_path: Path) -> None:
    setting = new_setting(tmp_path)
    assert wrong(setting, "list", "2,000 images") == ""
    assert wrong(setting, "list", "1,999 images")
    (tmp_path / "members.pack").mkdir()
    listing = tmp_path / "members.pack" / "train_label.lst"
    listing.write_text("x\n" * 20)
    assert wrong(setting, "resplit") == ""
    listing.write_text("x\n" * 19)
    assert "19 of 2000 rows" in wrong(setting, "resplit")


def runs(*seconds: float, **more: float) -> list[dict[str, Any]]:
    return [{"seconds": s, "wall": s, "cpu": 4.0, "peak_mib": 50.0, **more} for s in seconds]


def test_rows_of_known_runs() -> None:
    variants = [Variant(name, "pass", []) for name in ("copy", "im2rec-n1", "im2rec-n2")]
    variants.append(Variant("ours-none-j2", "pass", []))
    found = {
        "copy": runs(2.0, 4.0, wall=5.0),
        "im2rec-n1": runs(9.0, 9.0),
        "im2rec-n2": runs(6.0, 8.0),
        "ours-none-j2": runs(1.0, 2.0, inside=0.5),
    }
    made = pack_rows.rows(variants, found, {"images": Counts(8, 16_000_000, 0, (1, 1))})
    rows = {(row.name, row.unit): row for row in made}
    name = "pass: ours-none-j2"
    assert rows[name, "s"].found == Spread(1.5, 1.0, 2.0, 2)
    assert rows[name, "MB/s"].found == Spread(12.0, 8.0, 16.0, 2)
    assert rows[name, "img/s"].found.median == 6.0
    assert rows[name, "img/CPU s"].found.median == 2.0
    assert rows[f"{name}, memory", "MiB"].found.median == 50.0
    assert rows[f"{name}, without start", "s"].found.median == 0.5
    assert rows["pass: copy, whole command", "s"].found.median == 5.0
    assert (f"{name}, whole command", "s") not in rows
    assert rows[f"{name} / copy", "times"] == Row(
        f"{name} / copy", Spread(2.0, 2.0, 2.0, 2), "times", "higher", steady=True, target=1.0
    )
    best = rows[f"{name} / {pack_rows.BEST_IM2REC}", "times"]
    assert (best.found.high, best.target) == (6.0, 2.0)
    assert rows["pass: im2rec-n1 / copy", "times"].target is None
    assert not any("mds" in row.name for row in made)


def test_targets_of_reading_and_of_memory() -> None:
    verify, listing = Variant("verify", "verify", []), Variant("list", "plan", [])
    packing = Variant("ours-none-j1", "pass", [], "rec")
    data = {"images": Counts(5, 10**9, 0, (1, 1)), "members": Counts(9, 0, 0, (0, 0))}
    found = {"verify": runs(2.0), "list": runs(3.0), "ours-none-j1": runs(1.0)}
    made = pack_rows.rows([verify, listing, packing], found, data)
    targets = {(row.name, row.unit): row.target for row in made if row.target is not None}
    assert targets == {
        ("verify: verify", "MB/s"): 1000.0,
        ("plan: list", "s"): 60.0,
        ("pass: ours-none-j1, memory", "MiB"): 200e6 / 2**20,
    }
