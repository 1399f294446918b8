"""A shard whose disk is full or whose process is killed leaves no file with its final name."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from mpl_fast.data.records import image_record
from mpl_fast.errors import OutputError
from mpl_fast.packing.options import ImageOptions
from mpl_fast.packing.plan.table import TABLE, RecordRow
from mpl_fast.packing.write.shard import write_shard
from mpl_fast.packing.write.shard_receipt import ShardReceipt
from tests.packing.packs import FIRST_ID, SHARD, files, make_table, one_file

ROOT = Path(__file__).resolve().parents[2]
UNCHECKED = ImageOptions(check="none")
PAGE = 4096
# Tells of the peak memory, which getrusage would mix with that of the process that started it.
PACK = """
import sys
from pathlib import Path
from mpl_fast.packing.write.shard import write_shard
from mpl_fast.packing.options import ImageOptions

done = 0
def advance(images, size):
    global done
    done += 1
    if done == stop:
        print("stopped", flush=True)
        sys.stdin.read()

work, check, stop = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
written = write_shard(work, 0, ImageOptions(check=check), 4, advance)
status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
print(written.size, status["VmHWM"].split()[0])
"""


def mount(place: Path, options: str) -> None:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"needs the mount command ({error})")
    if done.returncode:
        pytest.skip(f"needs the right to mount a small disk ({done.stderr.strip()})")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a folder on a disk of 20 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount(place, "size=20m")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def plan_images(tmp_path: Path, work: Path, count: int) -> list[bytes]:
    """Plan images of 1 MB each, all from one archive; return them."""
    noise = np.random.default_rng(0).bytes(count + 1_000_000)
    (tmp_path / "x.tar").write_bytes(noise)
    rows = [
        RecordRow(FIRST_ID + number, number % 3, 1, "x.jpg", 0, "x.jpg", number, 1_000_000, 0)
        for number in range(count)
    ]
    make_table(work, [one_file("archive", tmp_path / "x.tar")], rows)
    return [noise[number : number + 1_000_000] for number in range(count)]


def expected(images: list[bytes]) -> bytes:
    return b"".join(
        image_record(number % 3, FIRST_ID + number, image) for number, image in enumerate(images)
    )


@pytest.mark.parametrize("count", [21, 100])
def test_a_full_disk(tmp_path: Path, small_disk: Path, count: int) -> None:
    """It fills with the last bytes, or long before; with more room the same command works."""
    images = plan_images(tmp_path, small_disk, count)
    with pytest.raises(OutputError, match=f"^{small_disk}: No space left on device$"):
        write_shard(small_disk, 0, UNCHECKED, 2, lambda images, size: None)
    assert [path.name for path in small_disk.iterdir()] == [TABLE]
    mount_options = ["mount", "-o", "remount,size=200m", str(small_disk)]
    subprocess.run(mount_options, check=True)
    write_shard(small_disk, 0, UNCHECKED, 2, lambda images, size: None)
    assert (small_disk / SHARD).read_bytes() == expected(images)


@pytest.mark.parametrize(("pages", "names"), [(-1, {TABLE}), (0, {TABLE, SHARD})])
def test_a_disk_that_fills_with_the_last_page(
    tmp_path: Path, small_disk: Path, pages: int, names: set[str]
) -> None:
    """At the end of the records, or when what finish needs beside them is saved."""
    images = plan_images(tmp_path, small_disk, 9)
    needed = -(-len(expected(images)) // PAGE) + pages
    disk = os.statvfs(small_disk)
    (small_disk / "ballast").write_bytes(bytes((disk.f_bavail - needed) * PAGE))
    with pytest.raises(OutputError, match=r"No space left on device$"):
        write_shard(small_disk, 0, UNCHECKED, 0, lambda images, size: None)
    found = {path.name for path in small_disk.iterdir()} - {"ballast", f"{SHARD}.done.tmp"}
    assert found == names
    (small_disk / "ballast").unlink()
    done = write_shard(small_disk, 0, UNCHECKED, 0, lambda images, size: None)
    assert (small_disk / SHARD).read_bytes() == expected(images)
    assert ShardReceipt.load(small_disk / f"{SHARD}.done").sha256 == done.sha256


@pytest.mark.parametrize("left_over", [False, True])
def test_a_read_only_disk(tmp_path: Path, small_disk: Path, left_over: bool) -> None:
    plan_images(tmp_path, small_disk, 2)
    if left_over:
        (small_disk / f"{SHARD}.tmp").write_bytes(b"of a killed run")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OutputError, match=f"^{small_disk}/{SHARD}.tmp: Read-only file system$"):
        write_shard(small_disk, 0, UNCHECKED, 0, lambda images, size: None)


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    """As when the output is deleted during the run."""
    plan_images(tmp_path, tmp_path / "work", 3)

    told: list[int] = []

    def advance(images: int, size: int) -> None:
        if not told:
            shutil.rmtree(tmp_path / "work")
        told.append(size)

    with pytest.raises(OutputError, match=r"work.*: No such file or directory$"):
        write_shard(tmp_path / "work", 0, UNCHECKED, 0, advance)
    assert told == [1_000_000] * 3


def pack(work: Path, check: str, stop: int) -> "subprocess.Popen[str]":
    """Start a process that packs the shard and that waits after `stop` images."""
    return subprocess.Popen(
        [sys.executable, "-c", PACK, str(work), check, str(stop)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_killed_process_leaves_no_final_name(tmp_path: Path) -> None:
    images = plan_images(tmp_path, tmp_path / "work", 30)
    with pack(tmp_path / "work", "none", 20) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "stopped\n"
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == [TABLE, f"{SHARD}.tmp"]
    done = write_shard(tmp_path / "work", 0, UNCHECKED, 0, lambda images, size: None)
    assert (tmp_path / "work" / SHARD).read_bytes() == expected(images)
    assert done.size == len(expected(images))
    assert not (tmp_path / "work" / f"{SHARD}.tmp").exists()


def peak_memory(work: Path, check: str, size: int) -> int:
    """Pack in a process of its own, which has to write `size` bytes; return its peak, in MB."""
    out, _ = pack(work, check, 0).communicate()
    written, peak = map(int, out.split())
    assert written == size
    return peak * 1024 // 1_000_000


@pytest.mark.slow
def test_memory_does_not_grow_with_the_shard(tmp_path: Path) -> None:
    plan_images(tmp_path, tmp_path / "work", 300)
    assert 20 < peak_memory(tmp_path / "work", "none", 300 * 1_000_032) < 200


def test_memory_does_not_grow_with_decoded_images(tmp_path: Path) -> None:
    pixels = np.zeros((1500, 2000, 3), np.uint8)
    pixels[::3] = np.arange(2000, dtype=np.uint8)[:, None]
    image = bytes(simplejpeg.encode_jpeg(pixels))
    source, rows = files(tmp_path / "src", [image] * 40)
    make_table(tmp_path / "work", [source], rows)
    size = len(expected([image] * 40))
    assert 20 < peak_memory(tmp_path / "work", "decode", size) < 200
