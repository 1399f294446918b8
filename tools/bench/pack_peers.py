"""The peers of `pack`: installs them, calls their writers, and times a command.

`python -m tools.bench.pack_peers FOLDER` installs each in an environment of its own. `pack` starts
this file as a script, as `write` with the Python of the peer's environment, and as `run`, which
imports no PyTorch: the peak memory that the system reports of a command begins with that of the
process that started it.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

ENVIRONMENTS = {
    "streams": ("webdataset==1.0.2", "mosaicml-streaming==0.13.0"),
    "mxnet": ("mxnet==1.9.1", "numpy==1.23.5", "opencv-python-headless<4.9"),
}
SHARD_BYTES = 1 << 28
Images = list[tuple[str, int]]  # path, label


def install(folder: Path) -> None:
    """Installs every peer."""
    for name, packages in ENVIRONMENTS.items():
        # mxnet 1.9.1 needs numpy 1.23, which has no wheel for a Python after 3.11.
        python = shutil.which("python3.11") if name == "mxnet" else sys.executable
        if not python:
            sys.exit("pack_peers: mxnet 1.9.1 needs python3.11, which is not on the PATH")
        subprocess.run([python, "-m", "venv", folder / name], check=True)
        torch = find_spec("torch")
        if name == "streams" and torch and torch.origin:
            # mosaicml-streaming imports torch, its writer never uses it: ours is good enough.
            [site] = (folder / name).glob("lib/python*/site-packages")
            (site / "torch.pth").write_text(f"{Path(torch.origin).parents[1]}\n")
        subprocess.run([folder / name / "bin" / "pip", "install", *packages], check=True)


def write(kind: str, source: str, out: str) -> None:
    """Writes class folders of images, and prints `seconds` and `cpu` seconds as JSON.

    They are from the first image that is read to the last file that is on the disk: without start,
    imports and listing.
    """
    folders = sorted(Path(source).iterdir())
    images = [(str(f), label) for label, d in enumerate(folders) for f in sorted(d.iterdir())]
    writer = {"copy": copy, "codecs": codecs, "webdataset": webdataset, "mds": mds}[kind]
    writer([], out)  # imports
    began, busy = time.perf_counter(), time.process_time()
    writer(images, out)
    sync(Path(out))
    seconds, cpu = time.perf_counter() - began, time.process_time() - busy
    print(json.dumps({"seconds": seconds, "cpu": cpu}))


def copy(images: Images, out: str) -> None:
    """The base: every image after the other in one file, as plain Python does it."""
    with Path(out, "copy.bin").open("wb") as whole:
        for path, _ in images:
            with open(path, "rb") as image:  # noqa: PTH123, a Path would cost time
                whole.write(image.read())


def codecs(images: Images, out: str) -> None:
    """The limit of making images smaller on one core: decode, resize, encode, no output."""
    import cv2
    import simplejpeg

    cv2.setNumThreads(1)
    for path, _ in images:
        pixels = simplejpeg.decode_jpeg(Path(path).read_bytes(), colorspace="BGR", strict=True)
        scale = 480 / min(pixels.shape[:2])
        smaller = cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        simplejpeg.encode_jpeg(smaller, quality=90, colorspace="BGR", colorsubsampling="420")


def webdataset(images: Images, out: str) -> None:
    """The ShardWriter of webdataset."""
    from webdataset import ShardWriter  # type: ignore[import-not-found, unused-ignore]

    if not images:
        return
    with ShardWriter(f"{out}/%06d.tar", maxsize=SHARD_BYTES, verbose=0) as shards:
        for path, label in images:
            key = Path(path).stem
            shards.write({"__key__": key, "jpg": Path(path).read_bytes(), "cls": label})


def mds(images: Images, out: str) -> None:
    """The MDSWriter of mosaicml-streaming, its shard size left as it is (64 MiB)."""
    from streaming import MDSWriter  # type: ignore[import-not-found, unused-ignore]

    if not images:
        return
    with MDSWriter(out=out, columns={"image": "bytes", "label": "int"}) as shards:
        for path, label in images:
            shards.write({"image": Path(path).read_bytes(), "label": label})


def run(out: str, *command: str) -> None:
    """Runs a command until its files in `out` are on the disk, and prints JSON.

    That has the exit code, `wall` and `cpu` seconds, `peak_mib` of the largest process, and what
    the command has printed.
    """
    with tempfile.TemporaryFile() as log:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        sync(Path(out))
        wall = time.perf_counter() - began
        log.seek(0)
        printed = log.read().decode(errors="replace")
    code = process.returncode = os.waitstatus_to_exitcode(status)
    cpu, peak = usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024
    found = {"code": code, "wall": wall, "cpu": cpu, "peak_mib": peak, "printed": printed}
    print(json.dumps(found))


def sync(folder: Path) -> None:
    """Waits until everything in a folder is on the disk."""
    for path in sorted(folder.rglob("*")):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


if __name__ == "__main__":
    what, *given = sys.argv[1:] or ["-h"]
    if what in ("run", "write") and given:
        (run if what == "run" else write)(*given)
    elif given or what.startswith("-"):
        sys.exit("usage: python -m tools.bench.pack_peers FOLDER")
    else:
        install(Path(what))
