"""The benchmark of packing counts right and tells who lost an image; no time is looked at."""

import itertools
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

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "tools" / "bench_make_rec.py"
BYTES = 300_000
LARGE = 10
ROWS = 2000
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


def peers(tmp_path: Path, fault: str) -> Path:
    """Make an environment in which a stand-in for webdataset is installed."""
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


def command(archive: Path, tmp_path: Path, *arguments: object) -> list[str]:
    places = ["--images", archive, "--work", tmp_path / "work", "--out", tmp_path / "out.json"]
    size = ["--gigabytes", BYTES / 1e9, "--classes", 3, "--large-images", LARGE, "--rows", ROWS]
    return [sys.executable, str(TOOL), *map(str, [*places, *size, *arguments])]


def run(*arguments: Any, status: int = 0) -> tuple[dict[str, Any], str]:
    """Run the benchmark; return its JSON and what it printed."""
    line = command(*arguments)
    done = subprocess.run(line, capture_output=True, text=True, cwd="/", timeout=120)
    assert done.returncode == status, done.stdout + done.stderr
    result = json.loads(Path(line[line.index("--out") + 1]).read_text())
    assert isinstance(result, dict)
    return result, done.stdout


def test_every_contestant_writes_every_byte(
    archive: Path, photographs: list[bytes], tmp_path: Path
) -> None:
    names = ["copy", "tar", "webdataset", "ours-none-j2"]
    options = ["--only", ",".join(names), "--peers", peers(tmp_path, "pass"), "--repetitions", 2]
    page = tmp_path / "table.md"
    result, printed = run(archive, tmp_path, *options, "--markdown", page)

    images, size = 0, 0
    for image in itertools.cycle(photographs):
        if size >= BYTES:
            break
        images, size = images + 1, size + len(image) + ADDED
    assert result["data"]["images"]["images"] == images
    assert result["data"]["images"]["bytes"] == size
    assert result["data"]["images"]["short_sides"] == [60, 64]

    assert sorted(row["name"] for row in result["rows"]) == sorted(names)
    for row in result["rows"]:
        assert row["wrong"] == ""
        assert len(row["runs"]) == 2
        assert all({"seconds", "wall", "cpu", "peak_mib"} <= set(run) for run in row["runs"])
        assert str(tmp_path / "work") not in row["command"]
    memory = {row["name"]: row.get("memory") for row in result["rows"]}
    assert set(memory["ours-none-j2"]) == {"parent_mib", "worker_mib"}
    assert memory["copy"] is None
    assert result["peers"] == {"webdataset": "9.9"}
    assert result["left_out"] == ["mds", "im2rec"]
    assert result["settings"]["repetitions"] == 2

    assert all(f"\n{name} " in printed for name in names)
    assert all(f"\n| {name} |" in page.read_text() for name in names)
    assert f"{images} images" in page.read_text()
    assert not list((tmp_path / "work").iterdir())


def test_the_commands_that_shrink_and_read(archive: Path, tmp_path: Path) -> None:
    names = ["codecs-480", "ours-480-j1", "ours-480-photos-j1", "verify", "verify-deep", "list"]
    names += ["resplit", "ours-help"]
    result, printed = run(archive, tmp_path, "--only", ",".join(names), "--repetitions", 1)
    assert {row["name"]: row["wrong"] for row in result["rows"]} == dict.fromkeys(names, "")
    assert result["data"]["large"]["images"] == LARGE
    assert result["data"]["large"]["short_sides"] == [750, 750]
    assert result["data"]["members"]["images"] == ROWS
    assert f"resplit of {ROWS} images" in printed


@pytest.mark.parametrize(
    ("fault", "word"),
    [
        ("return", "checksum"),
        ("image = image[:40] + b'?' + image[41:]", "checksum"),
        ("raise OSError('no more')", "no more"),
    ],
    ids=["lost", "changed", "failed"],
)
def test_who_loses_an_image_is_told(archive: Path, tmp_path: Path, fault: str, word: str) -> None:
    options = ["--only", "copy,webdataset", "--repetitions", 2, "--peers", peers(tmp_path, fault)]
    result, printed = run(archive, tmp_path, *options, status=1)
    copy, wrong = result["rows"]
    assert copy["wrong"] == ""
    assert len(copy["runs"]) == 2
    assert word in wrong["wrong"]
    assert len(wrong["runs"]) == 1  # it is not asked again
    assert f"WRONG: webdataset: {wrong['wrong']}" in printed


def test_an_interrupt_leaves_nothing(archive: Path, tmp_path: Path) -> None:
    options = ["--only", "webdataset", "--peers", peers(tmp_path, "time.sleep(100)")]
    line = command(archive, tmp_path, *options)
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    while "1/5: webdataset" not in process.stderr.readline():
        assert process.poll() is None
    os.kill(process.pid, signal.SIGINT)
    assert "temporary data is removed" in process.communicate(timeout=30)[1]
    assert process.returncode == 130
    assert not list((tmp_path / "work").iterdir())


def test_a_small_disk_is_refused_before_anything_is_made(archive: Path, tmp_path: Path) -> None:
    line = command(archive, tmp_path, "--gigabytes", "1e9")
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "GB needed" in done.stderr
    assert not list((tmp_path / "work").iterdir())
