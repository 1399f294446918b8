"""Who takes part: the plain step, and ours in several precisions, compiled or not."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mpl_fast import algorithms, losses
from mpl_fast.algorithms.base import RunFacts, train_step
from mpl_fast.config import AlgorithmConfig, LearnerConfig, MPLConfig
from mpl_fast.config.algorithms import NormBatches
from mpl_fast.config.run import Graphs
from mpl_fast.learner import Learner
from mpl_fast.learner.compilation import Mode
from mpl_fast.training.step_graph import StepGraph
from tools.bench_steps.plain import PlainStep
from tools.bench_steps.setting import (
    RECIPES,
    SMALL,
    STEPS,
    Setting,
    batch,
    network,
    with_norm_batches,
)

PLAIN, PLAIN_AMP = "plain fp32", "plain amp"


class Flavor(NamedTuple):
    """How our step runs."""

    bf16: bool = False
    compiled: Mode = "off"
    norm_batches: NormBatches = "joint"
    graphs: Graphs = "off"

    @property
    def how(self) -> str:
        """Precision, compilation and graphs: what a forward pass is made of."""
        mode = {"off": "eager", "default": "compiled"}.get(self.compiled, self.compiled)
        graphs = {"off": "", "model": " graphs", "step": " step-graph"}[self.graphs]
        return f"{'bf16' if self.bf16 else 'fp32'} {mode}{graphs}"

    @property
    def name(self) -> str:
        """As it is reported."""
        return f"ours {self.how} {self.norm_batches}"


class Contestant(NamedTuple):
    """Something that can be timed; `owners` are the objects whose methods are its phases."""

    name: str
    step: Callable[[], Mapping[str, Any]]
    owners: Mapping[str, object]
    flavor: Flavor | None = None


def flavors(setting: Setting, compiled: Mode = "default") -> list[list[Flavor]]:
    """Ours, the most important first; those in one list make their passes alike.

    CUDA graphs are for small networks: each keeps the memory of its pass, or step, to itself.
    """
    joint, split = Flavor(True, compiled, "joint"), Flavor(True, compiled, "split")
    first, graphs = [joint, split], list[list[Flavor]]()
    if setting.device.type == "cuda" and setting.model.startswith(SMALL):
        first += [split._replace(graphs="step"), joint._replace(graphs="step")]
        graphs = [[joint._replace(graphs="model"), split._replace(graphs="model")]]
    single = [one._replace(bf16=False) for one in (joint, split)]
    return [first, *graphs, single, [Flavor()]]


def plain(setting: Setting, amp: bool) -> Contestant:
    """The public code's step."""
    config = RECIPES["mpl"]
    assert isinstance(config, MPLConfig)
    teacher, student = (network(setting, seed) for seed in (0, 1))
    one = PlainStep(teacher, student, config, steps=STEPS, device=setting.device, amp=amp)
    images = batch(setting, "mpl")
    images = images._replace(  # NCHW, and three pieces of memory
        labeled=images.labeled.contiguous(),
        weak=images.weak.contiguous(),
        strong=images.strong.contiguous(),
    )
    return Contestant(PLAIN_AMP if amp else PLAIN, lambda: one.step(images), {"": one})


def ours(setting: Setting, recipe: str, flavor: Flavor) -> Contestant | None:
    """Our step; None if the recipe knows nothing of the flavor."""
    config = with_norm_batches(RECIPES[recipe], flavor.norm_batches)
    if config is None:
        return None
    algorithm = algorithm_of(setting, config, flavor)
    images = batch(setting, recipe, torch.bfloat16 if flavor.bf16 else torch.float32)
    turn, repeat = iter(range(STEPS)), None
    if flavor.graphs == "step":
        repeat = StepGraph(algorithm).step

    def step() -> Mapping[str, Tensor]:
        if flavor.graphs == "model":  # or a later pass might overwrite what is still needed
            torch.compiler.cudagraph_mark_step_begin()
        return train_step(algorithm, images, next(turn), repeat)

    return Contestant(flavor.name, step, algorithm.learners, flavor)


def algorithm_of(setting: Setting, config: AlgorithmConfig, flavor: Flavor) -> algorithms.Algorithm:
    """A recipe at its start."""
    seeds = iter(range(9))

    def new_learner(learner: LearnerConfig) -> Learner:
        return learner_of(setting, learner, flavor, next(seeds))

    return algorithms.build(config, new_learner, RunFacts(0, 1000))


def learner_of(setting: Setting, config: LearnerConfig, flavor: Flavor, seed: int = 0) -> Learner:
    """A network with what trains it."""
    return Learner(
        network(setting, seed),
        config,
        steps=STEPS,
        device=setting.device,
        bf16=flavor.bf16,
        compiled=flavor.compiled,
        graphs=flavor.graphs,
    )


def one_pass(setting: Setting, flavor: Flavor) -> Contestant:
    """Cross-entropy of a step's distinct images, forward and backward, and nothing else."""
    learner = learner_of(setting, LearnerConfig(dropout=0.0), flavor)
    learner.begin_step(0)
    images = batch(setting, "supervised", torch.bfloat16 if flavor.bf16 else torch.float32)

    def step() -> Mapping[str, Tensor]:
        for parameter in learner.parameters:
            parameter.grad = None
        if flavor.graphs == "model":
            torch.compiler.cudagraph_mark_step_begin()
        loss = losses.smoothed_ce(learner(images.labeled), images.labels).loss
        loss.backward()
        return {"loss": loss.detach()}

    return Contestant(f"one pass {flavor.how}", step, {})
