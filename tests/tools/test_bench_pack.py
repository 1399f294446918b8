"""The benchmark of packing counts right and rejects lost images; no time is looked at."""

import argparse
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

from tools.bench import pack
from tools.bench.pack import Setting, Variant
from tools.bench.pack_files import Counts
from tools.bench.results import Row, Spread

ROOT = Path(__file__).resolve().parents[2]
BYTES = 300_000
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
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, chance = tmp_path_factory.mktemp("photographs") / "images.tar", np.random.RandomState(0)
    with tarfile.open(path, "w") as tar:
        for number in range(5):
            pixels = chance.randint(0, 256, (60 + number, 80, 3), np.uint8)
            image = simplejpeg.encode_jpeg(pixels, quality=80)
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


@pytest.mark.slow
def test_smoke_runs_every_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, work = tmp_path / "out.json", tmp_path / "work"
    given = ["--smoke", "--out", out, "--work", work, "--peers", peers(tmp_path, "pass")]
    assert pack.main([*map(str, given)]) == 0
    result = json.loads(out.read_text())
    data = result["data"]
    assert data["images"]["bytes"] >= 500_000 and data["images"]["short_sides"] == [375, 375]
    assert data["large"]["images"] == 20 and data["large"]["short_sides"] == [750, 750]
    ours = ["none", "header", "decode", "480", "480-photos"]
    readers = ["verify", "verify-deep", "list", "resplit"]
    names = {one["name"]: one for one in result["variants"]}
    assert set(names) == {
        *(f"ours-{name}-j{jobs}" for name in ours for jobs in (1, 2)),
        *readers,
        *("copy", "tar", "codecs-480", "webdataset"),
    }
    for one in names.values():
        assert all({"seconds", "wall", "cpu", "peak_mib"} <= set(run) for run in one["runs"])
        assert len(one["runs"]) == 1 and str(tmp_path / "work") not in one["command"]
    peak = names["ours-none-j2"]["runs"][0]["peak_mib"]
    assert 10 < peak < 190  # no memory of this process, in which PyTorch is
    assert (result["failed"], result["peers"]) == ({}, {"webdataset": "9.9"})
    assert [line.partition(":")[0] for line in result["skipped"]] == ["mds", "im2rec"]
    assert set(result["disk"]) == {"filesystem", "kernel", "tar"}
    printed = capsys.readouterr().out
    assert "| pass: ours-none-j2 / webdataset |" in printed and "| plan: resplit |" in printed
    assert not list(work.iterdir())


@pytest.mark.parametrize(
    ("fault", "word"),
    [
        ("image = image[:40] + b'?' + image[41:]", "checksum"),
        ("raise OSError('no more')", "no more"),
    ],
    ids=["changed", "failed"],
)
def test_a_variant_that_loses_an_image_fails(
    archive: Path, tmp_path: Path, fault: str, word: str
) -> None:
    options = ["--only", "copy,webdataset", "--rounds", 2, "--peers", peers(tmp_path, fault)]
    assert pack.main(arguments(archive, tmp_path, *options)) == 1
    result = json.loads((tmp_path / "out.json").read_text())
    assert list(result["failed"]) == ["webdataset"]
    assert word in result["failed"]["webdataset"]
    runs = {one["name"]: one["runs"] for one in result["variants"]}
    assert (len(runs["copy"]), len(runs["webdataset"])) == (2, 1)  # it is not run again
    assert not any("webdataset" in row["name"] for row in result["rows"])


@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (["--gigabytes", "1e9"], "GB needed"),
        (["--images", "/nowhere.tar"], "--images: give a tar file with JPEG photographs"),
        (["--images", "empty.tar"], "empty.tar: has no JPEG file"),
        (["--only", "magic"], "--only magic: there are copy, tar"),
    ],
)
def test_what_cannot_be_measured(
    archive: Path,
    tmp_path: Path,
    given: list[str],
    error: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    tarfile.open("empty.tar", "w").close()
    assert pack.main(arguments(archive, tmp_path, *given)) == 2
    assert error in capsys.readouterr().err
    assert not list(tmp_path.glob("work/*"))


def wrong(tmp_path: Path, name: str, printed: str = "", **data: Counts) -> str:
    """What the check of a variant finds."""
    options = argparse.Namespace(rows=2000, peers=tmp_path)
    setting = Setting(options, tmp_path, data)
    every = {one.name: one for one in pack.all_variants(setting)}
    return pack.difference(setting, every[name], tmp_path, printed)


def test_smaller_images_have_the_short_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours keep their size if they are hardly larger than it; im2rec enlarges."""
    for name, given, found, right in (
        ("ours-480-j1", (375, 1600), (375, 528), True),
        ("ours-480-j1", (375, 1600), (375, 529), False),
        ("ours-480-j1", (375, 1600), (374, 480), False),
        ("ours-480-j1", (750, 750), (479, 480), False),
        ("ours-480-j1", (100, 300), (100, 300), True),
        ("ours-480-j1", (100, 300), (100, 299), False),
        ("im2rec-480", (375, 1600), (480, 480), True),
        ("im2rec-480", (375, 1600), (375, 480), False),
    ):
        for images in (7, 6):
            written = Counts(images, 5, 5, found)
            monkeypatch.setattr(pack, "count", lambda *_, written=written: written)
            fault = wrong(tmp_path, name, large=Counts(7, 0, 0, given))
            assert (not fault) == (right and images == 7), (name, given, found)


def test_a_plan_and_a_split_of_another_length_are_wrong(tmp_path: Path) -> None:
    assert wrong(tmp_path, "list", "2,000 images") == ""
    assert wrong(tmp_path, "list", "1,999 images")
    (tmp_path / "members.pack").mkdir()
    listing = tmp_path / "members.pack" / "train_label.lst"
    listing.write_text("x\n" * 20)
    assert wrong(tmp_path, "resplit") == ""
    listing.write_text("x\n" * 19)
    assert "19 of 2000 rows" in wrong(tmp_path, "resplit")


def runs(*seconds: float, wall: float) -> list[dict[str, Any]]:
    return [{"seconds": s, "wall": wall, "cpu": 4.0, "peak_mib": 50.0} for s in seconds]


def test_rows_of_known_runs() -> None:
    variants = [Variant(name, "images", []) for name in ("copy", "ours-none-j2")]
    variants.append(Variant("verify", "pack", []))
    found = {
        "copy": runs(2.0, 4.0, wall=5.0),
        "ours-none-j2": runs(1.0, 2.0, wall=2.0),
        "verify": runs(2.0, wall=2.0),
    }
    counts = Counts(8, 16_000_000, 0, (1, 1))
    made = pack.rows(variants, found, {"images": counts, "pack": counts})
    name = "pass: ours-none-j2"
    rows = {(row.name, row.unit): row for row in made}
    assert rows[name, "s"].found == Spread(1.5, 1.0, 2.0, 2)
    assert rows[name, "MB/s"].found == Spread(12.0, 8.0, 16.0, 2)
    assert rows[name, "img/s"].found.median == 6.0
    assert rows[name, "img/CPU s"].found.median == 2.0
    assert rows["pass: copy, whole command", "s"].found.median == 5.0
    gain = Row(f"{name} / copy", Spread(2.0, 2.0, 2.0, 2), "times", "higher", True, target=1.0)
    assert rows[f"{name} / copy", "times"] == gain
    targets = {key: row.target for key, row in rows.items() if row.target is not None}
    assert targets == {
        (f"{name} / copy", "times"): 1.0,
        (f"{name}, memory", "MiB"): 200e6 / 2**20,
        ("verify: verify", "MB/s"): 1000.0,
    }
