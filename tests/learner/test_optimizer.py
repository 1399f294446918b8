"""Steps of the clipped optimizer, written out by hand, with PyTorch's and apex's kernels."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpl_fast.config import LearnerConfig
from mpl_fast.errors import ConfigError
from mpl_fast.learner import apex
from mpl_fast.learner.optimizer import ClippedOptimizer

CONFIG = LearnerConfig(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01, max_grad_norm=1.0)


class LikeApex(torch.optim.Optimizer):
    """apex's kernel in plain PyTorch, after its source (csrc/multi_tensor_sgd_kernel.cu)."""

    def __init__(self, groups: Any, *, lr: float, momentum: float, nesterov: bool) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "nesterov": nesterov})
        self._dummy_overflow_buf = torch.zeros(1, dtype=torch.int32)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if self._dummy_overflow_buf.item():
            return
        for group in self.param_groups:
            for p in group["params"]:
                assert p.grad is not None
                g, m = p.grad + group["weight_decay"] * p, self.state[p]["momentum_buffer"]
                m.mul_(group["momentum"]).add_(g)
                p -= group["lr"] * (g + group["momentum"] * m if group["nesterov"] else m)


@pytest.fixture(autouse=True)
def like_apex(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apex, "fused_sgd", LikeApex)


def made(config: LearnerConfig = CONFIG, **options: bool) -> tuple[nn.Module, ClippedOptimizer]:
    torch.manual_seed(0)
    network = nn.Linear(3, 2)
    return network, ClippedOptimizer(network, config, **options)


def gradients(network: nn.Module, seed: int, scale: float = 1.0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    for p in network.parameters():
        p.grad = scale * torch.randn(p.shape, generator=g)
    return [p.grad for p in network.parameters() if p.grad is not None]


def by_hand(network: nn.Module, steps: list[tuple[int, float]]) -> list[Tensor]:
    """Weights in float64 after steps with gradients of these seeds and scales."""
    weights = [p.detach().double() for p in network.parameters()]
    momenta = [torch.zeros_like(w) for w in weights]
    for seed, scale in steps:
        raw = gradients(network, seed, scale)
        norm = torch.cat([g.flatten() for g in raw]).norm()
        if not norm.isfinite():
            continue
        factor = min(1.0, CONFIG.max_grad_norm / (norm.item() + 1e-6))
        for i, (w, g) in enumerate(zip(weights, raw, strict=True)):
            g = g.double() * factor + (CONFIG.weight_decay * w if w.ndim > 1 else 0.0)
            momenta[i] = 0.9 * momenta[i] + g
            weights[i] = w - 0.1 * (g + 0.9 * momenta[i])
    return weights


# The last norm is too large for its type.
BAD = [(0, math.nan), (1, 3.0), (2, 0.01), (3, math.inf), (4, 1.0), (5, 1e30)]


@pytest.mark.parametrize("steps", [BAD, BAD[1:3]])
@pytest.mark.parametrize("backend", ["torch", "apex"])
def test_steps_are_those_by_hand(backend: Any, steps: list[tuple[int, float]]) -> None:
    """Clipped, decayed, and skipped where a gradient is not finite, even the first of all."""
    network, optimizer = made(replace(CONFIG, optimizer_backend=backend))
    expected = by_hand(network, steps)
    for seed, scale in steps:
        clipping, finite = optimizer.step(gradients(network, seed, scale))
        assert bool(finite) == (scale < 1e30)
        if finite:
            assert (clipping < 1) == (scale >= 1)
    for p, w in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach().double(), w, rtol=1e-5, atol=1e-7)


def test_without_nvidias_apex_its_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="optimizer_backend apex needs NVIDIA's apex"):
        ClippedOptimizer(nn.Linear(2, 2), replace(CONFIG, optimizer_backend="apex"))


def test_a_learning_rate_in_a_tensor_is_like_a_number() -> None:
    ends = []
    for fixed in (False, True):
        network, optimizer = made(lr_tensor=fixed)
        for seed, rate in enumerate((0.3, 0.1, 0.0)):
            optimizer.lr = rate
            optimizer.step(gradients(network, seed))
        assert optimizer.lr == 0.0
        state = optimizer.state_dict()
        assert all(group["lr"] == 0.0 for group in state["param_groups"])
        ends.append([p.detach().clone() for p in network.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*ends, strict=True))


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("fixed", [False, True])
def test_loading_a_state_keeps_the_options_of_this_run(fixed: bool, name: Any) -> None:
    """A state without fused steps, or with another choice of graphs."""
    config = replace(CONFIG, optimizer=name, nesterov=name == "sgd")
    network, optimizer = made(config, lr_tensor=not fixed)
    optimizer.lr = 0.3
    optimizer.step(gradients(network, 0))
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        group["fused"] = False
    other = ClippedOptimizer(network, config, lr_tensor=fixed)
    other.load_state_dict(state)
    group = other.optimizer.param_groups[0]
    assert group["fused"] and group.get("capturable", fixed) == fixed and other.lr == 0.3
    moments = [next(iter(s.values())) for s in other.optimizer.state.values()]
    assert any(m.abs().sum() > 0 for m in moments)
    _, finite = other.step(gradients(network, 1))
    assert finite
