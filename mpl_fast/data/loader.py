"""What training and evaluation draw their batches from: two small iterators over DALI pipelines."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from mpl_fast.batch import Batch, image_buffer
from mpl_fast.config import DataConfig
from mpl_fast.data.manifest import Manifest, Split
from mpl_fast.data.pipelines import Engine, eval_pipeline, train_pipeline
from mpl_fast.data.stream import Stream, cpu_threads, dali_gpu
from mpl_fast.errors import CheckpointError, ConfigError, DataError

HALF = (torch.float16, torch.bfloat16)
GRAPH = 2  # to be counted up with every change of the pipelines: older positions do not fit then


class TrainLoader:
    """Endless batches of this rank's share; equal arguments give equal batches, bit for bit.

    ``labeled`` and ``unlabeled`` count images per rank and step; with ``unlabeled == 0`` the weak,
    strong and truth tensors have no rows. ``state`` is what an equal loader's ``state()`` returned:
    this one goes on with the batch after the last one that the other had handed out.

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
    ) -> None:
        self._identity = _identity(config, manifest, device) | {
            "labeled": labeled, "unlabeled": unlabeled, "rank": rank, "world": world, "seed": seed
        }  # fmt: skip
        checkpoints = {} if state is None else _fitting(state, self._identity)
        labeled_threads, unlabeled_threads = _share(cpu_threads(config), labeled, unlabeled)

        def stream(name: str, batch: int, threads: int) -> Stream:
            engine = Engine(
                batch=batch,
                gpu=dali_gpu(config, device),
                threads=threads,
                shard=rank,
                shards=world,
                seed=_seed(seed, rank, name),
                half=_half(dtype, device),
                checkpoint=checkpoints.get(name),
            )
            split = _split(manifest, name)
            _check_batch(name, batch, world, split)
            strong = name == "unlabeled"
            return Stream(
                lambda: train_pipeline(config, split, engine, strong=strong), split, device, dtype
            )

        self._labeled = stream("labeled", labeled, labeled_threads)
        self._unlabeled = stream("unlabeled", unlabeled, unlabeled_threads) if unlabeled else None
        self._none = torch.empty(0, device=device, dtype=torch.int64)
        self._room = partial(
            image_buffer, labeled, unlabeled, config.image_size, dtype=dtype, device=device
        )

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        images, weak, strong = self._room()
        labels = self._labeled.into(images)
        truth = self._unlabeled.into(weak, strong) if self._unlabeled else self._none
        return Batch(images, labels, weak, strong, truth)

    def state(self) -> dict[str, str | bytes]:
        """Everything an equal loader needs to go on after the last batch handed out (some KB)."""
        state: dict[str, str | bytes] = {"made_with": json.dumps(self._identity, sort_keys=True)}
        state["labeled"] = self._labeled.state()
        if self._unlabeled:
            state["unlabeled"] = self._unlabeled.state()
        return state


class EvalLoader:
    """The validation split in file order: all ranks together count every image exactly once.

    Each iteration is one pass and yields (images (batch, 3, H, W), labels (batch,) int64, count):
    only the first ``count`` rows count, the rest repeat the last image to keep the shape static.
    All ranks yield equally many batches, so that a collective call per batch is safe.
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
    ) -> None:
        split = _split(manifest, "val")
        shards = min(world, split.records)  # DALI refuses an empty shard
        engine = Engine(
            batch=batch,
            gpu=dali_gpu(config, device),
            threads=cpu_threads(config),
            shard=min(rank, shards - 1),
            shards=shards,
            half=_half(dtype, device),
        )
        self._stream = Stream(lambda: eval_pipeline(config, split, engine), split, device, dtype)
        first, end = (split.records * (rank + step) // shards for step in (0, 1))  # as DALI cuts
        self._share = end - first if rank < shards else 0
        self._batch = batch
        self._batches = math.ceil(math.ceil(split.records / shards) / batch)
        self._taken = 0

    def __len__(self) -> int:
        """Batches in one pass, the same on every rank."""
        return self._batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        while self._taken % self._batches:  # a pass was left early: go to its end
            self._next()
        for index in range(self._batches):
            images, labels = self._next()
            yield images, labels, min(max(self._share - index * self._batch, 0), self._batch)

    def _next(self) -> tuple[Tensor, ...]:
        self._taken += 1
        return next(self._stream)


def _half(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether DALI makes 16-bit numbers: on a CPU that is slower than a cast of 32-bit ones."""
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


def _share(threads: int, labeled: int, unlabeled: int) -> tuple[int, int]:
    """Divides threads between the two pipelines; an unlabeled image has two views to make."""
    share = labeled / max(1, labeled + 2 * unlabeled)
    first = min(max(1, round(threads * share)), threads)
    return first, max(1, threads - first)


def _seed(seed: int, rank: int, name: str) -> int:
    """A 31-bit seed of its own for each run, rank and stream."""
    digest = hashlib.sha256(f"{seed}/{rank}/{name}".encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1


def _identity(
    config: DataConfig, manifest: Manifest, device: torch.device
) -> dict[str, str | int | float]:
    """What shapes the graph and its data; DALI would restore a state into any other unasked."""
    # Not there where it is as it was before there was a choice: positions of then still fit.
    other = {"data.interpolation": config.interpolation}
    return (other if config.interpolation != "bicubic" else {}) | {
        "data": manifest.content[:16],
        "graph": GRAPH,
        "data.device": "cpu" if dali_gpu(config, device) is None else "gpu",
        "data.image_size": config.image_size,
        "data.weak": config.crop,
        "data.flip": config.flip,
        "data.policy": config.policy,
        "data.layers": config.num_ops,
        "data.magnitude": config.magnitude,
        "data.translate": config.translate,
        "data.cutout": config.cutout,
        "data.final_cutout": config.final_cutout,
        "data.shuffle_buffer": config.shuffle_buffer,
    }


def _fitting(
    state: Mapping[str, str | bytes], identity: Mapping[str, str | int | float]
) -> dict[str, bytes]:
    """Returns the pipelines' checkpoints if the state belongs to this loader."""
    made_with = json.loads(state["made_with"])
    if made_with.get("data") != identity["data"]:
        raise CheckpointError(
            "the records in data.root are others than the checkpoint's: "
            "resume with the same records or start a new run"
        )
    for key in sorted(identity.keys() | made_with.keys()):
        before, now = made_with.get(key), identity.get(key)
        if before != now and key == "graph":
            raise CheckpointError(
                "the data position was saved by another version of the input pipeline: "
                "finish the run with that version or start a new run"
            )
        if before != now:
            raise CheckpointError(
                f"the data position was saved with {key}={before}, this run has {key}={now}: "
                "resume with the same settings or start a new run"
            )
    return {name: value for name, value in state.items() if isinstance(value, bytes)}
