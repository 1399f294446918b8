"""A dry run's numbers are those of real steps: rows, operations, memory, checkpoint."""

import io
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from mpl_fast import algorithms, models
from mpl_fast.algorithms.base import Algorithm, AlgorithmContext, train_step
from mpl_fast.batch import Batch, image_buffer
from mpl_fast.config import LearnerConfig, MetaSemiConfig, MPLConfig, RunConfig, SupervisedConfig
from mpl_fast.config.command_line import parse
from mpl_fast.dry_run import estimate
from mpl_fast.dry_run.network import NetworkCost, measure
from mpl_fast.learner import Learner
from mpl_fast.training.rows import StepRows, count
from tests.tiny_run import ALGORITHMS, arguments

SIDE, CLASSES, L, U = 16, 10, 4, 12
# Recipes, and in how many microbatches.
SAVING = {"supervised": 1, "uda": 2, "mpl": 1, "mpl exact split recompute": 2, "smpl": 1}
CPU = torch.device("cpu")


def config_of(recipe: str, folder: Path) -> RunConfig:
    return parse(arguments(folder / "run", folder, recipe=recipe))


def real(config: RunConfig, bf16: bool = False) -> tuple[Algorithm, Batch]:
    """The algorithm with real networks, and a batch as the loader lays it out."""
    torch.manual_seed(0)
    algorithm = algorithms.build(
        config.algorithm,
        lambda learner: Learner(
            models.build("wrn_10_1", CLASSES), learner, steps=config.steps, bf16=bf16
        ),
        AlgorithmContext(microbatches=config.microbatches),
    )
    dtype = torch.bfloat16 if bf16 else torch.float32
    u = 0 if config.algorithm.labeled_only else U
    labeled, weak, strong = (view.normal_() for view in image_buffer(L, u, SIDE, dtype, CPU))
    labels, truth = (torch.arange(n) % CLASSES for n in (L, u))
    return algorithm, Batch(labeled, labels, weak, strong, truth)


def rows_of(config: RunConfig) -> StepRows:
    u = 0 if config.algorithm.labeled_only else U
    return count(config.algorithm, L, u, steps=config.steps, microbatches=config.microbatches)


@cache
def cost(bf16: bool = False) -> NetworkCost:
    return measure(models.build("wrn_10_1", CLASSES), SIDE, device=CPU, bf16=bf16)


