"""Every algorithm steps; MPL's feedback is what its definition says."""

import copy
from dataclasses import replace
from typing import get_args, get_type_hints

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpl_fast import algorithms
from mpl_fast.algorithms.base import predict, train_step
from mpl_fast.algorithms.mpl import MetaPseudoLabels
from mpl_fast.batch import Batch
from mpl_fast.config import (
    RECIPES,
    AlgorithmConfig,
    ConsistencyConfig,
    FinetuneConfig,
    FixMatchConfig,
    LearnerConfig,
    MetaSemiConfig,
    MPLConfig,
    RolePlayConfig,
    SMPLConfig,
    SupervisedConfig,
    UDAConfig,
)
from mpl_fast.learner import Learner

CLASSES = 5
FAST = LearnerConfig(lr=0.1, warmup=0, ema=0.9, dropout=0.0, weight_decay=0.0, max_grad_norm=0.0)
SURE = ConsistencyConfig(weight=2.0, ramp=0, temperature=0.7, threshold=0.0)
CONFIGS: dict[str, AlgorithmConfig] = {
    "supervised": SupervisedConfig(learner=FAST),
    "uda": UDAConfig(learner=FAST, consistency=SURE),
    "mpl": MPLConfig(teacher=FAST, student=FAST, consistency=SURE),
    "finetune": FinetuneConfig(learner=FAST),
    "fixmatch": FixMatchConfig(learner=FAST, threshold=0.3),
    "mpl_roleplay": RolePlayConfig(teacher=FAST, student=FAST, consistency=SURE, swap_every=2),
    "smpl": SMPLConfig(learner=FAST, consistency=SURE),
    "metasemi": MetaSemiConfig(learner=FAST),
}
VARIANTS: dict[str, AlgorithmConfig] = {
    **CONFIGS,
    "supervised, mixup": SupervisedConfig(learner=FAST, mixup=1.0),
    "metasemi, plain": MetaSemiConfig(learner=FAST, mixup=0.0, derivative="forward"),
    "smpl, exact": SMPLConfig(learner=FAST, consistency=SURE, feedback="exact"),
    "smpl, off": SMPLConfig(learner=FAST, consistency=SURE, feedback="off"),
    "uda, cosine": UDAConfig(learner=FAST, consistency=replace(SURE, measure="cosine")),
    "uda, split": UDAConfig(learner=FAST, consistency=SURE, bn_batches="split"),
    "mpl, held out, baseline": MPLConfig(
        teacher=FAST, student=FAST, consistency=SURE, held_out=0.5, baseline=0.9
    ),
    "mpl, exact, split, recompute": MPLConfig(
        teacher=FAST,
        student=FAST,
        consistency=SURE,
        feedback="exact",
        bn_batches="split",
        teacher_graph="recompute",
        label_threshold=0.21,
    ),
    **{
        f"mpl, {feedback}": MPLConfig(
            teacher=FAST, student=FAST, consistency=SURE, feedback=feedback
        )
        for feedback in get_args(get_type_hints(MPLConfig)["feedback"])
    },
}


