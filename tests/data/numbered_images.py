"""A small packed folder whose images have their number as a gray level, and loaders over it."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mpl_fast.batch import Batch
from mpl_fast.config import DataConfig
from mpl_fast.data.loader import EvalLoader, TrainLoader
from mpl_fast.data.manifest import Manifest, read_manifest
from mpl_fast.packing.options import PackOptions, SplitOptions
from mpl_fast.packing.pack import pack

CPU = torch.device("cpu")
CLASSES, EACH = 5, 10  # training images; classes and images of one
VAL = 23
# Normalized values are gray levels / 255, and nothing is flipped or cropped away.
PLAIN = DataConfig(
    image_size=16, crop="pad_crop", flip=False, mean=(0, 0, 0), std=(1, 1, 1), translate=4, cutout=4
)


def level(number: int) -> int:
    """The red level that image ``number`` is filled with; 128 is the padding's."""
    return 4 * number + 2


def save(folder: Path, number: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.full((16, 16, 3), level(number), np.uint8)
    pixels[:, :, 1] = np.arange(16)[:, None] * 16  # shows where a crop was taken
    pixels[:, :, 2] = np.arange(16)[None, :] * 16
    Image.fromarray(pixels).save(folder / f"{number:03d}.png")


def pack_numbered(base: Path) -> Manifest:
    for number in range(CLASSES * EACH):
        save(base / "train" / f"class{number % CLASSES}", number)
    for number in range(VAL):
        save(base / "val" / f"class{number % CLASSES}", number)
    return pack_folder(base / "train", base / "rec", val=base / "val", labeled="20", shards=3)


def pack_folder(src: Path, out: Path, val: Path | None = None, **split: Any) -> Manifest:
    """Packs class folders; `split` has fields of SplitOptions."""
    held_out, options = str(val) if val else None, SplitOptions(**split)
    pack(PackOptions(src=(str(src),), val=held_out, out=out, split=options, quiet=True))
    return read_manifest(out)


def train_loader(manifest: Manifest, config: DataConfig = PLAIN, **options: Any) -> TrainLoader:
    defaults: dict[str, Any] = {"labeled": 4, "unlabeled": 8, "rank": 0, "world": 1, "seed": 0}
    defaults |= {"device": CPU, "dtype": torch.float32}
    return TrainLoader(config, manifest, **(defaults | options))


def eval_loader(manifest: Manifest, config: DataConfig = PLAIN, **options: Any) -> EvalLoader:
    defaults: dict[str, Any] = {"batch": 4, "rank": 0, "world": 1}
    defaults |= {"device": CPU, "dtype": torch.float32}
    return EvalLoader(config, manifest, **(defaults | options))


def levels(images: torch.Tensor) -> list[int]:
    """The red level at each image's middle, which the padding never reaches."""
    return (255 * images[:, 0, 8, 8].double()).round().int().tolist()


def same(first: Batch, second: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
