"""Training steps on synthetic images: recipes, our step in several forms, the plain step."""

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import nn

from mpl_fast import algorithms, losses, models
from mpl_fast.algorithms.base import AlgorithmContext, train_step
from mpl_fast.batch import Batch, image_buffer
from mpl_fast.config import (
    AlgorithmConfig,
    ConsistencyConfig,
    FixMatchConfig,
    LearnerConfig,
    MetaSemiConfig,
    MPLConfig,
    RolePlayConfig,
    SMPLConfig,
    SupervisedConfig,
    UDAConfig,
)
from mpl_fast.config.algorithms import NormBatches
from mpl_fast.config.run import Graphs
from mpl_fast.learner import Learner
from mpl_fast.learner.compilation import Mode
from mpl_fast.training.step_graph import StepGraph
from tools.bench import step_reference
from tools.bench.clock import Work
from tools.bench.harness import at_least
from tools.bench.machine import DEVICES, choose_device

STEPS = 10**6  # of the imitated run, so that its learning rate hardly changes
PLAIN, PLAIN_AMP = "plain fp32", "plain amp"

# No dropout, whose masks no two implementations draw alike.
_ONE = LearnerConfig(lr=0.03, warmup=0, dropout=0.0)
_AVERAGED = dataclasses.replace(_ONE, ema=0.995)
# No ramps: a CUDA graph repeats only steps whose weights no longer change.
_AGREE = ConsistencyConfig(weight=8.0, ramp=0)
_MPL = MPLConfig(teacher=_ONE, student=_AVERAGED, consistency=_AGREE)
RECIPES: dict[str, AlgorithmConfig] = {
    "mpl": _MPL,
    "mpl_exact": dataclasses.replace(_MPL, feedback="exact"),
    "mpl_roleplay": RolePlayConfig(teacher=_AVERAGED, student=_AVERAGED, consistency=_AGREE),
    "uda": UDAConfig(learner=_AVERAGED, consistency=_AGREE),
    "fixmatch": FixMatchConfig(learner=_AVERAGED),
    "supervised": SupervisedConfig(learner=_AVERAGED),
    "smpl": SMPLConfig(learner=_AVERAGED, consistency=_AGREE),
    "smpl_exact": SMPLConfig(learner=_AVERAGED, consistency=_AGREE, feedback="exact"),
    "metasemi": MetaSemiConfig(learner=_AVERAGED),
}
PARITY = dataclasses.replace(
    _MPL,
    teacher=dataclasses.replace(_ONE, conventions="kekmodel", max_grad_norm=1e9),
    student=dataclasses.replace(_AVERAGED, conventions="kekmodel", max_grad_norm=1e9),
    consistency=dataclasses.replace(_AGREE, ramp=5),
    feedback="parity_kekmodel",
)


class Setting(NamedTuple):
    """The sizes of a step."""

    model: str
    labeled: int  # images
    mu: int  # unlabeled images for each of them
    size: int  # pixels
    device: torch.device

    @property
    def classes(self) -> int:
        """Width of the last layer."""
        return 10 if self.model in models.OWN else 1000

    @property
    def distinct(self) -> int:
        """Images of a step, each counted once."""
        return self.labeled * (1 + self.mu)

    def counts(self, recipe: str) -> tuple[int, int]:
        """Labeled and unlabeled images; a labeled-only recipe gets as many images."""
        if recipe == "supervised":
            return self.distinct, 0
        return self.labeled, self.labeled * self.mu


class Flavor(NamedTuple):
    """How our step runs."""

    bf16: bool = False
    compiled: Mode = "off"
    norm_batches: NormBatches = "joint"
    graphs: Graphs = "off"
    norm: Literal["batch", "sync"] = "batch"

    @property
    def how(self) -> str:
        """Precision, compilation and graphs: what a forward pass is made of."""
        mode = "eager" if self.compiled == "off" else "compiled"
        graphs = " step-graph" if self.graphs == "step" else ""
        return f"{'bf16' if self.bf16 else 'fp32'} {mode}{graphs}"

    @property
    def name(self) -> str:
        """As it is reported."""
        return f"ours {self.how} {self.norm_batches}"


class Variant(NamedTuple):
    """A step that can be timed; the methods of its `owners` are its phases."""

    name: str
    step: Work
    owners: Mapping[str, object]
    flavor: Flavor | None = None


Builder = Callable[[], Variant]


def builders(setting: Setting) -> dict[str, Builder]:
    """All variants of a step of MPL, the most important first.

    CUDA graphs are for small networks: each keeps the memory of its step to itself.
    """
    joint, split = Flavor(True, "default", "joint"), Flavor(True, "default", "split")
    single = [one._replace(bf16=False) for one in (joint, split)]
    half = [joint, split]
    if setting.device.type == "cuda" and setting.model in models.OWN:
        half += [split._replace(graphs="step"), joint._replace(graphs="step")]
    made: dict[str, Builder] = {
        PLAIN_AMP: partial(plain, setting, amp=True),
        PLAIN: partial(plain, setting, amp=False),
    }
    for alike in (half, single, [Flavor()]):
        for flavor in alike:
            made[flavor.name] = partial(ours, setting, "mpl", flavor)
        # What the steps of this kind are compared with.
        made[f"one pass {alike[0].how}"] = partial(one_pass, setting, alike[0])
    return made


