"""Trees, archives, plans and packs for tests, make_rec in the test's own process, and readers."""

import contextlib
import hashlib
import io
import json
import os
import signal
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from unittest import mock

import cv2
import numpy as np
import simplejpeg

from mpl_fast.data.records import image_record
from mpl_fast.packing.check.verify import Report, verify
from mpl_fast.packing.cli import main
from mpl_fast.packing.options import ImageOptions, Json, PackOptions, SplitOptions
from mpl_fast.packing.plan.prepare import plan_to
from mpl_fast.packing.plan.table import (
    TABLE,
    RecordRow,
    ShardRow,
    SourceRow,
    Table,
    WrittenRow,
    create_table,
    image_key,
    open_table,
)
from mpl_fast.packing.publish.finish import finish
from mpl_fast.packing.publish.out_folder import WORK
from mpl_fast.packing.write.pool import Job
from mpl_fast.packing.write.shard_job import run_job

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "make_rec.py"
MAGIC = bytes.fromhex("0a23d7ce")
CLASSES = ("ant", "bee", "cat")
KEEP = ImageOptions(check="none")
FIRST_ID = 7  # of the records of make_table
SHARD = "train.rec"  # of make_table
LIMIT = 600  # seconds until a process that should end is taken for stuck


# Images, trees and archives.


def jpeg(seed: int, size: int = 12) -> bytes:
    """Return a JPEG of size x size pixels, different for every seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    return bytes(simplejpeg.encode_jpeg(pixels))


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 7, 3), np.uint8)
    return bytes(cv2.imencode(".png", pixels)[1])


def with_magic(image: bytes) -> bytes:
    """Return a JPEG with two aligned magic words in a comment: its record has several parts."""
    return image[:2] + b"\xff\xfe\x00\x0c" + b"--" + MAGIC * 2 + image[2:]


def make_tree(root: Path, contents: Mapping[str, bytes]) -> Path:
    """Write files below root, which is returned."""
    for name, content in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def image_tree(tmp_path: Path) -> Path:
    """Make and return a folder with train/ (3 classes of 8) and val/ (3 classes of 2)."""
    contents = {
        f"{split}/{name}/{number}.jpg": jpeg(1000 * count + 100 * label + number)
        for split, count in (("train", 8), ("val", 2))
        for label, name in enumerate(CLASSES)
        for number in range(count)
    }
    contents["train/bee/0.jpg"] = with_magic(contents["train/bee/0.jpg"])
    contents["train/cat/0.jpg"] = png(0)  # a PNG named .jpg, as one of ImageNet's
    contents["train/cat/1.JPEG"] = contents.pop("train/cat/1.jpg")
    del contents["train/cat/2.jpg"]
    contents["train/cat/2.png"] = png(2)
    return make_tree(tmp_path / "tree", contents)


def make_tar(
    path: Path,
    contents: Iterable[tuple[str, bytes]],
    mode: str = "w",
    form: int = tarfile.PAX_FORMAT,
) -> Path:
    """Write a tar archive, which is returned; a name that ends in "/" is a folder's."""
    with tarfile.open(path, mode, format=form, errors="surrogateescape") as tar:  # type: ignore[call-overload]
        for name, content in contents:
            item = tarfile.TarInfo(name.rstrip("/"))
            item.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            item.size = len(content)
            tar.addfile(item, io.BytesIO(content))
    return path


def make_records(path: Path, rows: Iterable[tuple[float, int, bytes]]) -> Path:
    """Write records of (label, id, image), and return their file."""
    path.write_bytes(b"".join(image_record(label, number, image) for label, number, image in rows))
    return path


# make_rec.


class Done(NamedTuple):
    """What a run of make_rec printed."""

    stdout: str
    stderr: str


def run(
    *arguments: object, status: int = 0, folder: Path | None = None, pool: bool = False
) -> Done:
    """Run make_rec in this process, from `folder`; check its exit code.

    Without `pool` the jobs run one by one in this process, not in worker processes.
    """
    stops = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with contextlib.ExitStack() as stack:
        out, errors = io.TextIOWrapper(io.BytesIO()), io.StringIO()
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(errors))
        stack.callback(os.chdir, Path.cwd())
        os.chdir(folder or "/")
        for module in () if pool else ("pack", "check.verify"):
            stack.enter_context(mock.patch(f"mpl_fast.packing.{module}.run_jobs", run_in_order))
        try:
            code = main([*map(str, arguments)])
        except SystemExit as end:
            code = 0 if end.code is None else int(end.code)
        finally:
            for number, handler in stops.items():
                signal.signal(number, handler)
        out.flush()
        printed = out.buffer.getvalue().decode(errors="surrogateescape")
    assert code == status, errors.getvalue()
    return Done(printed, errors.getvalue())


