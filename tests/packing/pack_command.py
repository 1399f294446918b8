"""tools/make_rec.py for tests: a small tree of images, the command, and a reader of its records."""

import hashlib
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "make_rec.py"
DATA = ROOT.parent / "shared" / "data"
MAGIC_BYTES = bytes.fromhex("0a23d7ce")
# A JPEG comment may hold anything: two magic words that start at byte 8 of the file.
COMMENT = b"\xff\xfe\x00\x0c" + b"--" + MAGIC_BYTES * 2
CLASSES = ("ant", "bee", "cat")


def make_tree(tmp_path: Path) -> Path:
    """Make and return a folder with train/ (3 classes of 8) and val/ (3 classes of 2)."""
    root = tmp_path / "tree"
    for split, count in (("train", 8), ("val", 2)):
        for label, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                image = jpeg(1000 * count + 100 * label + number)
                (folder / f"{number}.jpg").write_bytes(image)
    first = root / "train" / "bee" / "0.jpg"
    first.write_bytes(first.read_bytes()[:2] + COMMENT + first.read_bytes()[2:])
    (root / "train" / "cat" / "0.jpg").write_bytes(png(0))  # as one of ImageNet's, by content
    (root / "train" / "cat" / "1.jpg").rename(root / "train" / "cat" / "1.JPEG")
    (root / "train" / "cat" / "2.jpg").unlink()
    (root / "train" / "cat" / "2.png").write_bytes(png(2))
    return root


def run(
    *arguments: object, status: int = 0, folder: Path | None = None, limit: str = "unlimited"
) -> subprocess.CompletedProcess[str]:
    """Run the tool from `folder`, its files not longer than `limit` KiB; check its exit status."""
    command = ["bash", "-c", f'ulimit -f {limit}; exec "$@"', "bash", *command_line(*arguments)]
    done = subprocess.run(
        command,
        cwd=folder or "/",
        env=environment(),
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=60,
    )
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done


def command_line(*arguments: object) -> list[str]:
    return [sys.executable, str(TOOL), *map(str, arguments)]


def environment() -> dict[str, str]:
    """Return the environment of a user: the tool has to find its package by itself."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def pack(*arguments: object, out: Path, **options: Any) -> Path:
    """Pack into out, which is returned."""
    run("pack", *arguments, "--out", out, **options)
    return out


def refuse(*arguments: object, status: int, command: str = "pack", limit: str = "unlimited") -> str:
    """Run the tool, which has to end with `status` and one line of error; return the line."""
    done = run(command, *arguments, status=status, limit=limit)
    assert done.stdout == ""
    line = done.stderr.splitlines()[-1]
    assert line.startswith("make_rec: error: ")
    assert done.stderr.count("error:") == 1
    return line


def jpeg(seed: int, size: int = 12) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    return bytes(simplejpeg.encode_jpeg(pixels))


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 7, 3), np.uint8)
    return bytes(cv2.imencode(".png", pixels)[1])


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
        assert magic == MAGIC_BYTES
        size = word & (2**29 - 1)
        parts.append(content[at + 8 : at + 8 + size])
        at += 8 + (size + 3) // 4 * 4
        if word >> 29 in (0, 3):
            return MAGIC_BYTES.join(parts)


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
    """Return what tells by name whether files were written again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def manifest_of(folder: Path) -> dict[str, Any]:
    stored = json.loads((folder / "manifest.json").read_text())
    assert isinstance(stored, dict)
    return stored
