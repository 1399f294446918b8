"""tools/make_rec.py for tests: a small tree of images, the command, and a reader of its records."""

import hashlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import simplejpeg

ROOT = Path(__file__).resolve().parent.parent
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
    shell = ["bash", "-c", f'ulimit -f {limit}; exec "$@"', "bash"]
    command = [*shell, sys.executable, str(TOOL), *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=folder or "/", env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == status, done.stderr
    return done


def refuse(*arguments: object, status: int, limit: str = "unlimited") -> str:
    """Run the tool, which has to end with `status` and one line of error; return the line."""
    done = run("pack", *arguments, status=status, limit=limit)
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


def read_split(root: Path, prefix: str) -> list[tuple[int, float, str, bytes]]:
    """Return (id, label, class/name, image) of every record, read by the joined index."""
    listed = [line.split("\t") for line in (root / f"{prefix}.lst").read_text().splitlines()]
    content = b"".join(path.read_bytes() for path in sorted(root.glob(f"{prefix}*.rec")))
    rows = []
    for (number, label, key), line in zip(
        listed, (root / f"{prefix}.idx").read_text().splitlines(), strict=True
    ):
        name, offset = line.split("\t")
        payload = read_record(content, int(offset))
        flag, stored, record_id, second = struct.unpack("<IfQQ", payload[:24])
        assert (flag, second, record_id, stored) == (0, 0, int(number), float(label))
        assert name == number
        rows.append((record_id, stored, key, payload[24:]))
    return rows


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


def sizes_and_hashes(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file of a pack, the manifest's without what may differ."""
    hashes = {}
    for path in folder.iterdir():
        content = path.read_bytes()
        if path.name == "manifest.json":
            stored = json.loads(content)
            del stored["created"], stored["totals"]["seconds"]
            content = json.dumps(stored).encode()
        hashes[path.name] = hashlib.sha256(content).hexdigest()
    return hashes
