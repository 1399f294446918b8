"""The loaders of training and evaluation: iterators over DALI pipelines."""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from mpl_fast.batch import Batch, image_buffer
from mpl_fast.config import DataConfig
from mpl_fast.data.manifest import Manifest, Split
from mpl_fast.data.pipelines import Engine, View, eval_pipeline, train_pipeline
from mpl_fast.data.position import (
    began_of,
    check_other_ranks,
    identity_of,
    save_position,
    stream_states,
)
from mpl_fast.data.stream import Stream, cpu_threads, dali_gpu
from mpl_fast.errors import ConfigError, DataError

HALF = (torch.float16, torch.bfloat16)


class TrainLoader:
    """Endless batches of this rank's shard (`batch.Loader`); equal arguments give equal batches,
    bit for bit.

    ``labeled`` and ``unlabeled`` are images per rank and step; with ``unlabeled == 0`` the weak,
    strong and truth tensors have no rows. With ``state``, the result of an equal loader's
    ``state()``, the first batch is the one after the last that the other loader returned. A state
    of another number of ranks is not continued (a rank's shuffle buffer holds images of its own
    shard, of which others have not been read): with ``began``, the steps done, this loader begins a
    new pass over all images in an order drawn from the seed and that number.

    Raises:
        ConfigError: a batch is larger than its split, or ``data.device`` is gpu without CUDA.
        DataError: a split is missing, its index is stale, or a record or image cannot be read.
        CheckpointError: ``state`` was made with other data, settings, batch sizes, ranks or seed.
    """

    def __init__(
        self,
        config: DataConfig,
        manifest: Manifest,
        *,
        labeled: int,
        unlabeled: int,
        rank: int,
        world: int,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        state: Mapping[str, str | bytes] | None = None,
        began: int | None = None,
    ) -> None:
        gpu = dali_gpu(config, device)
        order = began if began is not None else began_of(state) if state else 0
        self._identity = identity_of(config, manifest, gpu) | {
            "labeled": labeled, "unlabeled": unlabeled, "rank": rank, "world": world, "seed": seed,
            "began": order,
        }  # fmt: skip
        states = dict[str, bytes]()
        if state is not None and began is not None:
            check_other_ranks(state, self._identity)
        elif state is not None:
            states = stream_states(state, self._identity)
        labeled_threads, unlabeled_threads = _split_threads(cpu_threads(config), labeled, unlabeled)

        def stream(name: str, batch: int, threads: int) -> Stream:
            engine = Engine(
                batch=batch,
                gpu=gpu,
                threads=threads,
                shard=rank,
                shards=world,
                seed=_seed(seed, order, rank, name),
                half=returns_half(dtype, device),
                checkpoint=states.get(name),
            )
            split = _split(manifest, name)
            _check_batch(name, batch, world, split)
            views: Sequence[View] = (config.labeled_view,)
            if name == "unlabeled":
                views = ("weak", "strong")
            return Stream(
                lambda: train_pipeline(config, split, engine, views), split, device, dtype
            )

        self._labeled = stream("labeled", labeled, labeled_threads)
        self._unlabeled = stream("unlabeled", unlabeled, unlabeled_threads) if unlabeled else None
        self._none = torch.empty(0, device=device, dtype=torch.int64)
        self._buffer = partial(
            image_buffer, labeled, unlabeled, config.image_size, dtype=dtype, device=device
        )

    def __next__(self) -> Batch:
        images, weak, strong = self._buffer()
        labels = self._labeled.copy_to(images)
        truth = self._unlabeled.copy_to(weak, strong) if self._unlabeled else self._none
        return Batch(images, labels, weak, strong, truth)

    def state(self) -> dict[str, str | bytes]:
        """The position after the last batch returned (some KB)."""
        streams = {"labeled": self._labeled, "unlabeled": self._unlabeled}
        states = {name: stream.state() for name, stream in streams.items() if stream}
        return save_position(self._identity, states)


class EvalLoader:
    """A split in file order, by default val: all ranks together yield every image exactly once.

    Each iteration is one pass and yields (images (batch, 3, H, W), labels (batch,) int64, count):
    the first ``count`` rows are valid, the others repeat the last image, for a static shape. All
    ranks yield equally many batches, so that a collective call per batch is safe.
    """

    def __init__(
        self,
        config: DataConfig,
        manifest: Manifest,
        *,
        batch: int,
        rank: int,
        world: int,
        device: torch.device,
        dtype: torch.dtype,
        split_name: str = "val",
    ) -> None:
        split = _split(manifest, split_name)
        shards = min(world, split.records)  # DALI refuses an empty shard
        engine = Engine(
            batch=batch,
            gpu=dali_gpu(config, device),
            threads=cpu_threads(config),
            shard=min(rank, shards - 1),
            shards=shards,
            half=returns_half(dtype, device),
        )
        self._stream = Stream(lambda: eval_pipeline(config, split, engine), split, device, dtype)
        first, end = (
            split.records * (rank + step) // shards for step in (0, 1)
        )  # DALI's borders of shards
        self._records = end - first if rank < shards else 0
        self._batch = batch
        self._batches = math.ceil(math.ceil(split.records / shards) / batch)
        self._taken = 0

    def __len__(self) -> int:
        """Batches in one pass, the same on every rank."""
        return self._batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        while self._taken % self._batches:  # after a break in the pass before: skip to its end
            self._next()
        for index in range(self._batches):
            images, labels = self._next()
            yield images, labels, min(max(self._records - index * self._batch, 0), self._batch)

    def _next(self) -> tuple[Tensor, ...]:
        self._taken += 1
        return next(self._stream)


def returns_half(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether DALI returns 16-bit floats: on a CPU that is slower than a cast of 32-bit ones."""
    return dtype in HALF and device.type == "cuda"


def _split(manifest: Manifest, name: str) -> Split:
    if name not in manifest.splits:
        raise DataError(f"{manifest.root} holds no {name} split: pack it again with one")
    split = manifest.splits[name]
    if split.records == 0:
        raise DataError(f"{split.index} lists no records: pack again with some {name} images")
    return split


def _check_batch(name: str, batch: int, world: int, split: Split) -> None:
    if batch < 1:
        raise ConfigError(f"a batch of {batch} {name} images per rank: use at least 1")
    if batch * world > split.records:
        raise ConfigError(
            f"{batch} {name} images x {world} ranks = {batch * world} a step, but {split.index} "
            f"has {split.records} records: use a smaller batch or fewer ranks"
        )


def _split_threads(threads: int, labeled: int, unlabeled: int) -> tuple[int, int]:
    """Threads of the two pipelines; an unlabeled image has two views."""
    share = labeled / max(1, labeled + 2 * unlabeled)
    first = min(max(1, round(threads * share)), threads)
    return first, max(1, threads - first)


def _seed(seed: int, began: int, rank: int, name: str) -> int:
    """A 31-bit seed for each run, step at which the order began, rank and stream."""
    text = f"{seed}/{rank}/{name}" + (f"/{began}" if began else "")
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1
