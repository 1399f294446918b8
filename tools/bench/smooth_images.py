"""Generated photographs, for smoke tests and where their content does not matter."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from mpl_fast.packing.options import PackOptions, SplitOptions
from mpl_fast.packing.pack import pack

VAL = 8


def smooth_jpeg(number: int, width: int, height: int) -> bytes:
    """A JPEG file of smooth random colors, another for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG")
    return file.getvalue()


def packed(folder: Path, count: int, labeled: int) -> Path:
    """Records of `count` images of different sizes in two classes, and of `VAL` others.

    `labeled` is an even number.
    """
    for number in range(count + VAL):
        kind = "train" if number < count else "val"
        file = folder / kind / f"class_{number % 2}" / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(smooth_jpeg(number, 80 + number % 24, 100 - number % 24))
    out, split = folder / "rec", SplitOptions(labeled=str(labeled))
    src, val = (str(folder / "train"),), str(folder / "val")
    pack(PackOptions(src=src, val=val, out=out, split=split, quiet=True))
    return out
