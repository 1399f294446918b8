"""Measures DALI's training input against torchvision v2 in a DataLoader, on the same records.

All variants are open at once and take turns in short rounds. Each delivers normalized batches with
equal threads, or worker processes: float32, DALI on a GPU bfloat16. A training step then copies its
labeled and unlabeled batches into one tensor, which no variant does here. Ratios are those within a
round.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline
from torch import Tensor

from mpl_fast.config import DataConfig
from mpl_fast.data.loader import returns_half
from mpl_fast.data.manifest import Split, read_manifest
from mpl_fast.data.pipelines import (
    Engine,
    decode,
    decode_crop,
    random_crop,
    read_shuffled,
    train_pipeline,
)
from mpl_fast.data.stream import Stream
from mpl_fast.errors import ConfigError
from tools.bench import input_peers
from tools.bench.clock import wait_for_gpu
from tools.bench.harness import Report, at_least, run
from tools.bench.machine import DEVICES, choose_device
from tools.bench.results import Row, spread
from tools.bench.smooth_images import packed

if TYPE_CHECKING:
    from _typeshed import SupportsNext

TINY = {"batch": 8, "batches": 1, "rounds": 1, "image_size": 64}
USUAL = 224  # pixels
TICK = os.sysconf("SC_CLK_TCK")
LOADS = (0.65, 0.0, 0.12, 0.25, 0.4, 0.8, 1.0)
POLICIES: tuple[Literal["mpl", "mpl_branched", "dali"], ...] = ("mpl", "mpl_branched", "dali")
# On a CPU, times that peer's rate.
TARGETS = {
    ("weak: dali", "torchvision-pil"): 1.4,
    ("weak: dali", "torchvision-tensor"): 1.15,
    ("both: dali-mpl", "torchvision-pil"): 1.3,
    ("both: dali-mpl", "torchvision-tensor"): 1.15,
}

Task = Literal["decode", "decode and crop", "resize", "weak", "both"]
LIMIT: Task = "decode and crop"
# Parts of the graph, which deliver no views.
STAGES: dict[Task, Callable[[DataNode, DataConfig, Engine], DataNode]] = {
    "decode": decode, LIMIT: decode_crop, "resize": random_crop,
}  # fmt: skip
Batches: TypeAlias = "SupportsNext[tuple[Tensor, ...]]"


class Setting(NamedTuple):
    """What all variants have in common."""

    config: DataConfig
    split: Split
    batch: int
    threads: int  # of DALI; processes of a DataLoader
    device: torch.device
    pinned: bool = False  # each thread of DALI to a core


class PinnedEngine(Engine):
    """Each thread stays on one core."""

    def options(self, prefetch: int) -> dict[str, Any]:
        """See `Engine`."""
        return super().options(prefetch) | {"set_affinity": True}


class Variant(NamedTuple):
    """One way to make a task's views."""

    maker: str
    task: Task
    open: Callable[[], Batches]
    ahead: int  # batches that are prepared before they are taken
    peer: bool

    @property
    def name(self) -> str:
        """Of its row."""
        return f"{self.task}: {self.maker}"


class Round(NamedTuple):
    """One measurement."""

    images_per_s: float
    cpu_us: float  # of this process and its children, an image


def main(arguments: Sequence[str]) -> int:
    """See `tools.bench.harness.run`."""
    return run("input", __doc__, arguments, measure, options, rounds=5, tiny=TINY)


def options(parser: argparse.ArgumentParser) -> None:
    """Beside those of every benchmark."""
    add = parser.add_argument
    add("--rec", type=Path, metavar="DIR", help="records that make_rec.py packed")
    add("--device", choices=DEVICES, default="auto", help="where DALI works (%(default)s)")
    workers = "DALI threads, or worker processes (%(default)s)"
    add("--threads", type=at_least(1), default=2, metavar="N", help=workers)
    add("--batch", type=at_least(1), default=64, metavar="N", help="images (%(default)s)")
    add("--image-size", type=at_least(16), default=USUAL, metavar="N", help="pixels (%(default)s)")
    add("--batches", type=at_least(1), default=8, metavar="N", help="timed a round (%(default)s)")
    cubic = "of all variants; bilinear is torchvision's default (%(default)s)"
    add("--interpolation", choices=("bicubic", "bilinear"), default="bicubic", help=cubic)
    plain = "resize without antialias, but for torchvision on PIL images, which always antialiases"
    add("--no-antialias", action="store_true", help=plain)
    add("--use-fast-idct", action="store_true", help="of DALI: libjpeg-turbo's faster inverse DCT")
    add("--sweep", action="store_true", help="our own settings against each other instead")


