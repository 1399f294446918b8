"""Measures networks by themselves: forward, cross-entropy and backward of synthetic images.

Variants: both memory layouts and precisions, eager and compiled, on a GPU as a CUDA graph too. Loss
and gradient norm of each are compared with those of the first before any is timed. The limit of a
rate is the lower of two that are measured in the same run: arithmetic (a large matrix product) or
memory (a large copy, over the bytes that an image has to move; small networks may keep some of them
in a cache).
"""

import argparse
import copy
import gc
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpl_fast import models
from mpl_fast.errors import ConfigError
from mpl_fast.models import OWN
from tools.bench.backbone_work import MinimalWork, minimal_work
from tools.bench.clock import interleaved, repeated, seconds_of
from tools.bench.count import extra_memory
from tools.bench.cuda_graph import captured, require_device
from tools.bench.harness import Report, at_least, run
from tools.bench.machine import DEVICES, choose_device, copies, flops
from tools.bench.results import Row, count_row, one_line, ratios, spread

TINY = {"models": ["wrn_10_1"], "batch": 4, "image_size": 32, "rounds": 1, "steps": 1}
SMALL, LARGE = 32, 224  # pixels a side, of the networks for CIFAR and of all others
BATCHES = {("cpu", SMALL): 64, ("cpu", LARGE): 16, ("cuda", SMALL): 512, ("cuda", LARGE): 256}
STEPS = {"cpu": 1, "cuda": 10}
LOSS_OFF, NORM_OFF = 0.05, 0.25  # bfloat16 and other dropout masks stay well below
GRAPH_WARMUP = 3
TARGET, TARGET_NETWORK, TARGET_GPUS = 3000.0, ("resnet50", 224), ("H100", "H200")

Step = Callable[[], Tensor]


class Variant(NamedTuple):
    """A name, and how it runs the step."""

    name: str
    channels_last: bool = True
    bf16: bool = False
    compiled: str = ""  # a mode of torch.compile
    graphed: bool = False


BASE = Variant("eager NCHW fp32", channels_last=False)
BEST = Variant("compile NHWC bf16", bf16=True, compiled="default")
EVERYWHERE = (
    BASE,
    Variant("eager NHWC fp32"),
    Variant("eager NHWC bf16", bf16=True),
    Variant("compile NHWC fp32", compiled="default"),
    BEST,
)
GRAPH = BEST._replace(name="compile NHWC bf16, CUDA graph", graphed=True)
TUNED = Variant("max-autotune NHWC bf16", bf16=True, compiled="max-autotune-no-cudagraphs")


class Problem(NamedTuple):
    """A network, its images and how many steps one measurement has."""

    model: str
    network: nn.Module
    image_size: int
    batch: int
    steps: int
    device: torch.device

    @property
    def label(self) -> str:
        """The beginning of its rows' names."""
        return f"{self.model}, {self.batch} x {self.image_size} px"

    def images(self) -> tuple[Tensor, Tensor]:
        """Images ``(N, 3, H, W)`` float32 and labels ``(N,)`` int64, on the device."""
        shape = (self.batch, 3, self.image_size, self.image_size)
        labels = torch.arange(self.batch, device=self.device) % classes(self.model)
        return torch.randn(shape, device=self.device), labels


class Limits(NamedTuple):
    """The best that the machine has done; and its GPU's name."""

    fp32: float  # FLOP/s
    bf16: float  # FLOP/s
    copy: float  # bytes/s
    gpu: str | None = None

    def flops(self, *, bf16: bool) -> float:
        """Per second."""
        return self.bf16 if bf16 else self.fp32


def main(arguments: Sequence[str]) -> int:
    """See `tools.bench.harness.run`."""
    return run("backbone", __doc__, arguments, measure, options, rounds=10, tiny=TINY)


def options(parser: argparse.ArgumentParser) -> None:
    """Beside those of every benchmark."""
    add = parser.add_argument
    names, sizes = ["resnet50", "wrn_28_2"], "images (GPU 256, or 512 small ones; CPU 16, 64)"
    add("--models", nargs="+", default=names, metavar="NAME", help="(resnet50 wrn_28_2)")
    # A batch norm cannot normalize one image.
    add("--batch", type=at_least(2), metavar="N", help=sizes)
    add("--image-size", type=at_least(8), metavar="N", help="(networks for CIFAR 32, else 224)")
    add("--device", choices=DEVICES, default="auto", help="(%(default)s)")
    add("--steps", type=at_least(1), metavar="N", help="of one measurement (GPU 10, CPU 1)")
    add("--only", default="", metavar="TEXT", help="the first variant, and those with this name")
    add("--max-autotune", action="store_true", help="also this mode, which compiles for minutes")