def run_in_order(
    jobs: Sequence[Job[T]], processes: int, progress: Callable[[int, int], None]
) -> list[T]:
    """Run jobs in this process."""
    return [job.call(lambda records, size: None) for job in jobs]


def verified(root: Path, *, deep: bool = False) -> Report:
    """Verify a pack in this process."""
    with mock.patch("mpl_fast.packing.check.verify.run_jobs", run_in_order):
        return verify(root, deep=deep, processes=1, progress=lambda records, size: None)


def run_process(*arguments: object, status: int = 0, limit: str = "unlimited") -> Done:
    """Run tools/make_rec.py in a process whose files are at most `limit` KiB long."""
    command = ["bash", "-c", f'ulimit -f {limit}; exec "$@"', "bash", *command_line(*arguments)]
    done = subprocess.run(
        command, cwd="/", env=environment(), capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return Done(done.stdout, done.stderr)


def command_line(*arguments: object) -> list[str]:
    return [sys.executable, str(TOOL), *map(str, arguments)]


def environment() -> dict[str, str]:
    """Return the environment of a user: the tool has to find its package by itself."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def pack(*arguments: object, out: Path, pool: bool = False) -> Path:
    """Pack into out, which is returned."""
    run("pack", *arguments, "--out", out, pool=pool)
    return out


def refuse(*arguments: object, status: int, command: str = "pack") -> str:
    """Run make_rec, which has to end with `status` and one line of error; return the line."""
    return error_of(run(command, *arguments, status=status))


def error_of(done: Done) -> str:
    """Return the one error of a run, its last line; nothing may be on standard output."""
    assert done.stdout == ""
    line = done.stderr.splitlines()[-1]
    assert line.startswith("make_rec: error: ")
    assert done.stderr.count("error:") == 1
    return line


# Plans and packs made step by step.


class Planned:
    """What a table says when it is read once more, all of it."""

    def __init__(self, path: Path) -> None:
        with open_table(path) as table:
            self.shards: list[ShardRow] = table.shards()
            self.rows: list[RecordRow] = [row for s in self.shards for row in table.records(s)]
            self.classes = table.classes()
            self.keys = [image_key(self.classes, row) for row in self.rows]

    def of(self, prefix: str) -> list[RecordRow]:
        """Return the records of the files of a prefix."""
        ids = {
            number
            for shard in self.shards
            if shard.prefix == prefix
            for number in range(shard.first_id, shard.first_id + shard.records)
        }
        return [row for row in self.rows if row.id in ids]

    def labels(self) -> dict[str, int]:
        return {name: row.label for name, row in zip(self.keys, self.rows, strict=True)}


def options_of(src: Path, out: Path, how: SplitOptions, val: Path | None = None) -> PackOptions:
    """Return what it takes to pack files as they are."""
    options = PackOptions(src=(str(src),), out=out, split=how, image=KEEP, quiet=True)
    return replace(options, val=str(val) if val else None)


def plan_work(options: PackOptions) -> Path:
    """Make the work folder of options with its plan, and return it."""
    work = options.out / WORK
    work.mkdir(parents=True, exist_ok=True)
    plan_to(work / TABLE, options)
    return work


def write_shards(work: Path, image_options: ImageOptions = KEEP) -> Path:
    """Write every shard of the plan in work."""
    with open_table(work / TABLE) as table:
        shards = table.shards()
    for shard in shards:
        run_job(work, shard, image_options, 0, lambda images, size: None)
    return work


def finished(options: PackOptions) -> tuple[Path, Json]:
    """Return the work folder of a pack that only lacks its manifest, and the manifest."""
    work = write_shards(plan_work(options), options.image)
    return work, finish(work)


def written_rows(table: Table, shard: ShardRow) -> list[tuple[RecordRow, WrittenRow]]:
    """Return the records that a shard holds, in order, with their places in it."""
    return list(table.written(shard.ids))


# A table of one shard, made row by row.


def folder(path: Path) -> SourceRow:
    """Plan a folder as source 0."""
    return SourceRow(0, "photos", "folder", str(path), 0, 0)


def one_file(kind: str, path: Path, number: int = 0) -> SourceRow:
    """Plan a file that holds many images."""
    stat = path.stat()
    return SourceRow(number, path.name, kind, str(path), stat.st_size, stat.st_mtime_ns)


def own_file(number: int, path: Path) -> RecordRow:
    """Plan an image in a file of its own in the folder that is source 0."""
    stat = path.stat()
    return RecordRow(
        FIRST_ID + number,
        number % 3,
        1,
        path.name,
        0,
        path.name,
        -1,
        stat.st_size,
        stat.st_mtime_ns,
    )


def files(place: Path, images: Sequence[bytes]) -> tuple[SourceRow, list[RecordRow]]:
    """Write images as files below place, the i-th called i.jpg; return their plan."""
    place.mkdir(exist_ok=True)
    rows = []
    for number, image in enumerate(images):
        path = place / f"{number}.jpg"
        path.write_bytes(image)
        rows.append(own_file(number, path))
    return folder(place), rows


def make_table(work: Path, sources: Sequence[SourceRow], rows: Sequence[RecordRow]) -> None:
    """Write the table of a single shard, number 0, into the new folder work."""
    work.mkdir(exist_ok=True)
    table = create_table(work / TABLE)
    table.execute("BEGIN")
    table.executemany("INSERT INTO classes VALUES(?, ?)", enumerate(CLASSES))
    table.executemany("INSERT INTO sources VALUES(?, ?, ?, ?, ?, ?)", sources)
    shard = (0, "train", SHARD, FIRST_ID, len(rows), sum(row.size for row in rows), "what", "when")
    table.execute("INSERT INTO shards VALUES(?, ?, ?, ?, ?, ?, ?, ?)", shard)
    table.executemany("INSERT INTO records VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
    table.execute("COMMIT")
    table.close()


# Readers of finished packs.


def read_split(root: Path, stem: str) -> list[tuple[int, float, str, bytes]]:
    """Return (id, label, class/name, image) of every record that stem's .idx and .lst list."""
    listed = [split_line(line) for line in (root / f"{stem}.lst").read_bytes().splitlines()]
    # The records of the shared layout lie in train*.rec; a padded index repeats some lines.
    own = [path for path in root.glob(f"{stem}*.rec") if path.name[len(stem)] in ".-"]
    files = own or root.glob(f"{stem.partition('_')[0]}*.rec")
    content = b"".join(path.read_bytes() for path in sorted(files))
    rows = []
    index = dict.fromkeys((root / f"{stem}.idx").read_text().splitlines())
    for (number, label, key), line in zip(listed, index, strict=True):
        name, offset = line.split("\t")
        payload = read_record(content, int(offset))
        flag, stored, record_id, second = struct.unpack("<IfQQ", payload[:24])
        assert (flag, second, record_id, stored) == (0, 0, int(number), float(label))
        assert name == number
        rows.append((record_id, stored, key, payload[24:]))
    return rows


def split_line(line: bytes) -> list[str]:
    return os.fsdecode(line).split("\t")


def read_record(content: bytes, at: int) -> bytes:
    parts = []
    while True:
        magic, word = struct.unpack_from("<4sI", content, at)
        assert magic == MAGIC
        size = word & (2**29 - 1)
        parts.append(content[at + 8 : at + 8 + size])
        at += 8 + (size + 3) // 4 * 4
        if word >> 29 in (0, 3):
            return MAGIC.join(parts)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def hashes(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file of a pack, the manifest's without what may differ."""
    found = {}
    for path in folder.iterdir():
        content = path.read_bytes()
        if path.name == "manifest.json":
            stored = json.loads(content)
            del stored["created"], stored["totals"]["seconds"]
            content = json.dumps(stored).encode()
        found[path.name] = hashlib.sha256(content).hexdigest()
    return found


def identities(files: Iterable[Path]) -> dict[str, tuple[int, int]]:
    """Return a value for each file name that changes if the file is written again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def manifest_of(folder: Path) -> dict[str, Any]:
    stored = json.loads((folder / "manifest.json").read_text())
    assert isinstance(stored, dict)
    return stored
