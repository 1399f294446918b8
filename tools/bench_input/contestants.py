"""Who takes part in the benchmark of the input, all over the same records."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline
from torch import Tensor

from mpl_fast.config import DataConfig
from mpl_fast.data.manifest import Split
from mpl_fast.data.pipelines import (
    Engine,
    decode,
    flip_coin,
    normalize,
    random_crop,
    read_shuffled,
    train_pipeline,
)
from mpl_fast.data.randaugment import strengthen
from mpl_fast.data.stream import Stream
from tools.bench_input import theirs

Task = Literal["decode", "weak", "strong", "both"]
Batches = Iterator[tuple[Tensor, ...]]
LOADS = (0.65, 0.0, 0.12, 0.25, 0.4, 0.8, 1.0)
POLICIES: tuple[Literal["mpl", "mpl_branched", "dali"], ...] = ("mpl", "mpl_branched", "dali")


class Setting(NamedTuple):
    """What all contestants have in common."""

    config: DataConfig
    split: Split
    batch: int
    threads: int  # of DALI; processes of a DataLoader
    device: torch.device


class Contestant(NamedTuple):
    """One way to make a task's views."""

    name: str
    task: Task
    open: Callable[[], Batches]
    ahead: int  # batches that are prepared before they are asked for
    peer: bool


def all_contestants(setting: Setting) -> list[Contestant]:
    """Peers first: their processes should be forked before DALI starts threads."""
    return [*_peers(setting), *_ours(setting)]


def _peers(setting: Setting) -> list[Contestant]:
    def batches(kind: theirs.Kind, strong: bool) -> Callable[[], Batches]:
        data = theirs.Views(setting.config, setting.split, kind, strong=strong)
        return lambda: iter(theirs.loader(data, setting.batch, setting.threads))

    kinds: tuple[theirs.Kind, ...] = ("pil", "tensor")
    ahead = theirs.AHEAD * setting.threads
    found = [
        Contestant(f"torchvision-{kind}", task, batches(kind, task == "both"), ahead, True)
        for task in _tasks("weak", "both")
        for kind in kinds
    ]
    return [*found, *_threaded(setting)] if theirs.has_spdl() else found


def _threaded(setting: Setting) -> list[Contestant]:
    def batches(strong: bool) -> Callable[[], Batches]:
        data = theirs.Views(setting.config, setting.split, "tensor", strong=strong)
        return lambda: theirs.threads(data, setting.batch, setting.threads)

    return [
        Contestant("spdl-tensor", task, batches(task == "both"), theirs.THREADED_AHEAD, True)
        for task in _tasks("weak", "both")
    ]


def swept(setting: Setting) -> list[Contestant]:
    """Our pipeline for both views with every setting of threads, prefetch and, on a GPU, the share
    of images that its JPEG engine decodes."""
    gpu = setting.device.type == "cuda"
    loads = LOADS if gpu else (setting.config.hw_decoder_load,)
    counts = sorted({max(1, setting.threads // 2), setting.threads, 2 * setting.threads})
    found = []
    for threads in counts:
        for prefetch in (1, 2, 3, 4):
            for load in loads if prefetch == setting.config.prefetch else loads[:1]:
                config = replace(setting.config, prefetch=prefetch, hw_decoder_load=load)
                own = setting._replace(config=config, threads=threads)

                def batches(own: Setting = own) -> Batches:
                    return _stream(own, "both")

                name = f"threads {threads} prefetch {prefetch}" + (f" engine {load}" if gpu else "")
                found.append(Contestant(name, "both", batches, prefetch, False))
    return found


def _tasks(*tasks: Task) -> tuple[Task, ...]:
    return tasks


def _ours(setting: Setting) -> list[Contestant]:
    ahead = setting.config.prefetch
    found = [
        Contestant("dali", "decode", lambda: _stream(setting, "decode"), ahead, False),
        Contestant("dali", "weak", lambda: _stream(setting, "weak"), ahead, False),
    ]
    for task in _tasks("strong", "both"):
        for policy in POLICIES:
            own = setting._replace(config=replace(setting.config, policy=policy))

            def batches(own: Setting = own, task: Task = task) -> Batches:
                return _stream(own, task)

            found.append(Contestant(f"dali-{policy}", task, batches, ahead, False))
    return found


def _stream(setting: Setting, task: Task) -> Batches:
    """The tensors as training gets them."""
    config, split, batch, threads, device = setting
    gpu = 0 if device.type == "cuda" else None
    engine = Engine(batch=batch, gpu=gpu, threads=threads, shard=0, shards=1)

    def build() -> Pipeline:
        if task in ("decode", "strong"):
            return _own_pipeline(config, split, engine, task)
        return train_pipeline(config, split, engine, strong=task == "both")

    stream = Stream(build, split, device, torch.float32)
    while True:
        yield next(stream)


def _own_pipeline(config: DataConfig, split: Split, engine: Engine, task: Task) -> Pipeline:
    """(strong, label), or (one pixel of the whole decoded image, label): training has neither."""

    def graph() -> tuple[DataNode, DataNode]:
        encoded, label = read_shuffled(config, split, engine)
        label = fn.cast(label, dtype=types.INT64)
        label = label if engine.gpu is None else label.gpu()
        if task == "decode":
            return fn.crop(decode(encoded, config, engine), crop=(1, 1)), label
        strong = strengthen(random_crop(encoded, config, engine), config)
        return normalize(strong, config, engine, flip_coin(config)), label

    return pipeline_def(graph, enable_conditionals=True)(
        batch_size=engine.batch,
        device_id=engine.gpu,
        num_threads=engine.threads,
        prefetch_queue_depth=config.prefetch,
        seed=engine.seed,
    )