def watch(algorithm: Algorithm) -> Counter[str]:
    """Counts the rows of the first convolutions of real networks in the passes that follow."""
    seen: Counter[str] = Counter()

    def see(layer: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        tangent = torch.autograd.forward_ad.unpack_dual(made).tangent is not None
        seen["tangent" if tangent else "forward"] += len(made)
        if made.requires_grad:
            made.register_hook(lambda gradient: seen.update(backward=len(gradient)))

    def see_norm(norm: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        if norm.training or norm.running_mean is None:
            seen["smallest"] = min(seen["smallest"] or len(made), len(made))

    for learner in algorithm.learners.values():
        first = next(m for m in learner.network.modules() if isinstance(m, nn.Conv2d))
        first.register_forward_hook(see)
        norm = next(m for m in learner.network.modules() if isinstance(m, nn.BatchNorm2d))
        norm.register_forward_hook(see_norm)
    return seen


@pytest.mark.parametrize("recipe", ALGORITHMS)
def test_rows_and_operations_are_those_of_a_real_step(recipe: str, tmp_path: Path) -> None:
    config = config_of(recipe, tmp_path)
    algorithm, batch = real(config)
    seen, flops = watch(algorithm), FlopCounterMode(display=False)
    with flops:
        train_step(algorithm, batch, config.steps - 1)
    rows = rows_of(config)
    assert [seen[key] for key in ("forward", "backward", "tangent", "smallest")] == [
        rows.forward, rows.backward, rows.tangent, rows.smallest
    ]  # fmt: skip
    expected, found = estimate.step_flops(rows, cost()), flops.get_total_flops()
    # A pass in forward mode has no tangent of the images, so that the first layer costs less; and
    # the dot product that a step may take of logits is no pass.
    assert found == pytest.approx(expected, rel=0.02 if rows.tangent else 1e-4)


def test_rows_of_meta_pseudo_labels_by_hand() -> None:
    """128 labeled images and 7 times as many; in teacher and student."""
    joint = count(MPLConfig(), 128, 896, steps=100_000)
    assert joint.forward == (128 + 2 * 896) + 128 + 896 + 128
    assert joint.backward == (128 + 2 * 896) + 896
    assert (joint.held, joint.held_passes) == (128 + 3 * 896, 2)
    assert joint.largest == 128 + 2 * 896
    assert joint.smallest == 128
    split = count(MPLConfig(bn_batches="split"), 128, 896, steps=100_000)
    assert (split.forward, split.backward) == (joint.forward, joint.backward - 896)
    again = count(MPLConfig(teacher_graph="recompute"), 128, 896, steps=100_000)
    assert again.forward == joint.forward + 128 + 2 * 896
    assert again.held == 128 + 2 * 896
    waiting = count(MPLConfig(feedback="exact"), 128, 896, steps=100_000, step=0)
    assert waiting.tangent == 0  # no feedback while the student is not updated


def test_operations_and_memory_of_a_network_by_hand() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 64, 5))
    found = measure(network, 8, device=CPU, bf16=False)
    conv, linear = 2 * 3 * 9 * 4 * 64, 2 * 4 * 64 * 5
    assert found.forward == conv + linear
    assert found.backward == conv + 2 * linear  # no gradient of the images
    assert found.parameters == 3 * 9 * 4 + 4 + 4 * 64 * 5 + 5
    assert found.bytes == found.trained_bytes == 4 * found.parameters
    assert found.saved == 4 * 4 * 64  # what the linear layer saw
    assert found.saved_once == 0


def test_operations_of_a_depthwise_and_of_a_transposed_convolution() -> None:
    depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
    network = nn.Sequential(nn.Conv2d(3, 8, 1), depthwise, nn.ConvTranspose2d(8, 2, 2, 2))
    found = measure(nn.Sequential(*network, nn.Flatten()), 4, device=CPU, bf16=False)
    first, second, third = 2 * 3 * 8 * 16, 2 * 9 * 8 * 16, 2 * 8 * 2 * 4 * 16
    assert found.forward == first + second + third
    assert found.backward == first + 2 * second + 2 * third


def test_frozen_weights_cost_no_backward_pass() -> None:
    network = models.build("wrn_10_1", CLASSES, frozen=True)
    found, whole = measure(network, SIDE, device=CPU, bf16=False), cost()
    assert found.forward == whole.forward
    assert 0 < found.backward < 0.01 * whole.backward
    assert found.saved < 0.01 * whole.saved
    assert found.trained_bytes < 0.02 * found.bytes


class Saved:
    """Lives as long as the graph does that saved it."""