def measure(options: argparse.Namespace, report: Report) -> None:
    """Over the records of `--rec`; a smoke test generates some."""
    device = choose_device(options.device)
    options.device = device.type
    if not (options.rec or options.smoke):
        raise ConfigError("--rec names a folder of records; --smoke makes some")
    with tempfile.TemporaryDirectory() as folder:
        records = options.rec or packed(Path(folder), 24, labeled=8)
        split = read_manifest(records).splits["unlabeled"]
        config = DataConfig(
            image_size=options.image_size,
            interpolation=options.interpolation,
            antialias=not options.no_antialias,
            use_fast_idct=options.use_fast_idct,
        )
        setting = Setting(config, split, options.batch, options.threads, device)
        # Peers first: their processes should be forked before DALI starts threads.
        variants = swept(setting) if options.sweep else [*peers(setting), *ours(setting)]
        report.claim = (
            f"median (lowest to highest) of at most {options.rounds} interleaved rounds of "
            f"{options.batches} batches of {options.batch}; {options.threads} threads or workers; "
            f"{options.image_size} pixels"
        )
        found = rounds(variants, options, report)
        report.more["records"] = split.records
        small = options.image_size != USUAL  # of which the targets are not
        report.add(rows(variants, found, smoke=options.smoke, targets={} if small else TARGETS))


def rounds(
    variants: Sequence[Variant], options: argparse.Namespace, report: Report
) -> dict[str, list[Round]]:
    """All variants once in every round, all of them open throughout, by name."""
    running = dict[str, tuple[Variant, Batches]]()
    for variant in variants:
        with report.attempt(variant.name):
            source = variant.open()
            if wrong := difference(variant, next(source), options.batch):
                report.fail(variant.name, wrong)
            else:
                running[variant.name] = variant, source

    return report.interleaved(
        running,
        lambda one: measured(one[1], one[0].ahead + 1, options.batches, options.batch),
        warmup=0,
    )


def difference(variant: Variant, views: Sequence[Tensor], batch: int) -> str:
    """What is wrong with the number or length of the tensors; empty if nothing is."""
    expected = 3 if variant.task == "both" else 2
    if len(views) == expected and all(len(view) == batch for view in views):
        return ""
    return f"{[tuple(view.shape) for view in views]} for {expected} tensors of {batch} images"


def measured(source: Batches, ahead: int, batches: int, batch: int) -> Round:
    """The batches that were prepared ahead are taken first, untimed."""
    wait_until_idle()
    for _ in range(ahead):
        next(source)
    wait_for_gpu()
    cpu, began = cpu_seconds(), time.perf_counter()
    for _ in range(batches):
        next(source)
    wait_for_gpu()
    wall, images = time.perf_counter() - began, batches * batch
    return Round(images / wall, 1e6 * (cpu_seconds() - cpu) / images)


def wait_until_idle(longest: float = 10.0) -> None:
    """Until no variant prepares batches any more: under 5 % of a core for 0.2 s."""
    deadline = time.perf_counter() + longest
    before = cpu_seconds()
    while time.perf_counter() < deadline:
        time.sleep(0.2)
        now = cpu_seconds()
        if now - before <= 0.02:
            return
        before = now


def cpu_seconds() -> float:
    """Of this process and of its children that are running, such as a DataLoader's workers."""
    own = os.getpid()
    children = Path(f"/proc/{own}/task/{own}/children").read_text().split()
    ticks = 0
    for child in children:
        fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / TICK


def peers(setting: Setting) -> list[Variant]:
    """Torchvision in processes and, where SPDL is installed, in threads."""
    config, split, batch, workers = setting[:4]
    ahead, found = input_peers.AHEAD * workers, []
    tasks: tuple[Task, ...] = ("weak", "both")
    for task in tasks:
        pil, tensor = (
            input_peers.Views(config, split, kind, strong=task == "both")
            for kind in input_peers.KINDS
        )
        for name, data in (("torchvision-pil", pil), ("torchvision-tensor", tensor)):
            batches = partial(input_peers.loader, data, batch, workers)
            found.append(Variant(name, task, batches, ahead, True))
        if input_peers.has_spdl():
            batches = partial(input_peers.threads, tensor, batch, workers)
            found.append(Variant("spdl-tensor", task, batches, input_peers.THREADED_AHEAD, True))
    return found