def measure(options: argparse.Namespace, report: Report) -> None:
    """Network after network."""
    device = choose_device(options.device)
    options.device = device.type
    torch.manual_seed(options.seed)
    chosen = choose(variants(device, tuned=options.max_autotune), options.only)
    problems = [
        problem(model, device, options.image_size, options.batch, options.steps)
        for model in options.models
    ]
    found = {
        "fp32 product, FLOP/s": flops(device, torch.float32, small=options.smoke),
        "bf16 product, FLOP/s": flops(device, torch.bfloat16, small=options.smoke),
        "copy, bytes/s": copies(device, small=options.smoke),
    }
    report.more["limits"] = {name: one._asdict() for name, one in found.items()}
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    fp32, bf16, copied = (one.high for one in found.values())
    limits = Limits(fp32, bf16, copied, gpu)
    report.claim = (
        f"training steps of the networks alone, median of at most {options.rounds} interleaved "
        "rounds; the share of a limit is that of what this machine did in the same run"
    )
    for number, one in enumerate(problems):
        # The compiled forms of another network would count towards the limit of recompilations.
        torch._dynamo.reset()
        work = minimal_work(one.network, one.image_size)
        report.add(work_rows(one, work))
        steps = correct(one, chosen, report)
        try:
            seconds = interleaved(
                {name: repeated(step, one.steps) for name, step in steps.items()},
                seconds_of,
                rounds=options.rounds,
                warmup=1,
                seed=options.seed,
                seconds=report.seconds_left(len(problems) - number),
            )
        except torch.OutOfMemoryError as error:  # all together may need more than each did
            report.fail(f"{one.label}: all of them", one_line(error))
            continue
        for variant in chosen:
            if variant.name in seconds:
                report.add(time_rows(one, variant, seconds, work, limits))


def classes(model: str) -> int:
    """Of the data set that the literature trains a network on."""
    return 10 if model in OWN else 1000


def problem(
    model: str,
    device: torch.device,
    image_size: int | None = None,
    batch: int | None = None,
    steps: int | None = None,
) -> Problem:
    """With the usual numbers for the network and the device where none are given.

    Raises `ConfigError` for an unknown name.
    """
    usual = SMALL if model in OWN else LARGE
    return Problem(
        model,
        models.build(model, classes(model)),
        image_size or usual,
        batch or BATCHES[device.type, usual],
        steps or STEPS[device.type],
        device,
    )


def variants(device: torch.device, *, tuned: bool) -> list[Variant]:
    """Those of this device, first the one that the others are compared with.

    `tuned`: also one that compiles for minutes.
    """
    on_gpu = [GRAPH] if device.type == "cuda" else []
    return [*EVERYWHERE, *on_gpu, *([TUNED] if tuned else [])]


def choose(found: Sequence[Variant], only: str) -> list[Variant]:
    """The first, and those with `only` in their names. Raises `ConfigError` if no name has it."""
    if not any(only in one.name for one in found):
        names = "; ".join(one.name for one in found)
        raise ConfigError(f"--only {only!r} is in none of: {names}")
    return [one for one in found if one == BASE or only in one.name]


def correct(problem: Problem, variants: Sequence[Variant], report: Report) -> dict[str, Step]:
    """Steps, warmed up, of the variants that compute what the first one does."""
    images, labels = problem.images()
    first: tuple[float, float] | None = None
    steps: dict[str, Step] = {}
    for variant in variants:
        network, label = copy.deepcopy(problem.network), f"{problem.label}: {variant.name}"
        try:
            step = prepared(variant, network, images, labels)
            found = loss_and_norm(step, network)
            first = first or found
            if wrong := difference(first, found):
                report.fail(label, wrong)
                continue
            if problem.device.type == "cuda" and not variant.graphed:  # whose memory stays taken
                peak = step_memory(step, network) / 2**20
                report.add([count_row(f"{label}, peak memory", peak, "MiB")])
            steps[variant.name] = step
        except Exception as error:  # a compiler's, or that memory is full: the others go on
            report.fail(label, one_line(error))
        release(problem.device)
    return steps