class Kept:
    """What a real step keeps for backward passes at any time, in bytes; shared memory once."""

    def __init__(self, algorithm: Algorithm, batch: Batch) -> None:
        networks = [learner.network for learner in algorithm.learners.values()]
        known = [t for n in networks for t in (*n.parameters(), *n.buffers())] + [batch.labeled]
        self._known = {t.untyped_storage().data_ptr() for t in known}
        self._held: WeakKeyDictionary[Saved, tuple[int, int]] = WeakKeyDictionary()
        self._hooks = saved_tensors_hooks(self.pack, lambda saved: saved[1])
        self.most = 0
        for network in networks:  # not around the step: losses differentiate without hooks
            network.register_forward_pre_hook(lambda *_: self._hooks.__enter__())
            network.register_forward_hook(lambda *_: self._hooks.__exit__())

    @property
    def now(self) -> int:
        return sum(dict(self._held.values()).values())

    def pack(self, tensor: Tensor) -> tuple[Saved, Tensor]:
        memory, saved = tensor.untyped_storage(), Saved()
        if memory.data_ptr() not in self._known:
            self._held[saved] = memory.data_ptr(), memory.nbytes()
            self.most = max(self.most, self.now)
        return saved, tensor


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("recipe", "parts"),
    [("supervised", 1), ("uda", 2), ("mpl", 1), ("mpl exact split recompute", 2), ("smpl", 1)],
)
def test_saved_activations_are_those_of_a_real_step(
    recipe: str, parts: int, bf16: bool, tmp_path: Path
) -> None:
    config = replace(config_of(recipe, tmp_path), microbatches=parts)
    algorithm, batch = real(config, bf16)
    kept = Kept(algorithm, batch)
    train_step(algorithm, batch, config.steps - 1)
    setting = estimate.Setting(config.algorithm, L, U, SIDE, bf16)
    estimated = estimate.memory(setting, rows_of(config), cost(bf16)).activations
    assert kept.now == 0
    assert estimated == pytest.approx(kept.most, rel=0.1)


@pytest.mark.slow
def test_a_compiled_network_saves_less() -> None:
    network = models.build("wrn_10_1", CLASSES)
    found = measure(network, SIDE, device=CPU, bf16=False, compiled=True)
    plain = cost()
    assert 0.4 * plain.saved < found.saved < 0.9 * plain.saved
    assert (found.forward, found.backward) == (plain.forward, plain.backward)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_memory_of_weights_is_exact(optimizer: Any) -> None:
    learner = LearnerConfig(optimizer=optimizer, ema=0.9, warmup=0)
    config = MPLConfig(teacher=replace(learner, ema=0.0), student=learner)
    algorithm, batch = real(RunConfig(algorithm=config, steps=9))
    train_step(algorithm, batch, 0)
    setting = estimate.Setting(config, L, U, SIDE, False)
    estimated = estimate.memory(setting, StepRows(), cost())
    learners = list(algorithm.learners.values())
    held = [list(x.optimizer.state.values()) for x in learners]
    moments = [t for states in held for s in states for t in s.values() if t.ndim]
    assert estimated.weights == sum(_size(x.network) for x in learners)
    assert estimated.average == _size(algorithm.learners["student"].average)
    assert estimated.optimizer == sum(t.nbytes for t in moments)
    assert estimated.gradients == sum(p.nbytes for x in learners for p in x.parameters)
    assert estimated.images == sum(x.nbytes for x in (batch.labeled, batch.weak, batch.strong))
    assert estimated.copies == estimated.activations == estimated.in_flight == 0
    graphs = replace(setting, graphs=True)
    assert estimate.memory(graphs, StepRows(), cost()).images == 2 * estimated.images


def _size(network: nn.Module | None) -> int:
    assert network is not None
    return sum(t.nbytes for t in (*network.parameters(), *network.buffers()))


def test_copies_of_weights_for_a_derivative() -> None:
    some = cost()
    for config, copies in (
        (MPLConfig(), 0),
        (MPLConfig(feedback="exact"), 2),
        (MPLConfig(feedback="exact", derivative="central"), 4),
        (MetaSemiConfig(), 4),
        (SupervisedConfig(), 0),
    ):
        estimated = estimate.memory(estimate.Setting(config, L, U, SIDE, False), StepRows(), some)
        assert estimated.copies == copies * some.trained_bytes


def test_size_of_a_checkpoint(tmp_path: Path) -> None:
    config = config_of("mpl", tmp_path)
    algorithm, batch = real(config)
    train_step(algorithm, batch, 0)
    buffer = io.BytesIO()
    torch.save({k: x.state_dict() for k, x in algorithm.learners.items()}, buffer)
    estimated = estimate.checkpoint_bytes(config.algorithm, cost())
    # The rest is names and padding of some 300 tensors.
    assert 0 < len(buffer.getbuffer()) - estimated < 200_000
