"""Random tiny problems in float64, and the teacher's gradient of a feedback in each of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpl_fast.algorithms import AlgorithmContext, build
from mpl_fast.algorithms.base import train_step
from mpl_fast.algorithms.mpl import MetaPseudoLabels
from mpl_fast.batch import Batch
from mpl_fast.config import ConsistencyConfig, LearnerConfig, MPLConfig
from mpl_fast.learner.learner import Learner

FEATURES, HIDDEN, CLASSES, LABELED = 6, 8, 4, 8
RATE = 0.1  # of the student; the teacher's is 1, so that its step is its gradient
WEIGHT = 1000.0  # of the feedback: large beside the rest of the teacher's loss, which is subtracted
BASELINE = 0.9
PLAIN = LearnerConfig(
    momentum=0.0, nesterov=False, weight_decay=0.0, max_grad_norm=0.0, warmup=0, schedule="constant"
)


@dataclass(frozen=True)
class Kind:
    """A feedback as it is measured."""

    title: str
    options: dict[str, Any]  # of MPLConfig
    drawn: bool = False  # labels are random

    def share(self, unlabeled: int) -> float:
        """Expectation of the gradient, as a multiple of the exact one, if labels are drawn."""
        mean: float = 1.0 / unlabeled if self.options["feedback"] == "sampled" else 1.0
        # The moving average includes a share of the difference that it is subtracted from.
        return mean * float(self.options.get("baseline", 1.0))


def _kind(title: str, feedback: str, drawn: bool = False, **options: Any) -> Kind:
    return Kind(title, {"feedback": feedback, **options}, drawn)


KINDS: dict[str, Kind] = {
    "off": _kind("off", "off"),
    "difference": _kind("difference, arg-max labels", "difference"),
    "sampled": _kind("sampled", "sampled", True),
    "sampled_baseline": _kind(f"sampled, baseline {BASELINE}", "sampled", True, baseline=BASELINE),
    "per_example": _kind("per_example", "per_example", True, derivative="forward"),
    "exact": _kind("exact, forward mode", "exact", derivative="forward"),
    "exact_central": _kind("exact, central difference", "exact", derivative="central"),
    "parity_kekmodel": _kind("parity_kekmodel", "parity_kekmodel"),
    "parity_google": _kind("parity_google", "parity_google"),
}


@dataclass(frozen=True)
class Problem:
    """A batch; the seed of the two networks' weights, and a factor of those."""

    batch: Batch
    seed: int
    scale: float


def problem(seed: int, number: int, unlabeled: int, scale: float) -> Problem:
    """Normal features, uniform labels; strong views are weak ones with noise."""
    own = (seed * 100_003 + number) * 1009 + unlabeled
    g = torch.Generator().manual_seed(own)
    labeled, weak, noise = (
        torch.randn(rows, FEATURES, generator=g, dtype=torch.float64)
        for rows in (LABELED, unlabeled, unlabeled)
    )
    labels = torch.randint(CLASSES, (LABELED,), generator=g)
    truth = torch.zeros(unlabeled, dtype=torch.int64)
    return Problem(Batch(labeled, labels, weak, weak + 0.3 * noise, truth), own, scale)


def algorithm(kind: Kind, of: Problem) -> MetaPseudoLabels:
    """Teacher and student of a problem: the same weights for every kind."""
    config = MPLConfig(
        teacher=replace(PLAIN, lr=1.0),
        student=replace(PLAIN, lr=RATE),
        consistency=ConsistencyConfig(weight=1.0, ramp=0, threshold=0.0),
        label_smoothing=0.0,
        feedback_weight=WEIGHT,
        **kind.options,
    )

    def learner(given: LearnerConfig) -> Learner:
        layers = [nn.Linear(FEATURES, HIDDEN), nn.LeakyReLU(0.1), nn.Linear(HIDDEN, CLASSES)]
        network = nn.Sequential(*layers).double()
        for parameter in network.parameters():
            parameter.data.mul_(of.scale)
        return Learner(network, given, steps=1)

    torch.manual_seed(of.seed)
    made = build(config, learner, AlgorithmContext(seed=of.seed))
    assert isinstance(made, MetaPseudoLabels)
    return made


def gradients(kind: Kind, of: Problem, draws: int) -> Iterator[Tensor]:
    """The teacher's gradient of the feedback term ``(P,)`` for each of several draws of labels.

    It is the difference between the teacher's weights after a whole step of the algorithm without
    the feedback and with it.
    """
    made = algorithm(kind, of)
    start = {name: learner.weights() for name, learner in made.learners.items()}

    def after_step(weight: float, t: int) -> Tensor:
        for name, learner in made.learners.items():
            with torch.no_grad():
                torch._foreach_copy_(learner.parameters, start[name])
        made.config = replace(made.config, feedback_weight=weight)
        train_step(made, of.batch, t)
        return _flat(made.teacher.weights())

    without = after_step(0.0, 0)
    for t in range(draws):
        yield (without - after_step(WEIGHT, t)) / WEIGHT


def meta_gradient(of: Problem) -> Tensor:
    """d (labeled loss after the student's step) / d (teacher's weights), ``(P,)``, by autograd.

    Soft labels; second derivatives included. Of `mpl_fast.algorithms` only the initial weights.
    """
    made, batch = algorithm(KINDS["off"], of), of.batch
    teacher, student = made.teacher.network, made.student.network
    names, weights = zip(*student.named_parameters(), strict=True)
    labels = teacher(batch.weak).softmax(-1)
    loss = -(labels * student(batch.strong).log_softmax(-1)).sum(-1).mean()
    grads = torch.autograd.grad(loss, weights, create_graph=True)
    moved = {n: w.detach() - RATE * g for n, w, g in zip(names, weights, grads, strict=True)}
    logits = torch.func.functional_call(student, moved, (batch.labeled,))
    after = F.cross_entropy(logits, batch.labels)
    return _flat(torch.autograd.grad(after, list(teacher.parameters())))


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])
