"""The peers of the input benchmark: torchvision v2 on PIL images or tensors, over the same records.

They run in a DataLoader's processes, or in the threads of Meta's SPDL (optional: pip install spdl
spdl-core spdl-io).
"""

import bisect
import io
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, default_collate
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from mpl_fast.config import DataConfig
from mpl_fast.data.manifest import Split
from mpl_fast.data.records import parse_payload, unframe

Kind = Literal["pil", "tensor"]
KINDS: tuple[Kind, Kind] = ("pil", "tensor")
AHEAD = 2  # batches that each worker prepares ahead, PyTorch's default
# What its stages hold between them, batches and images; nine were seen to come at once.
THREADED_AHEAD = 12


class Records:
    """The encoded images of a split and their labels, by number."""

    def __init__(self, split: Split) -> None:
        self._shards = [np.memmap(path, np.uint8, "r") for path in split.shards]
        self._starts = [0, *accumulate(map(len, self._shards))][:-1]
        lines = split.index.read_text().splitlines()
        self._offsets = [int(line.split()[1]) for line in lines]

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, number: int) -> tuple[bytes, int]:
        offset = self._offsets[number]
        shard = bisect.bisect_right(self._starts, offset) - 1
        begin = end = offset - self._starts[shard]
        part = 1
        while part not in (0, 3):  # a record is whole, or ends with its last part
            word = int(self._shards[shard][end + 4 : end + 8].view("<u4")[0])
            part, size = word >> 29, word & (1 << 29) - 1
            end += 8 + (size + 3 & ~3)
        payload = parse_payload(unframe(self._shards[shard][begin:end].tobytes()))
        return payload.image, int(payload.labels[0])


class Views(Dataset[tuple[Tensor, ...]]):
    """(weak, [strong,] label) of a record; both views come from one decode and one crop."""

    def __init__(self, config: DataConfig, split: Split, kind: Kind, *, strong: bool) -> None:
        self._records, self._kind, self._strong = Records(split), kind, strong
        self._crop = v2.RandomResizedCrop(
            config.image_size,
            interpolation=v2.InterpolationMode(config.interpolation),
            antialias=config.antialias or kind == "pil",  # Pillow always antialiases
        )
        # Its strength ends at level 10; how long an operation takes does not depend on it.
        bins = 31
        magnitude = min(round(3 * config.magnitude), bins - 1)
        self._policy = v2.RandAugment(config.num_ops, magnitude, bins, fill=[128, 128, 128])
        self._end = v2.Compose(
            [
                v2.RandomHorizontalFlip(),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(list(config.mean), list(config.std)),
            ]
        )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, number: int) -> tuple[Tensor, ...]:
        content, label = self._records[number]
        crop = self._crop(self.decode(content))
        views = [crop, self._policy(crop)] if self._strong else [crop]
        return (*[self._end(view) for view in views], torch.tensor(label))

    def decode(self, content: bytes) -> Image.Image | Tensor:
        """RGB of the stored size."""
        if self._kind == "pil":
            return Image.open(io.BytesIO(content)).convert("RGB")
        buffer = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        image: Tensor = decode_image(buffer, ImageReadMode.RGB)
        return image


def endless(data: Views) -> RandomSampler:
    """Shuffled numbers, pass after pass."""
    return RandomSampler(data, num_samples=1 << 40)


def loader(data: Views, batch: int, workers: int) -> Iterator[tuple[Tensor, ...]]:
    """Endless batches out of a DataLoader's own processes."""
    return iter(
        DataLoader(data, batch, sampler=endless(data), num_workers=workers, prefetch_factor=AHEAD)
    )


def has_spdl() -> bool:
    """Whether Meta's loader is installed."""
    return find_spec("spdl") is not None and find_spec("spdl.pipeline") is not None


def threads(data: Views, batch: int, workers: int) -> Iterator[tuple[Tensor, ...]]:
    """Endless batches out of SPDL's threads, each of which makes whole images."""
    pipeline: Any = import_module("spdl.pipeline")
    builder = pipeline.PipelineBuilder().add_source(iter(endless(data)))
    builder = builder.pipe(data.__getitem__, concurrency=workers).aggregate(batch)
    running = builder.pipe(default_collate).add_sink(AHEAD).build(num_threads=workers + 1)
    with running.auto_stop():
        for views in running:
            yield tuple(views)
