"""Ways to do what follows a backward pass: clip, descend, average."""

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mpl_fast.learner import Learner
from mpl_fast.learner import apex as nvidia_apex
from tools.bench_tails.problem import CONFIG, Problem, counters, groups, values

Work = Callable[[], Any]
FIRST_STEP = 10**6  # of the learner's average, whose decay has warmed up by then


class Tail(NamedTuple):
    """`work` moves the weights and the average once, down the gradients."""

    network: nn.Module
    average: nn.Module
    gradients: list[Tensor]
    work: Work

    def load(self, gradients: Sequence[Tensor], factor: float) -> None:
        """Takes other gradients: a tail may scale its own in place."""
        for mine, given in zip(self.gradients, gradients, strict=True):
            mine.copy_(given * factor)


HAND_OVER, PER_TENSOR = "gradients handed over, no tail", "per tensor"


def contestants(device: torch.device) -> dict[str, Callable[[Problem], Tail]]:
    """By name; apex's on a GPU where NVIDIA's apex can be used."""
    found = {HAND_OVER: hand_over, PER_TENSOR: per_tensor, "foreach": foreach, "fused": fused}
    if device.type == "cuda" and nvidia_apex.find() == "usable":
        found["apex FusedSGD"] = apex
    return {**found, "ours (Learner)": ours}


def hand_over(problem: Problem) -> Tail:
    """What all tails begin and end with, as around a backward pass: gradients come and go."""
    network, average = problem.copies()
    return _tail(problem, network, average, lambda: None)


def per_tensor(problem: Problem) -> Tail:
    """Loops over the parameters, as the common reference codes have it."""
    network, average = problem.copies()
    parameters = list(network.parameters())
    optimizer = _sgd(network, foreach=False)
    moving = list(zip(values(average), values(network), strict=True))
    copied = list(zip(counters(average), counters(network), strict=True))

    @torch.no_grad()
    def work() -> None:
        nn.utils.clip_grad_norm_(parameters, CONFIG.max_grad_norm, foreach=False)
        optimizer.step()
        for kept, mine in moving:
            kept.mul_(CONFIG.ema).add_(mine, alpha=1.0 - CONFIG.ema)
        for kept, mine in copied:
            kept.copy_(mine)

    return _tail(problem, network, average, work)


def foreach(problem: Problem) -> Tail:
    """PyTorch's operators over lists of tensors."""
    network, average = problem.copies()
    parameters, optimizer = list(network.parameters()), _sgd(network, foreach=True)
    averaging = _averaging(average, network)

    @torch.no_grad()
    def work() -> None:
        nn.utils.clip_grad_norm_(parameters, CONFIG.max_grad_norm, foreach=True)
        optimizer.step()
        averaging()

    return _tail(problem, network, average, work)


def fused(problem: Problem) -> Tail:
    """PyTorch's fused SGD clips, and skips what is not finite, inside of its one pass."""
    network, average = problem.copies()
    parameters = list(network.parameters())
    optimizer: Any = _sgd(network, fused=True)
    for parameter in parameters:  # else a first step that is skipped would leave them undefined
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    averaging = _averaging(average, network)

    @torch.no_grad()
    def work() -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.stack(torch._foreach_norm(gradients)).norm()
        optimizer.grad_scale = ((norm + 1e-6) / CONFIG.max_grad_norm).clamp(min=1.0)
        optimizer.found_inf = (~norm.isfinite()).float()
        optimizer.step()
        averaging()

    return _tail(problem, network, average, work)


def apex(problem: Problem) -> Tail:
    """NVIDIA's fused SGD, which does not clip: PyTorch does."""
    network, average = problem.copies()
    parameters = list(network.parameters())
    optimizer = nvidia_apex.fused_sgd(
        groups(network), lr=CONFIG.lr, momentum=CONFIG.momentum, nesterov=CONFIG.nesterov
    )
    averaging = _averaging(average, network)

    @torch.no_grad()
    def work() -> None:
        nn.utils.clip_grad_norm_(parameters, CONFIG.max_grad_norm, foreach=True)
        optimizer.step()
        averaging()

    return _tail(problem, network, average, work)


def ours(problem: Problem) -> Tail:
    """What training does, which also keeps batch-norm statistics from what is not finite."""
    network, _ = problem.copies()
    learner = Learner(network, CONFIG, steps=10 * FIRST_STEP, device=problem.device)
    learner.begin_step(0)
    steps = count(FIRST_STEP)
    assert learner.average is not None

    def work() -> None:
        learner.optimizer_step()
        learner.end_step(next(steps))

    return _tail(problem, learner.network, learner.average, work)


def _tail(problem: Problem, network: nn.Module, average: nn.Module, work: Work) -> Tail:
    gradients, parameters = [g.clone() for g in problem.gradients], list(network.parameters())

    def whole() -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        work()
        for parameter in parameters:
            parameter.grad = None

    return Tail(network, average, gradients, whole)


def _sgd(network: nn.Module, *, foreach: bool = False, fused: bool = False) -> torch.optim.SGD:
    return torch.optim.SGD(
        groups(network),
        CONFIG.lr,
        momentum=CONFIG.momentum,
        nesterov=CONFIG.nesterov,
        foreach=foreach,
        fused=fused,
    )


def _averaging(average: nn.Module, network: nn.Module) -> Work:
    kept, mine, weight = values(average), values(network), 1.0 - CONFIG.ema
    copies, originals = counters(average), counters(network)

    def work() -> None:
        torch._foreach_lerp_(kept, mine, weight)
        if copies:
            torch._foreach_copy_(copies, originals)

    return work