def network(norm: bool = True) -> nn.Module:
    layers: list[nn.Module] = [
        nn.Conv2d(3, 8, 3, 2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
    ]
    if norm:
        layers.insert(1, nn.BatchNorm2d(8))
    return nn.Sequential(*layers, nn.Linear(32, CLASSES))


def batch(seed: int = 0, labeled: int = 6, unlabeled: int = 9) -> Batch:
    g = torch.Generator().manual_seed(seed)
    images = torch.randn(labeled + unlabeled, 3, 16, 16, generator=g)
    labels = torch.randint(CLASSES, (labeled + unlabeled,), generator=g)
    weak = images[labeled:]
    strong = weak + 0.3 * torch.randn(weak.shape, generator=g)
    return Batch(images[:labeled], labels[:labeled], weak, strong, labels[labeled:])


def new(config: AlgorithmConfig, norm: bool = True, double: bool = False) -> algorithms.Algorithm:
    torch.manual_seed(0)

    def learner(optim: LearnerConfig) -> Learner:
        made = network(norm)
        return Learner(made.double() if double else made, optim, steps=100)

    return algorithms.build(config, learner)


def test_every_recipe_is_covered() -> None:
    assert set(CONFIGS) == set(RECIPES)
    assert all(isinstance(CONFIGS[name], RECIPES[name]) for name in RECIPES)


@pytest.mark.parametrize("name", VARIANTS)
def test_steps_move_every_learner_and_report_finite_scalars(name: str) -> None:
    algorithm = new(VARIANTS[name])
    before = {k: copy.deepcopy(v.network.state_dict()) for k, v in algorithm.learners.items()}
    for t in range(3):
        metrics = train_step(algorithm, batch(t), t)
        for value in metrics.values():
            assert value.ndim == 0 and not value.requires_grad and torch.isfinite(value)
    for key, learner in algorithm.learners.items():
        for parameter, value in learner.network.state_dict().items():
            if parameter.endswith("weight"):
                assert not torch.equal(value, before[key][parameter]), (
                    f"{key}.{parameter} stood still"
                )
    torch.testing.assert_close(predict(algorithm, batch().weak).sum(-1), torch.ones(9))


@pytest.mark.parametrize("name", VARIANTS)
def test_labels_are_learned(name: str) -> None:
    """The same batch again and again: the labeled loss falls to a fraction."""
    algorithm = new(VARIANTS[name])
    key = "loss/labeled"
    first = train_step(algorithm, batch(), 0)[key]
    for t in range(1, 60):
        last = train_step(algorithm, batch(), t)[key]
    assert last < 0.6 * first


def test_feedback_is_exactly_zero_for_a_student_that_does_not_move() -> None:
    still = LearnerConfig(lr=0.0, warmup=0, dropout=0.5, ema=0.9)
    algorithm = new(MPLConfig(teacher=FAST, student=still, consistency=SURE))
    for t in range(3):
        assert train_step(algorithm, batch(t), t)["h"].item() == 0.0


def test_feedback_is_old_minus_new_labeled_loss() -> None:
    algorithm = new(CONFIGS["mpl"], norm=False)
    assert isinstance(algorithm, MetaPseudoLabels)
    data = batch()

    def labeled_loss() -> Tensor:
        return F.cross_entropy(algorithm.student.forward_batch_stats(data.labeled), data.labels)

    old = labeled_loss()
    metrics = train_step(algorithm, data, 0)
    torch.testing.assert_close(metrics["h"], old - labeled_loss())
    assert metrics["h"].abs() > 1e-4


def mpl_step_by_hand(
    config: MPLConfig, teacher: nn.Module, student: nn.Module, data: Batch
) -> None:
    """The step written out in plain PyTorch, with momentum-free first SGD steps, no batch norm."""
    a, c = config.label_smoothing, config.consistency
    z_l, z_w, z_s = (teacher(x) for x in (data.labeled, data.weak, data.strong))
    label = z_w.argmax(-1)

    def ce() -> Tensor:
        with torch.no_grad():
            return F.cross_entropy(student(data.labeled), data.labels)

    old: Tensor = ce()
    descend(
        student, F.cross_entropy(student(data.strong), label, label_smoothing=a), config.student.lr
    )
    h = old - ce()
    target = (z_w.detach() / c.temperature).softmax(-1)
    uda = -(target * z_s.log_softmax(-1)).sum(-1)
    mask = (target.max(-1).values >= c.threshold).double()
    loss = F.cross_entropy(z_l, data.labels, label_smoothing=a)
    loss = loss + c.weight * (uda * mask).mean() + h * F.cross_entropy(z_s, label)
    descend(teacher, loss, config.teacher.lr)


def descend(module: nn.Module, loss: Tensor, lr: float) -> None:
    """The first Nesterov step with momentum 0.9: the velocity is the gradient, looked ahead
    once."""
    parameters = list(module.parameters())
    with torch.no_grad():
        for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            p.sub_(lr * 1.9 * g)


@pytest.mark.parametrize("threshold", [0.0, 0.4])
def test_mpl_step_equals_the_definition(threshold: float) -> None:
    consistency = ConsistencyConfig(weight=2.0, ramp=0, temperature=0.7, threshold=threshold)
    config = MPLConfig(teacher=FAST, student=FAST, consistency=consistency)
    algorithm = new(config, norm=False, double=True)
    assert isinstance(algorithm, MetaPseudoLabels)
    data = batch()
    data = Batch(
        data.labeled.double(), data.labels, data.weak.double(), data.strong.double(), data.truth
    )
    teacher = copy.deepcopy(algorithm.teacher.network)
    student = copy.deepcopy(algorithm.student.network)
    train_step(algorithm, data, 0)
    mpl_step_by_hand(config, teacher, student, data)
    for mine, by_hand in (
        (algorithm.teacher.network, teacher),
        (algorithm.student.network, student),
    ):
        for p, q in zip(mine.parameters(), by_hand.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-8)


def test_feedback_off_leaves_the_teacher_to_uda() -> None:
    """With the feedback off the teacher ends where UDA on the same batch does."""
    off = new(MPLConfig(teacher=FAST, student=FAST, consistency=SURE, feedback="off"), norm=False)
    uda = new(UDAConfig(learner=FAST, consistency=SURE), norm=False)
    on = new(CONFIGS["mpl"], norm=False)
    for algorithm in (off, uda, on):
        train_step(algorithm, batch(), 0)
    teacher, alone = off.learners["teacher"].parameters, uda.learners["learner"].parameters
    for p, q in zip(teacher, alone, strict=True):
        torch.testing.assert_close(p, q)
    heard = on.learners["teacher"].parameters
    assert any(not torch.allclose(p, q, atol=1e-6) for p, q in zip(heard, alone, strict=True))


def test_student_waits_then_moves() -> None:
    waiting = LearnerConfig(lr=0.1, warmup=0, delay_steps=2, ema=0.9, dropout=0.0)
    algorithm = new(MPLConfig(teacher=FAST, student=waiting, consistency=SURE))
    start = [p.clone() for p in algorithm.learners["student"].parameters]
    for t in range(3):
        student = algorithm.learners["student"].parameters
        assert all(torch.equal(p, q) for p, q in zip(student, start, strict=True))
        train_step(algorithm, batch(t), t)
    assert not torch.equal(algorithm.learners["student"].parameters[0], start[0])


def test_pseudo_label_can_come_from_the_strong_view() -> None:
    weak, strong = (
        new(MPLConfig(teacher=FAST, student=FAST, consistency=SURE, pseudo=view), norm=False)
        for view in ("weak", "strong")
    )
    data = batch()
    bright = torch.full_like(data.weak, 9.0)
    far = data._replace(weak=bright, strong=-bright)
    labels = [
        weak.learners["teacher"].forward_batch_stats(x).argmax(-1) for x in (far.weak, far.strong)
    ]
    assert not torch.equal(*labels)
    for algorithm in (weak, strong):
        train_step(algorithm, far, 0)
    pairs = zip(
        weak.learners["student"].parameters, strong.learners["student"].parameters, strict=True
    )
    assert any(not torch.allclose(p, q) for p, q in pairs)
