"""What the machine can do at best: by this a result from another machine is read."""

import hashlib
import mmap
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from zlib import crc32

import torch

from tools.bench.clock import seconds_of
from tools.bench.results import Row, Spread, spread
from tools.bench.smooth_images import smooth_jpeg

ROUNDS, WARMUP = 5, 2
DIRECT, WRITE = "disk, direct writes", "disk, buffered writes and fsync"
HASH, CRC = "SHA-256 on one core", "CRC-32 on one core"
DECODE = "JPEG decoding on one core, 500 x 375"
FP32, BF16 = "products in float32", "products in bfloat16"
COPY, HOST_COPY = "copies in memory, read and written", "copies in the host's memory, likewise"
UNITS = {
    **dict.fromkeys((DIRECT, WRITE, HASH, CRC), ("MB/s", 1e6)),
    **dict.fromkeys((COPY, HOST_COPY), ("GB/s", 1e9)),
    **dict.fromkeys((FP32, BF16), ("TFLOP/s", 1e12)),
    DECODE: ("img/s", 1.0),
}


class Limits:
    """Rates of the disk of `folder`, of a core and, by `COPY`, `FP32` and `BF16`, of `device`.

    `small` shows only that they can be measured.
    """

    def __init__(self, folder: Path, device: torch.device, *, small: bool = False) -> None:
        size = (1 if small else 256) << 20
        self.rates = {
            WRITE: writes(folder, size),
            HASH: _sums(hashlib.sha256, size // 4),
            CRC: _sums(crc32, size // 4),
            FP32: flops(device, torch.float32, small=small),
            BF16: flops(device, torch.bfloat16, small=small),
            COPY: copies(device, small=small),
        }
        """In bytes, images or FLOP a second."""
        if device.type != "cpu":
            self.rates[HOST_COPY] = copies(torch.device("cpu"), small=small)
        with suppress(ImportError):  # simplejpeg is a library of the benchmarks of packing alone
            self.rates[DECODE] = _decodes(1 if small else 100)
        with suppress(OSError):  # of a file system without direct writes, such as tmpfs
            self.rates[DIRECT] = writes(folder, size, os.O_DIRECT)

    def best(self, name: str) -> float:
        """The highest rate seen."""
        return self.rates[name].high

    def rows(self) -> list[Row]:
        """In the units that people use."""
        return [
            Row(name, Spread(r.median / unit, r.low / unit, r.high / unit, r.n), text, "higher")
            for name, (text, unit) in UNITS.items()
            if (r := self.rates.get(name))
        ]


def writes(folder: Path, size: int, flag: int = 0) -> Spread:
    """Bytes/s to a file in a folder, synced; `flag`: of `os.open`, besides the usual ones."""
    # Begins at a page, as direct writes need; huge ones, where there are some, make them faster.
    content = mmap.mmap(-1, min(8 << 20, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):
        content.madvise(mmap.MADV_HUGEPAGE)
    content.write(os.urandom(len(content)))
    file = folder / f".limits_{os.getpid()}"

    def write() -> None:
        number = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | flag, 0o600)
        try:
            for _ in range(size // len(content)):
                os.write(number, content)
            os.fsync(number)
        finally:
            os.close(number)

    try:
        return _rate(write, size)
    finally:
        file.unlink(missing_ok=True)


def _sums(function: Callable[[bytes], object], size: int) -> Spread:
    content = bytes(size)
    return _rate(lambda: function(content), size)


def _decodes(images: int) -> Spread:
    import simplejpeg

    content = smooth_jpeg(0, 500, 375)

    def decode() -> None:
        for _ in range(images):
            simplejpeg.decode_jpeg(content)

    return _rate(decode, images)


def flops(device: torch.device, dtype: torch.dtype, *, small: bool = False) -> Spread:
    """FLOP/s of products of square matrices, or of a convolution if that is faster.

    Of random numbers: zeros would need less power, so a GPU would keep a clock that no training
    sees. `small` shows only that it runs. (Some CPUs have slower libraries for products than for
    convolutions.)
    """
    return max(_products(device, dtype, small), _convolutions(device, dtype, small))


def copies(device: torch.device, *, small: bool = False) -> Spread:
    """Bytes/s of copies too large for any cache; bytes read and bytes written both count."""
    size, calls = (2 * 10**9, 5) if device.type == "cuda" else (256 * 10**6, 1)
    size = 10**6 if small else size
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def work() -> None:
        for _ in range(calls):
            target.copy_(source)

    return _rate(work, 2.0 * size * calls)


def _products(device: torch.device, dtype: torch.dtype, small: bool) -> Spread:
    size, calls = (8192, 10) if device.type == "cuda" else (2048, 1)
    size = 256 if small else size
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    c = torch.empty(size, size, device=device, dtype=dtype)

    def work() -> None:
        for _ in range(calls):
            torch.mm(a, b, out=c)

    return _rate(work, 2.0 * size**3 * calls)


def _convolutions(device: torch.device, dtype: torch.dtype, small: bool) -> Spread:
    """3 x 3 on 28 x 28 pixels of 256 channels, NHWC."""
    images, channels, side = (256, 256, 28) if device.type == "cuda" else (16, 256, 28)
    images, channels, side = (1, 16, 8) if small else (images, channels, side)
    x = torch.randn(images, channels, side, side, device=device).to(dtype)
    w = torch.randn(channels, channels, 3, 3, device=device).to(dtype)
    x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))

    def work() -> None:
        with torch.no_grad():
            torch.nn.functional.conv2d(x, w, padding=1)

    return _rate(work, 2.0 * 9 * channels * channels * images * side * side)


def _rate(work: Callable[[], object], amount: float) -> Spread:
    for _ in range(WARMUP):
        work()
    return spread([amount / seconds_of(work) for _ in range(ROUNDS)])
