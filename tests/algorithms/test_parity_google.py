"""The released code's feedback has no gradient, and its baseline is a moving average."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpl_fast import algorithms
from mpl_fast.algorithms.base import Algorithm, Metrics, train_step
from mpl_fast.batch import Batch
from mpl_fast.config import ConsistencyConfig, LearnerConfig, MPLConfig
from mpl_fast.learner import Learner

CLASSES = 4
PLAIN = LearnerConfig(
    lr=0.5,
    momentum=0.0,
    nesterov=False,
    weight_decay=0.0,
    max_grad_norm=0.0,
    warmup=0,
    schedule="constant",
)


def batch(seed: int) -> Batch:
    g = torch.Generator().manual_seed(seed)
    xl, xw, noise = (torch.randn(n, 6, generator=g, dtype=torch.float64) for n in (8, 24, 24))
    labels = torch.randint(CLASSES, (32,), generator=g)
    return Batch(xl, labels[:8], xw, xw + 0.3 * noise, labels[8:])


def new(
    feedback: str, *, weight: float = 1.0, baseline: float = 0.0, ramp: int = 0
) -> tuple[Algorithm, MPLConfig]:
    torch.manual_seed(3)
    config = MPLConfig(
        teacher=PLAIN,
        student=PLAIN,
        consistency=ConsistencyConfig(weight=2.0, ramp=ramp, threshold=0.0),
        feedback=feedback,  # type: ignore[arg-type]
        feedback_weight=weight,
        baseline=baseline,
    )

    def learner(chosen: LearnerConfig) -> Learner:
        network = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, CLASSES)).double()
        return Learner(network, chosen, steps=100)

    return algorithms.build(config, learner), config


def teacher_gradient(feedback: str, weight: float) -> tuple[Tensor, Metrics]:
    """Up to a factor: nothing clips or decays it, so it is the change of the weights."""
    algorithm, _ = new(feedback, weight=weight)
    teacher = algorithm.learners["teacher"]
    before = teacher.weights()
    metrics = train_step(algorithm, batch(0), 0)
    moved = torch._foreach_sub(before, teacher.weights())
    return torch.cat([m.reshape(-1) for m in moved]), metrics


def test_the_feedback_of_google_has_no_gradient() -> None:
    without, _ = teacher_gradient("parity_google", 0.0)
    loud, metrics = teacher_gradient("parity_google", 1000.0)
    assert metrics["feedback"].abs() > 1e-2
    assert metrics["loss/feedback"].abs() > 1e-2
    assert (loud - without).norm() < 1e-12 * without.norm()


def test_the_feedback_of_the_difference_has_one() -> None:
    without, _ = teacher_gradient("difference", 0.0)
    loud, _ = teacher_gradient("difference", 1000.0)
    assert (loud - without).norm() > without.norm()


@pytest.mark.parametrize("baseline, decay", [(0.0, 0.99), (0.75, 0.75)])
def test_h_is_new_minus_old_less_its_moving_average(baseline: float, decay: float) -> None:
    """The average begins at 0, moves first, by 1 - decay of the way, and is then subtracted.

    That code always has one, of decay 0.99.
    """
    algorithm, _ = new("parity_google", baseline=baseline)
    student, mean = algorithm.learners["student"].network, 0.0
    for t in range(4):
        data = batch(t)
        old = F.cross_entropy(student(data.labeled), data.labels).detach()
        h = float(train_step(algorithm, data, t)["feedback"])
        change = float(F.cross_entropy(student(data.labeled), data.labels).detach() - old)
        mean += (1.0 - decay) * (change - mean)
        assert h == pytest.approx(change - mean, rel=1e-5, abs=1e-7)  # float32
        assert abs(h) > 1e-4
    assert float(algorithm.state["baseline"]) == pytest.approx(mean, rel=1e-5)
    assert mean != 0.0


def test_step_of_google_equals_the_definition() -> None:
    """Soft labels of the strong view for the student; UDA, whose ramp begins at 0, alone for the
    teacher."""
    algorithm, config = new("parity_google", ramp=4)
    for t in range(3):
        data = batch(t)
        teacher, student = (
            copy.deepcopy(algorithm.learners[name].network) for name in ("teacher", "student")
        )
        train_step(algorithm, data, t)
        z_l, z_w, z_s = (teacher(x) for x in (data.labeled, data.weak, data.strong))
        soft = z_s.detach().softmax(-1)
        lesson = F.cross_entropy(student(data.strong), soft, label_smoothing=config.label_smoothing)
        sharp = (z_w.detach() / config.consistency.temperature).softmax(-1)
        loss = F.cross_entropy(z_l, data.labels, label_smoothing=config.label_smoothing)
        loss = loss + 2.0 * min(1.0, t / 4) * F.cross_entropy(z_s, sharp)
        for name, network, value in (("teacher", teacher, loss), ("student", student, lesson)):
            parameters = list(network.parameters())
            gradients = torch.autograd.grad(value, parameters)
            for mine, p, g in zip(
                algorithm.learners[name].parameters, parameters, gradients, strict=True
            ):
                torch.testing.assert_close(mine, p - 0.5 * g, rtol=1e-12, atol=1e-13)