def prepared(variant: Variant, network: nn.Module, images: Tensor, labels: Tensor) -> Step:
    """Forward, cross-entropy and backward of one batch; the step returns the loss.

    Takes the network over. `images` are ``(N, 3, H, W)`` float32, `labels` ``(N,)``.
    """
    layout = torch.channels_last if variant.channels_last else torch.contiguous_format
    network.to(images.device, memory_format=layout).train()  # type: ignore[call-overload]
    images = images.contiguous(memory_format=layout)
    if variant.compiled:
        # A break in the graph would be an error: it is part of what is claimed that there is none.
        network.compile(dynamic=False, fullgraph=True, mode=variant.compiled)

    def step() -> Tensor:
        network.zero_grad(set_to_none=True)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=variant.bf16):
            logits = network(images)
        loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
        return loss.detach()

    return graph_of(step) if variant.graphed else step


def graph_of(step: Step) -> Step:
    """Replays the step; its gradients stay where the capture put them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(GRAPH_WARMUP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    losses: list[Tensor] = []
    graph = captured(lambda: losses.append(step()))

    def replay() -> Tensor:
        graph.replay()
        return losses[0]

    return replay


def loss_and_norm(step: Step, network: nn.Module) -> tuple[float, float]:
    """The loss of a step and the norm of its gradient."""
    loss = float(step())
    gradients = [p.grad.norm() for p in network.parameters() if p.grad is not None]
    return loss, float(torch.stack(gradients).norm())


def step_memory(step: Step, network: nn.Module) -> int:
    """Bytes of the GPU's memory of a step, gradients included, beside weights and images."""
    network.zero_grad(set_to_none=True)
    return extra_memory(step)


def difference(right: tuple[float, float], mine: tuple[float, float]) -> str:
    """What is off in loss and gradient norm; empty if nothing is."""
    names, most = ("loss", "gradient norm"), (LOSS_OFF, NORM_OFF)
    for name, a, b, share in zip(names, right, mine, most, strict=True):
        if not abs(a - b) <= share * abs(a):  # also for NaN
            return f"wrong: its {name} is {b:.6g}, that of the first {a:.6g}"
    return ""


def release(device: torch.device) -> None:
    """Frees memory that a failure or a preparation has left. Raises `DeviceLostError`."""
    if device.type == "cuda":
        require_device()
        gc.collect()  # what compilers leave refers to itself, and holds memory of the GPU
        torch.cuda.empty_cache()


def work_rows(problem: Problem, work: MinimalWork) -> list[Row]:
    """FLOPs and bytes for an image."""
    rows = [count_row(f"{problem.label}: arithmetic", work.flops / 1e9, "GFLOP/img")]
    for name, itemsize in (("fp32", 4), ("bf16", 2)):
        moved = work.bytes(itemsize, problem.batch)
        if moved is not None:
            rows.append(count_row(f"{problem.label}: memory, {name}", moved / 1e6, "MB/img"))
    return rows


def time_rows(
    problem: Problem,
    variant: Variant,
    seconds: Mapping[str, list[float]],
    work: MinimalWork,
    limits: Limits,
) -> list[Row]:
    """Images a second, milliseconds, FLOP/s, and how many times faster than the first one."""
    mine, name = seconds[variant.name], f"{problem.label}: {variant.name}"
    images = problem.batch * problem.steps
    rates = spread([images / s for s in mine])
    speed = spread([images * work.flops / 1e12 / s for s in mine])
    limit, aim = roof(work, problem.batch, limits, variant), target(problem, variant, limits.gpu)
    most = limits.flops(bf16=variant.bf16) / 1e12
    rows = [
        Row(name, rates, "img/s", "higher", limit=limit, target=aim),
        Row(f"{name}, step", spread([1e3 * s / problem.steps for s in mine]), "ms"),
        Row(f"{name}, speed", speed, "TFLOP/s", "higher", limit=most),
    ]
    if variant.name != BASE.name and BASE.name in seconds:
        gain = ratios(seconds, BASE.name, variant.name)
        rows.append(Row(f"{name} / {BASE.name}", gain, "times", "higher", steady=True))
    return rows


def roof(work: MinimalWork, batch: int, limits: Limits, variant: Variant) -> float:
    """Images a second if arithmetic or memory, whichever takes longer, were always at its best."""
    compute = limits.flops(bf16=variant.bf16) / work.flops
    moved = work.bytes(2 if variant.bf16 else 4, batch)
    return compute if moved is None else min(compute, limits.copy / moved)


def target(problem: Problem, variant: Variant, gpu: str | None) -> float | None:
    """The project's target for what training uses, on the GPUs that it was set for."""
    known = gpu is not None and any(name in gpu for name in TARGET_GPUS)
    meant = variant == BEST and (problem.model, problem.image_size) == TARGET_NETWORK
    return TARGET if known and meant else None
