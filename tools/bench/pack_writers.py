"""Writes class folders of images with one peer's writer and prints how long it took.

`pack_writers.py KIND SOURCE OUT`, run by the Python of the peer's own environment: it imports
nothing of this project. The clock runs from the first image that is read to the last file that is
on the disk; start, import and listing are not in it.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

SHARD_BYTES = 1 << 28
Images = list[tuple[str, int]]  # path, label


def main() -> None:
    """Writes, syncs, and prints the seconds as JSON: wall clock and CPU."""
    kind, source, out = sys.argv[1:]
    folders = sorted(Path(source).iterdir())
    images = [(str(f), label) for label, d in enumerate(folders) for f in sorted(d.iterdir())]
    write = {"copy": copy, "codecs": codecs, "webdataset": webdataset, "mds": mds}[kind]()
    Path(out).mkdir(exist_ok=True)
    began, busy = time.perf_counter(), time.process_time()
    write(images, out)
    for path in Path(out).iterdir():
        _sync(path)
    seconds, cpu = time.perf_counter() - began, time.process_time() - busy
    print(json.dumps({"seconds": seconds, "inside": seconds, "cpu": cpu}))


def copy() -> Callable[[Images, str], None]:
    """The base: every image after the other in one file, as plain Python does it."""

    def write(images: Images, out: str) -> None:
        with Path(out, "copy.bin").open("wb") as whole:
            for path, _ in images:
                with open(path, "rb") as image:  # noqa: PTH123, a Path would cost time
                    whole.write(image.read())

    return write


def codecs() -> Callable[[Images, str], None]:
    """The limit of making images smaller on one core: decode, resize, encode, no output."""
    import cv2
    import simplejpeg

    cv2.setNumThreads(1)

    def write(images: Images, out: str) -> None:
        for path, _ in images:
            pixels = simplejpeg.decode_jpeg(Path(path).read_bytes(), colorspace="BGR", strict=True)
            scale = 480 / min(pixels.shape[:2])
            smaller = cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
            simplejpeg.encode_jpeg(smaller, quality=90, colorspace="BGR", colorsubsampling="420")

    return write


def webdataset() -> Callable[[Images, str], None]:
    """The ShardWriter of webdataset."""
    from webdataset import ShardWriter  # type: ignore[import-not-found, unused-ignore]

    def write(images: Images, out: str) -> None:
        with ShardWriter(f"{out}/%06d.tar", maxsize=SHARD_BYTES, verbose=0) as shards:
            for path, label in images:
                key = Path(path).stem
                shards.write({"__key__": key, "jpg": Path(path).read_bytes(), "cls": label})

    return write


def mds() -> Callable[[Images, str], None]:
    """The MDSWriter of mosaicml-streaming, its shard size left as it is (64 MiB)."""
    from streaming import MDSWriter  # type: ignore[import-not-found, unused-ignore]

    def write(images: Images, out: str) -> None:
        with MDSWriter(out=out, columns={"image": "bytes", "label": "int"}) as shards:
            for path, label in images:
                shards.write({"image": Path(path).read_bytes(), "label": label})

    return write


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    main()
