"""What is timed computes the same: ours and the plain step, compiled and eager networks."""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mpl_fast.algorithms.base import train_step
from mpl_fast.config import MPLConfig
from mpl_fast.learner import Learner
from tools.bench_steps.contestants import Contestant, Flavor, algorithm_of
from tools.bench_steps.plain import PlainStep
from tools.bench_steps.setting import PARITY, STEPS, Setting, batch, network

Json = dict[str, Any]
# Largest difference over the largest value. On a GPU float32 products may be TF32's, in another
# order in compiled networks.
EXACT, FP32, TF32, BF16 = 1e-6, 1e-3, 0.03, 0.1
COMPARED = ("loss/labeled", "loss/consistency", "loss/student", "h", "loss/teacher")
PARITY_STEPS = 3


def parity(setting: Setting) -> Json:
    """Our parity step and the plain one, the same weights and images, in float64 on the CPU.

    The images are few and small: what is compared is the step, not how the network scales.
    """
    setting = setting._replace(
        labeled=4, mu=2, size=min(setting.size, 32), device=torch.device("cpu")
    )
    images = batch(setting, "mpl", torch.float64)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # of fresh networks
    try:
        nets = [network(setting, seed) for seed in (0, 1)]
        config = _some_sure(PARITY, nets[0], images.weak)
        algorithm = algorithm_of(setting, config, Flavor())
    finally:
        torch.set_default_dtype(default)
    theirs = PlainStep(nets[0], nets[1], config, steps=STEPS, device=setting.device)
    error = 0.0
    for t in range(PARITY_STEPS):
        plain, mine = theirs.step(images), train_step(algorithm, images, t)
        error = max(error, *(_relative(mine[key].item(), plain[key]) for key in COMPARED))
    pairs = zip(theirs.student.parameters(), algorithm.learners["student"].parameters, strict=True)
    error = max(error, *(_difference(a, b) for a, b in pairs))
    what = f"our parity step and the plain step in float64, {PARITY_STEPS} steps"
    return _row(what, error, EXACT)


def logits(contestant: Contestant, images: Tensor) -> list[Json]:
    """Each compiled network and an eager copy of it, judging the same images."""
    flavor = contestant.flavor
    if flavor is None or flavor.compiled == "off":
        return []
    found = []
    for name, learner in contestant.owners.items():
        assert isinstance(learner, Learner)
        eager = Learner(
            copy.deepcopy(learner.network),  # which leaves the compiled form behind
            learner.config,
            steps=STEPS,
            device=learner.device,
            bf16=learner.bf16,
        )
        error = _difference(learner.forward_batch_stats(images), eager.forward_batch_stats(images))
        what = f"{contestant.name}: logits of the {name}, compiled and eager"
        found.append(_row(what, error, _tolerance(flavor, learner.device)))
    return found


def same_losses(told: Mapping[Flavor, Mapping[str, float]], device: torch.device) -> list[Json]:
    """Losses of the same step, of all that have the same precision and normalize alike.

    The first of them is what the others are compared with: compiled with eager, graphs with none.
    """
    found, first = list[Json](), dict[tuple[bool, str], Flavor]()
    for flavor, mine in told.items():
        other = first.setdefault((flavor.bf16, flavor.norm_batches), flavor)
        if other == flavor:
            continue
        losses = [name for name in mine if name.startswith("loss/") and name != "loss/feedback"]
        a, b = (torch.tensor([x[name] for name in losses]) for x in (mine, told[other]))
        what = f"losses of a step of {flavor.name} and of {other.name}"
        found.append(_row(what, _difference(a, b), _tolerance(flavor, device)))
    return found


def _tolerance(flavor: Flavor, device: torch.device) -> float:
    if flavor.bf16:
        return BF16
    return TF32 if device.type == "cuda" else FP32


@torch.no_grad()
def _some_sure(config: MPLConfig, teacher: nn.Module, weak: Tensor) -> MPLConfig:
    """With a threshold that about half of the images reach, or the consistency would be 0."""
    kept = copy.deepcopy(teacher)
    sure = (kept(weak) / config.consistency.temperature).softmax(-1).amax(-1)
    threshold = float(sure.median()) - 1e-9
    consistency = dataclasses.replace(config.consistency, threshold=threshold)
    return dataclasses.replace(config, consistency=consistency)


def _row(what: str, error: float, tolerance: float) -> Json:
    return {"what": what, "error": error, "tolerance": tolerance, "wrong": not error <= tolerance}


def _relative(a: float, b: float) -> float:
    return abs(a - b) / max(abs(a), abs(b), 1e-12)


def _difference(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))