def add_setting_options(parser: argparse.ArgumentParser, labeled: str, mu: int = 7) -> None:
    """Network, sizes and device of a step."""
    add, number = parser.add_argument, at_least(1)
    add("--model", default="wrn_28_2", metavar="NAME", help="any that mpl_fast has (%(default)s)")
    add("--labeled", type=number, metavar="N", help=f"labeled images of a rank ({labeled})")
    add("--mu", type=number, default=mu, metavar="N", help="unlabeled for each (%(default)s)")
    add("--image-size", type=number, metavar="N", help="pixels (what the network is made for)")
    add("--device", choices=DEVICES, default="auto", help="(%(default)s)")


def setting_of(options: argparse.Namespace, *, cuda: int, cpu: int) -> Setting:
    """The setting of these options; `cuda`, `cpu`: labeled images where none are given.

    Raises `ConfigError` for an unknown network, before minutes of measuring, or processes.
    """
    device = choose_device(options.device)
    options.device = device.type
    options.labeled = options.labeled or (cuda if device.type == "cuda" else cpu)
    options.image_size = options.image_size or (32 if options.model in models.OWN else 224)
    sizes = (options.labeled, options.mu, options.image_size)
    setting = Setting(options.model, *sizes, device)
    network(setting)
    return setting


def network(setting: Setting, seed: int = 0) -> nn.Module:
    """Fresh weights on the CPU, the same ones for the same seed."""
    torch.manual_seed(seed)
    return models.build(setting.model, setting.classes)


def batch(setting: Setting, recipe: str, dtype: torch.dtype = torch.float32) -> Batch:
    """Random images in the layout that a loader gives."""
    labeled, unlabeled = setting.counts(recipe)
    generator = torch.Generator().manual_seed(1)
    views = image_buffer(labeled, unlabeled, setting.size, dtype, setting.device)
    for view in views:
        view.copy_(torch.randn(view.shape, generator=generator))
    labels, truth = (
        torch.randint(setting.classes, (n,), generator=generator).to(setting.device)
        for n in (labeled, unlabeled)
    )
    return Batch(views[0], labels, views[1], views[2], truth)


def plain(setting: Setting, amp: bool) -> Variant:
    """The plain PyTorch step, in NCHW and with its three views in three pieces of memory."""
    teacher, student = (network(setting, seed) for seed in (0, 1))
    settings, device = plain_settings(_MPL), setting.device
    one = step_reference.PlainStep(teacher, student, settings, device=device, amp=amp)
    images = Batch(*(tensor.contiguous() for tensor in batch(setting, "mpl")))
    return Variant(PLAIN_AMP if amp else PLAIN, lambda: one.step(images), {"": one})


def plain_settings(config: MPLConfig) -> step_reference.Settings:
    """The plain step's options for the same computation."""
    teacher, student, agree = config.teacher, config.student, config.consistency
    return step_reference.Settings(
        teacher_lr=teacher.lr,
        student_lr=student.lr,
        total_steps=STEPS,
        momentum=student.momentum,
        nesterov=student.nesterov,
        weight_decay=student.weight_decay,
        label_smoothing=config.label_smoothing,
        temperature=agree.temperature,
        threshold=agree.threshold,
        lambda_u=agree.weight,
        uda_steps=agree.ramp,
        ema=student.ema,
    )


def ours(setting: Setting, recipe: str, flavor: Flavor) -> Variant:
    """Our step of a recipe; MPL also with its views normalized `split`."""
    config = RECIPES[recipe]
    if isinstance(config, MPLConfig):
        config = dataclasses.replace(config, bn_batches=flavor.norm_batches)
    algorithm = algorithm_of(setting, config, flavor)
    images = batch(setting, recipe, torch.bfloat16 if flavor.bf16 else torch.float32)
    turn = iter(range(STEPS))
    repeat = StepGraph(algorithm).step if flavor.graphs == "step" else None

    return Variant(
        flavor.name,
        lambda: train_step(algorithm, images, next(turn), repeat),
        algorithm.learners,
        flavor,
    )


def algorithm_of(setting: Setting, config: AlgorithmConfig, flavor: Flavor) -> algorithms.Algorithm:
    """A recipe at its start."""
    seeds = iter(range(9))

    def new_learner(learner: LearnerConfig) -> Learner:
        return learner_of(setting, learner, flavor, next(seeds))

    return algorithms.build(config, new_learner, AlgorithmContext(0, 1000))


def learner_of(setting: Setting, config: LearnerConfig, flavor: Flavor, seed: int = 0) -> Learner:
    """A network with what trains it."""
    made = network(setting, seed)
    return Learner(
        models.synchronized(made) if flavor.norm == "sync" else made,
        config,
        steps=STEPS,
        device=setting.device,
        bf16=flavor.bf16,
        compiled=flavor.compiled,
        graphs=flavor.graphs,
    )


def one_pass(setting: Setting, flavor: Flavor) -> Variant:
    """Cross-entropy of a step's distinct images, forward and backward, and nothing else."""
    learner = learner_of(setting, LearnerConfig(dropout=0.0), flavor)
    learner.begin_step(0)
    images = batch(setting, "supervised", torch.bfloat16 if flavor.bf16 else torch.float32)

    def step() -> None:
        for parameter in learner.parameters:
            parameter.grad = None
        losses.smoothed_ce(learner(images.labeled), images.labels).loss.backward()

    return Variant(f"one pass {flavor.how}", step, {})
