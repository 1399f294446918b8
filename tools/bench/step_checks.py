"""Checks that what is timed computes the same: ours and the plain step, compiled and eager."""

import copy
import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mpl_fast.algorithms.base import train_step
from mpl_fast.config import MPLConfig
from mpl_fast.learner import Learner
from tools.bench.step_reference import PlainStep
from tools.bench.step_variants import (
    PARITY,
    STEPS,
    Flavor,
    Setting,
    Variant,
    algorithm_of,
    batch,
    network,
    plain_settings,
)

# Largest difference over the largest value. On a GPU float32 products may be TF32's, in another
# order in compiled networks.
EXACT, FP32, TF32, BF16 = 1e-6, 1e-3, 0.03, 0.1
COMPARED = ("loss/labeled", "loss/consistency", "loss/student", "feedback", "loss/teacher")
PARITY_STEPS = 3


class Check(NamedTuple):
    """A comparison and its result."""

    what: str
    error: float
    tolerance: float

    @property
    def wrong(self) -> bool:
        """Also for NaN."""
        return not self.error <= self.tolerance


def parity(setting: Setting) -> Check:
    """Our parity step and the plain one, the same weights and images, in float64 on the CPU.

    The images are few and small: the step is compared, not how the network scales.
    """
    cpu = torch.device("cpu")
    setting = setting._replace(labeled=4, mu=2, size=min(setting.size, 32), device=cpu)
    images = batch(setting, "mpl", torch.float64)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # of fresh networks
    try:
        nets = [network(setting, seed) for seed in (0, 1)]
        config = _with_some_above_threshold(PARITY, nets[0], images.weak)
        algorithm = algorithm_of(setting, config, Flavor())
    finally:
        torch.set_default_dtype(default)
    plain = PlainStep(nets[0], nets[1], plain_settings(config))
    pairs = list[tuple[Tensor, Tensor]]()
    for t in range(PARITY_STEPS):
        right, mine = plain.step(images), train_step(algorithm, images, t)
        pairs += [(torch.tensor(right[key], dtype=torch.float64), mine[key]) for key in COMPARED]
    student = algorithm.learners["student"]
    pairs += zip(plain.student.parameters(), student.parameters, strict=True)
    error = float(torch.tensor([_difference(a, b) for a, b in pairs]).max())  # NaN if one is
    what = f"our parity step and the plain step in float64, {PARITY_STEPS} steps"
    return Check(what, error, EXACT)


def compiled_logits(variant: Variant, setting: Setting) -> list[Check]:
    """Logits of each compiled network and of an eager copy of it."""
    flavor = variant.flavor
    if flavor is None or flavor.compiled == "off":
        return []
    images = batch(setting, "mpl", torch.bfloat16 if flavor.bf16 else torch.float32).labeled
    tolerance = TF32 if setting.device.type == "cuda" else FP32
    found = []
    for name, learner in variant.owners.items():
        assert isinstance(learner, Learner)
        eager = Learner(
            copy.deepcopy(learner.network),  # which drops the compiled form
            learner.config,
            steps=STEPS,
            device=learner.device,
            bf16=learner.bf16,
        )
        error = _difference(learner.forward_batch_stats(images), eager.forward_batch_stats(images))
        what = f"{variant.name}: logits of the {name}, compiled and eager"
        found.append(Check(what, error, BF16 if flavor.bf16 else tolerance))
    return found


@torch.no_grad()
def _with_some_above_threshold(config: MPLConfig, teacher: nn.Module, weak: Tensor) -> MPLConfig:
    """A threshold that about half of the images reach, else the consistency loss would be 0."""
    network = copy.deepcopy(teacher)
    confidence = (network(weak) / config.consistency.temperature).softmax(-1).amax(-1)
    threshold = float(confidence.median()) - 1e-9
    consistency = dataclasses.replace(config.consistency, threshold=threshold)
    return dataclasses.replace(config, consistency=consistency)


def _difference(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))
