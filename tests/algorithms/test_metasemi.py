"""MetaSemi's correction of labels: the meta-gradient. (Its step: test_definitions.py.)"""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mpl_fast.algorithms.metasemi import MetaSemi
from mpl_fast.config import MetaSemiConfig
from tests.algorithms import definitions, problems
from tests.algorithms.problems import PLAIN, flat

CONFIG = MetaSemiConfig(learner=replace(PLAIN, lr=0.2), derivative="forward")
DATA = problems.batch(0, 4, 7, (3, 9, 9))


def network() -> nn.Module:
    """With running statistics that no batch has."""
    made = problems.network(norm=True)
    norm = made[1]
    assert isinstance(norm, nn.BatchNorm2d)
    norm.running_mean = torch.linspace(-0.3, 0.4, 4, dtype=torch.float64)
    norm.running_var = torch.linspace(0.2, 0.9, 4, dtype=torch.float64)
    return made


def metasemi(**options: Any) -> MetaSemi:
    made = problems.new(replace(CONFIG, **options), network)
    assert isinstance(made, MetaSemi)
    made.learner.begin_step(0)
    return made


@pytest.mark.parametrize("label_rate", [0.0, 0.2, 3.0])
@pytest.mark.parametrize(("derivative", "tolerance"), [("forward", 1e-9), ("central", 1e-4)])
def test_correction_is_the_meta_gradient(
    derivative: str, tolerance: float, label_rate: float
) -> None:
    algorithm = metasemi(derivative=derivative, label_rate=label_rate)
    labels, labeled = algorithm.corrected_labels(DATA)
    module = algorithm.learner.network
    expected, loss = definitions.corrected_labels(module, DATA, label_rate or 0.2)
    torch.testing.assert_close(labels, expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(labeled, loss, rtol=0, atol=1e-12)
    assert (labels - algorithm.learner.infer(DATA.weak).softmax(-1)).abs().max() > 0.01
    assert all(m.training for m in module.modules())
    if label_rate == 3.0:
        assert (labels == 0).any()  # what relu cut off


def test_no_label_can_become_zero_everywhere() -> None:
    """J g sums to 0 in each row, so that some class always gains: however large the step."""
    labels, _ = metasemi(label_rate=1e6).corrected_labels(DATA)
    torch.testing.assert_close(labels.sum(-1), torch.ones(7, dtype=torch.float64))
    assert (labels == 0).any(-1).all()


@pytest.mark.parametrize("epsilon", [0.01, 0.5])
def test_epsilon_is_the_length_of_the_step_in_weight_space(epsilon: float) -> None:
    algorithm = metasemi(derivative="central", epsilon=epsilon)
    labels, _ = algorithm.corrected_labels(DATA)
    module = copy.deepcopy(algorithm.learner.network).eval()
    loss = F.cross_entropy(module(DATA.labeled), DATA.labels)
    gradients = torch.autograd.grad(loss, list(module.parameters()))
    step = epsilon / flat(gradients).norm()
    ends = []
    with torch.no_grad():
        for sign in (1.0, -1.0):
            moved = copy.deepcopy(module)
            for p, g in zip(moved.parameters(), gradients, strict=True):
                p.add_(sign * step * g)
            ends.append(moved(DATA.weak))
        dz = (ends[0] - ends[1]) / (2.0 * step)
        p = module(DATA.weak).softmax(-1)
        left = (p - 0.2 * 2.0 * p * (dz - (p * dz).sum(-1, keepdim=True))).clamp_min(0.0)
    torch.testing.assert_close(labels, left / left.sum(-1, keepdim=True), rtol=0, atol=1e-11)
