"""Tiny float64 problems, and the meta-gradient by autograd through the student's step."""

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpl_fast.algorithms import AlgorithmContext, build
from mpl_fast.algorithms.base import train_step
from mpl_fast.algorithms.mpl import MetaPseudoLabels
from mpl_fast.batch import Batch
from mpl_fast.config import ConsistencyConfig, LearnerConfig, MPLConfig
from mpl_fast.learner import Learner
from mpl_fast.learner.compilation import Mode

CLASSES = 4
PLAIN = LearnerConfig(
    lr=1.0,
    momentum=0.0,
    nesterov=False,
    weight_decay=0.0,
    max_grad_norm=0.0,
    warmup=0,
    schedule="constant",
)
STUDENT = replace(PLAIN, lr=0.2)
NESTEROV = replace(STUDENT, momentum=0.9, nesterov=True, weight_decay=0.01)
SURE = ConsistencyConfig(weight=0.5, ramp=0, temperature=1.0, threshold=0.0)
SEED = 7  # of the dropout in the step that is looked at


def network(norm: bool = False, dropout: float = 0.0) -> nn.Sequential:
    """A smooth convolutional network, so that central differences are precise."""
    layers: list[nn.Module] = [nn.Conv2d(3, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(2)]
    if norm:
        layers.insert(1, nn.BatchNorm2d(4))
    if dropout:
        layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, CLASSES)).double()


def batch(seed: int = 0, labeled: int = 6, unlabeled: int = 5, side: int = 6) -> Batch:
    """Square images of 3 channels, the strong views like the weak ones with noise."""
    g = torch.Generator().manual_seed(seed)
    images = torch.randn(labeled + unlabeled, 3, side, side, generator=g, dtype=torch.float64)
    labels = torch.randint(CLASSES, (labeled + unlabeled,), generator=g)
    weak = images[labeled:]
    strong = weak + 0.3 * torch.randn(weak.shape, generator=g, dtype=torch.float64)
    return Batch(images[:labeled], labels[:labeled], weak, strong, labels[labeled:])


def config(feedback: Any, student: LearnerConfig = STUDENT, **options: Any) -> MPLConfig:
    """MPL whose teacher steps by plain SGD of rate 1."""
    fixed = {"teacher": PLAIN, "student": student, "consistency": SURE, "label_smoothing": 0.0}
    return MPLConfig(**{**fixed, "feedback": feedback, **options})


def mpl(
    config: MPLConfig, norm: bool = False, dropout: float = 0.0, compiled: Mode = "off"
) -> MetaPseudoLabels:
    """The algorithm with networks that are surer of themselves than new ones."""
    return mpl_of(lambda: _surer(network(norm, dropout), norm), config, compiled)


def mpl_of(
    new: Callable[[], nn.Module], config: MPLConfig, compiled: Mode = "off"
) -> MetaPseudoLabels:
    """The algorithm with two networks of any kind."""
    torch.manual_seed(0)
    algorithm = build(
        config,
        lambda given: Learner(new(), given, steps=100, compiled=compiled),
        AlgorithmContext(seed=3),
    )
    assert isinstance(algorithm, MetaPseudoLabels)
    return algorithm


def _surer(made: nn.Sequential, norm: bool) -> nn.Module:
    for name, parameter in made.named_parameters():
        # Else filters would be so short that a central difference's step would be long.
        if name == f"{len(made) - 1}.weight" or (norm and name == "0.weight"):
            parameter.data.mul_(4.0)
    return made


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All numbers of a list, in one vector."""
    return torch.cat([t.detach().flatten() for t in tensors])


def off_by(found: Tensor, wanted: Tensor) -> float:
    """The relative distance of two vectors."""
    return float((found - wanted).norm() / wanted.norm())


def heard(algorithm: MetaPseudoLabels, data: Batch, t: int = 0) -> Tensor:
    """The gradient of the feedback term: how else the teacher ends if it hears the feedback.

    The teacher must step by plain SGD of rate 1, whose steps are gradients. The algorithm stays as
    it was.
    """
    weight, ends = 100.0, []
    for given in (0.0, weight):
        twin = copy.deepcopy(algorithm)
        twin.config = replace(twin.config, feedback_weight=given)
        torch.manual_seed(SEED)
        train_step(twin, data, t)
        ends.append(flat(twin.teacher.parameters))
    return (ends[0] - ends[1]) / weight


def by_autograd(algorithm: MetaPseudoLabels, data: Batch) -> Tensor:
    """The same for soft labels, by differentiating through the student's step."""
    config = algorithm.config
    kept = round(len(data.labels) * (1.0 - config.held_out))
    judging = slice(kept, None) if config.held_out else slice(None)
    teacher = copy.deepcopy(algorithm.teacher.network).train()
    given = dict(teacher.named_parameters())

    torch.manual_seed(SEED)
    if config.bn_batches == "joint":
        logits = teacher(torch.cat([data.weak, data.labeled[:kept], data.strong]))
        weak, strong = logits[: len(data.weak)], logits[-len(data.strong) :]
    elif config.pseudo == "weak":
        weak = teacher(data.weak)
    else:
        strong = teacher(torch.cat([data.labeled[:kept], data.strong]))[kept:]
    q = (weak if config.pseudo == "weak" else strong).softmax(-1)
    after = _moved_student(algorithm, data.strong, q)
    loss = _judged(algorithm.student.network, after, data.labeled[judging], data.labels[judging])
    return flat(torch.autograd.grad(loss, list(given.values()), materialize_grads=True))


def _moved_student(algorithm: MetaPseudoLabels, images: Tensor, q: Tensor) -> dict[str, Tensor]:
    """The student's weights after its step, as a function of the labels `q`."""
    config, learner = algorithm.config, algorithm.student
    student = copy.deepcopy(learner.network).train()
    named = dict(student.named_parameters())
    target = (1 - config.label_smoothing) * q + config.label_smoothing / CLASSES
    rows = -(target * student(images).log_softmax(-1)).sum(-1)
    taken = (q.detach().amax(-1) >= config.label_threshold).double()
    gradient = torch.autograd.grad((rows * taken).mean(), list(named.values()), create_graph=True)
    factor = _clipping(gradient, learner.config.max_grad_norm)
    after = {}
    for (name, p), g, own in zip(named.items(), gradient, learner.parameters, strict=True):
        g = g * factor + learner.config.weight_decay * p.detach() * (p.ndim > 1)
        buffer = learner.optimizer.state[own].get("momentum_buffer")
        moving = g if buffer is None else learner.config.momentum * buffer + g
        ahead = g + learner.config.momentum * moving if learner.config.nesterov else moving
        after[name] = p.detach() - learner.config.lr * ahead
    return after


def _clipping(gradient: Sequence[Tensor], clip: float) -> float:
    """What clipping multiplies by; no function of the labels."""
    norm = flat(gradient).norm().item()
    return min(1.0, clip / (norm + 1e-6)) if clip else 1.0


def _judged(
    network: nn.Module, weights: dict[str, Tensor], images: Tensor, labels: Tensor
) -> Tensor:
    """Cross-entropy without dropout, normalized by these images."""
    judge = copy.deepcopy(network).eval()
    for module in judge.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
    logits: Tensor = torch.func.functional_call(judge, weights, (images,))
    return F.cross_entropy(logits, labels)


def counted(network: nn.Module) -> list[tuple[int, bool]]:
    """A list that grows with every pass through the network: its images, and if it is learned."""
    passes: list[tuple[int, bool]] = []
    first = next(itertools.islice(network.children(), 1))

    def note(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        passes.append((len(output), output.requires_grad))

    first.register_forward_hook(note)
    return passes