def ours(setting: Setting) -> list[Variant]:
    """Each stage with those before it: whole images decoded, or the crop alone, which is then
    resized, and normalized as the weak view; and that with the strong view of each policy,
    and with one that has a crop of its own."""
    found = [streamed("dali", task, setting) for task in (*STAGES, "weak")]
    for policy in POLICIES:
        own = setting._replace(config=replace(setting.config, policy=policy))
        found.append(streamed(f"dali-{policy}", "both", own))
    own = setting._replace(config=replace(setting.config, strong_crop="own"))
    return [*found, streamed("dali-mpl, own crops", "both", own)]


def swept(setting: Setting) -> list[Variant]:
    """Our pipeline for both views with other numbers of threads and prefetched batches, with
    pinned threads and, on a GPU, other shares of images that its JPEG engine decodes."""
    gpu, usual, half = setting.device.type == "cuda", setting.config, max(1, setting.threads // 2)
    name = f"threads {setting.threads} prefetch {usual.prefetch} pinned"
    found = [streamed(name, "both", setting._replace(pinned=True))]
    for threads in sorted({half, setting.threads, 2 * setting.threads}):
        for prefetch in (1, 2, 3, 4):
            for load in LOADS if gpu and prefetch == usual.prefetch else LOADS[:1]:
                config = replace(usual, prefetch=prefetch, hw_decoder_load=load)
                name = f"threads {threads} prefetch {prefetch}" + (f" engine {load}" if gpu else "")
                own = setting._replace(config=config, threads=threads)
                found.append(streamed(name, "both", own))
    return found


def streamed(name: str, task: Task, setting: Setting) -> Variant:
    """The tensors as training gets them."""
    config, split, batch, threads, device, pinned = setting
    gpu = 0 if device.type == "cuda" else None
    dtype = torch.float32 if gpu is None else torch.bfloat16  # of `precision: auto`
    half = returns_half(dtype, device)
    kind = PinnedEngine if pinned else Engine
    engine = kind(batch=batch, gpu=gpu, threads=threads, shard=0, shards=1, half=half)

    def build() -> Pipeline:
        if task in STAGES:
            return stage_pipeline(task, config, split, engine)
        return train_pipeline(
            config, split, engine, ("weak", "strong") if task == "both" else ("weak",)
        )

    batches = partial(Stream, build, split, device, dtype)
    return Variant(name, task, batches, config.prefetch, False)


def stage_pipeline(task: Task, config: DataConfig, split: Split, engine: Engine) -> Pipeline:
    """(one pixel of what the stage makes, label)."""

    def graph() -> tuple[DataNode, DataNode]:
        encoded, label = read_shuffled(config, split, engine)
        label = fn.cast(label, dtype=types.INT64)
        label = label if engine.gpu is None else label.gpu()
        return fn.crop(STAGES[task](encoded, config, engine), crop=(1, 1)), label

    return pipeline_def(graph)(**engine.options(config.prefetch))


def rows(
    variants: Sequence[Variant],
    found: Mapping[str, Sequence[Round]],
    *,
    smoke: bool = False,
    targets: Mapping[tuple[str, str], float] = TARGETS,
) -> list[Row]:
    """Of each variant its rate and CPU time, and the ratios of its rate to every peer's.

    The limit of ours is to decode the crop alone.

    Those of a `smoke` test are no claim and have no target.
    """
    made, there = [], [one for one in variants if one.name in found]
    crop = [turn.images_per_s for o in there if o.task == LIMIT for turn in found[o.name]]
    cropping = spread(crop).median if crop else None
    for one in there:
        mine = found[one.name]
        rates = spread([turn.images_per_s for turn in mine])
        limit = None if one.peer or one.task in ("decode", LIMIT) else cropping
        made.append(Row(one.name, rates, "img/s", "higher", limit=limit))
        made.append(Row(f"{one.name}, CPU", spread([turn.cpu_us for turn in mine]), "us/img"))
        for peer in there:
            if peer.peer and peer.task == one.task and not one.peer:
                target = None if smoke else targets.get((one.name, peer.maker))
                pairs = zip(mine, found[peer.name], strict=True)
                speed = spread([own.images_per_s / other.images_per_s for own, other in pairs])
                name = f"{one.name} against {peer.maker}"
                made.append(Row(name, speed, "x", "higher", not smoke, target=target))
    return made
