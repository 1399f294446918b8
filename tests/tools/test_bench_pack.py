"""The benchmark of packing counts right and rejects lost images; no time is looked at."""

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg

from tests.tiny_run import ROOT
from tools.bench import pack, plan
from tools.bench.pack import VARIANTS, Bench, wrong_sides
from tools.bench.pack_files import Data
from tools.bench.results import Row, Spread

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


def peers(tmp_path: Path, fault: str) -> Path:
    """An environment in which a stand-in for webdataset is installed."""
    environment = tmp_path / "peers" / "streams"
    library = environment / "lib" / "python3" / "site-packages"
    metadata = library / "webdataset-9.9.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: webdataset\nVersion: 9.9\n")
    (library / "webdataset.py").write_text(PEER.format(fault=fault))
    python = environment / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nPYTHONPATH={library} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return tmp_path / "peers"


def arguments(archive: Path, tmp_path: Path, *more: object) -> list[str]:
    places = ["--images", archive, "--work", tmp_path / "work", "--out", tmp_path / "out.json"]
    size = ["--gigabytes", 0.0003, "--large-images", 10, "--rows", 2000]
    return [str(part) for part in (*places, *size, *more)]


@pytest.mark.slow
def test_smoke_runs_every_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, work = tmp_path / "out.json", tmp_path / "work"
    given = ["--smoke", "--out", out, "--work", work, "--peers", peers(tmp_path, "pass")]
    given += ["--only", "[!o]*,*-j2"]
    assert pack.main([*map(str, given)]) == 0
    result = json.loads(out.read_text())
    data = result["data"]
    assert data["pass"]["bytes"] >= 500_000 and data["pass"]["short_sides"] == [375, 375]
    assert data["short"]["images"] == 20 and data["short"]["short_sides"] == [750, 750]
    names = {one["name"]: one for one in result["variants"]}
    left_out = ("mds", "im2rec")
    assert list(names) == [x for x in VARIANTS if not (x.startswith(left_out) or x.endswith("j1"))]
    for one in names.values():
        assert all({"seconds", "wall", "cpu", "peak_mib"} < set(run) for run in one["runs"])
        assert len(one["runs"]) == 1
    peak = names["ours-none-j2"]["runs"][0]["peak_mib"]
    assert 10 < peak < 190  # no memory of this process, in which PyTorch is
    assert (result["failed"], result["peers"]) == ({}, {"webdataset": "9.9"})
    assert [line.partition(":")[0] for line in result["skipped"]] == ["mds", "im2rec"]
    assert all(result["disk"][key] for key in ("filesystem", "kernel", "tar"))
    printed = capsys.readouterr().out
    assert "| pass: ours-none-j2 / webdataset |" in printed and "| plan: resplit |" in printed
    assert not list(work.iterdir())


@pytest.mark.parametrize(
    ("fault", "word"),
    [
        ("return", "1 images are lost"),
        ("image = image[:40] + b'?' + image[41:]", "1 images are lost"),
        ("self.write({**sample, '__key__': 'again'})", "1 images are lost"),
        ("raise OSError('no more')", "no more"),
    ],
    ids=["lost", "changed", "twice", "failed"],
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
    os.kill(process.pid, signal.SIGTERM)
    printed = process.communicate()[1]  # the line of progress again, if the signal came within it
    assert printed.endswith("tools.bench: interrupted\n") and "Traceback" not in printed
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


@pytest.mark.parametrize(
    ("name", "given", "found", "right"),
    [
        ("ours-480-j1", (375, 1600), (375, 528), True),
        ("ours-480-j1", (375, 1600), (375, 529), False),
        ("ours-480-j1", (375, 1600), (374, 480), False),
        ("ours-480-j1", (750, 750), (479, 480), False),
        ("ours-480-j1", (100, 300), (100, 300), True),
        ("ours-480-j1", (100, 300), (100, 299), False),
        ("im2rec-480", (375, 1600), (480, 480), True),
        ("im2rec-480", (375, 1600), (375, 480), False),
    ],
)
def test_smaller_images_have_the_short_side(
    name: str, given: tuple[int, int], found: tuple[int, int], right: bool
) -> None:
    assert bool(wrong_sides(name, found, Data(2, 0, given))) != right
    assert wrong_sides(name, found, Data(3, 0, given))


def test_outputs_that_are_wrong_although_the_command_ended_well(tmp_path: Path) -> None:
    bench = Bench(argparse.Namespace(rows=2000, peers=tmp_path), tmp_path)

    def fault(name: str, printed: str = "") -> str:
        return bench.fault(name, {"code": 0, "printed": printed})

    assert fault("list", "2,000 images") == ""
    assert fault("list", "1,999 images") == "2000 is not in the plan"
    (tmp_path / "plan" / "pack").mkdir(parents=True)
    listing = tmp_path / "plan" / "pack" / "train_label.lst"
    listing.write_text("x\n" * 20)
    assert fault("resplit") == ""
    listing.write_text("x\n" * 19)
    assert fault("resplit") == "19 of 2000 rows are labeled"
    bench.out.mkdir()
    (bench.out / "train.idx").write_text("0\t0\n")
    assert "train.idx lists 1 records, there are 0" in fault("ours-480-j1")
    (bench.out / "train.rec").write_bytes(bytes(8))
    assert "train.rec has no record at byte 0" in fault("ours-none-j1")


def runs(*seconds: float, wall: float) -> list[dict[str, Any]]:
    return [{"seconds": s, "wall": wall, "cpu": 4.0, "peak_mib": 50.0} for s in seconds]


def test_rows_of_known_runs() -> None:
    found = {
        "copy": runs(2.0, 4.0, wall=5.0),
        "ours-none-j2": runs(1.0, 2.0, wall=2.0),
        "verify": runs(2.0, wall=2.0),
    }
    data = Data(8, 16_000_000, (1, 1))
    made = pack.rows(found, {"pass": data, "verify": data}, {"pass": 2e9})
    name = "pass: ours-none-j2"
    rows = {(row.name, row.unit): row for row in made}
    assert rows[name, "s"].found == Spread(1.5, 1.0, 2.0, 2)
    assert rows[name, "MB/s"].found == Spread(12.0, 8.0, 16.0, 2)
    assert (rows[name, "MB/s"].limit, rows["verify: verify", "MB/s"].limit) == (2000.0, None)
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


def test_the_plan_of_made_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, work = tmp_path / "plan.json", tmp_path / "work"
    work.mkdir()
    assert plan.main(["--smoke", "--out", str(out), "--work", str(work)]) == 0
    rows = {row["name"]: row["median"] for row in json.loads(out.read_text())["rows"]}
    parts = [rows[f"10000 images: {name}"] for name in ("plan", "finish", "both")]
    assert min(parts) > 0
    assert parts[0] + parts[1] == pytest.approx(parts[2])
    assert rows["10000 images: memory"] < 300  # PyTorch's is more
    assert not [*work.iterdir()]
    monkeypatch.setitem(plan.TINY, "rows", [2000])  # of 1000 classes: less than 10 % are one each
    assert plan.main(["--smoke", "--out", str(out), "--work", str(work)]) == 1
    assert "2000 images" in json.loads(out.read_text())["failed"]
