"""One step of each algorithm on two moons, for all runs at once, as the papers' boxes have it."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mpl_fast.experiments.moons_contestants import MPL, SMPL, Feedback, Labeled, Pseudo
from mpl_fast.experiments.moons_data import Problem
from mpl_fast.experiments.moons_nets import (
    Net,
    cross_entropy,
    descend,
    gradient,
    leaf,
    log_probs,
    slope_along,
)

RATE = 0.1  # of every SGD step


class Batch(NamedTuple):
    """What one step sees."""

    labeled: Tensor  # (R, 6, 2)
    targets: Tensor  # (R, 6, 2) one-hot
    unlabeled: Tensor  # (R, 16, 2)
    truth: Tensor  # (R, 16, 2) one-hot
    uniforms: Tensor  # (R, 16)


class Pair(NamedTuple):
    """The networks of a contestant; one with a single network calls it the student."""

    student: Net
    teacher: Net | None


def batch_at(problem: Problem, t: int) -> Batch:
    """Step t's batch."""
    rows = problem.batches[t]
    return Batch(
        labeled=problem.labeled,
        targets=one_hot(problem.labels),
        unlabeled=problem.points[rows],
        truth=one_hot(problem.truth[rows]),
        uniforms=problem.uniforms[t],
    )


def begin(recipe: Labeled | MPL | SMPL, problem: Problem) -> Pair:
    """Initial weights."""
    if isinstance(recipe, MPL):
        return Pair(problem.student, problem.teacher)
    return Pair(problem.teacher, None)


def step(recipe: Labeled | MPL | SMPL, pair: Pair, batch: Batch) -> Pair:
    """One step of any contestant."""
    match recipe, pair:
        case MPL(), Pair(student, Net() as teacher):
            return _mpl_step(recipe, student, teacher, batch)
        case SMPL(), Pair(only, _):
            return Pair(_smpl_step(recipe, only, batch), None)
        case _:
            return Pair(_labeled_step(recipe == Labeled(truth=True), pair.student, batch), None)


def _labeled_step(truth: bool, net: Net, batch: Batch) -> Net:
    net = leaf(net)
    points, targets = (batch.unlabeled, batch.truth) if truth else (batch.labeled, batch.targets)
    loss = cross_entropy(targets, log_probs(net, points)).mean(1)
    return descend(net, gradient(loss, net), RATE)


def _mpl_step(recipe: MPL, student: Net, teacher: Net, batch: Batch) -> Pair:
    # The teacher labels the unlabeled points ...
    teacher, student = leaf(teacher), leaf(student)
    log_q = log_probs(teacher, batch.unlabeled)  # (R, 16, 2)
    target = pseudo_labels(recipe.pseudo, log_q.detach(), batch.uniforms)

    # ... the student learns from nothing but those pseudo labels ...
    lesson = cross_entropy(target, log_probs(student, batch.unlabeled)).mean(1)  # (R,)
    moved = descend(student, gradient(lesson, student), RATE)

    # ... and the teacher hears what that did for it on labels, while it learns those itself.
    own, judge = label_weights(recipe.held_out, batch)
    loss = _labeled_loss(teacher, batch, own)
    if recipe.feedback != "off":
        heard = feedback(recipe.feedback, student, moved, target, log_q, batch, judge)
        loss = loss + recipe.weight * heard
    return Pair(moved, descend(teacher, gradient(loss, teacher), RATE))


def _smpl_step(recipe: SMPL, net: Net, batch: Batch) -> Net:
    # The network labels the unlabeled points and learns its own labels ...
    net = leaf(net)
    log_p = log_probs(net, batch.unlabeled)
    target = pseudo_labels(recipe.pseudo, log_p.detach(), batch.uniforms)
    moved = descend(net, gradient(cross_entropy(target, log_p).mean(1), net), RATE)

    # ... then, from zero gradients, those of the data, and hears what the first update did.
    moved = leaf(moved)
    own, judge = label_weights(False, batch)
    loss = _labeled_loss(moved, batch, own)
    if recipe.feedback != "off":
        log_q = log_probs(moved, batch.unlabeled)
        again = pseudo_labels(recipe.pseudo, log_q.detach(), batch.uniforms)
        loss = loss + feedback(recipe.feedback, net, moved, again, log_q, batch, judge)
    return descend(moved, gradient(loss, moved), RATE)


def feedback(
    kind: Feedback,
    student: Net,
    moved: Net,
    target: Tensor,
    log_q: Tensor,
    batch: Batch,
    judge: Tensor,
) -> Tensor:
    """The teacher's feedback term, (R,): its gradient in the teacher is an estimate of that of the
    student's labeled loss after its step, or that gradient itself (`exact`).

    `target` (R, 16, 2) are the labels that the student has learned, `log_q` (R, 16, 2) the
    teacher's log-probabilities with graph, `forward_batch_stats` (R, 6) the weights of the labels.
    """
    if kind == "difference":  # one number a batch: h = old - new
        with torch.no_grad():
            h = _labeled_loss(student, batch, judge) - _labeled_loss(moved, batch, judge)
        return h * cross_entropy(target, log_q).mean(1)
    after = leaf(moved)
    v = gradient(_labeled_loss(after, batch, judge), after)
    u = slope_along(student, v, batch.unlabeled) * RATE / batch.unlabeled.shape[1]  # (R, 16, 2)
    if kind == "per_example":  # h of each point: the rate times <v, gradient of its cross-entropy>
        return (cross_entropy(target, u) * cross_entropy(target, log_q)).sum(1)
    return (u * log_q.exp()).sum((1, 2))  # every class, weighted by its probability


def pseudo_labels(kind: Pseudo, log_q: Tensor, uniforms: Tensor) -> Tensor:
    """Targets (R, N, 2) from the teacher's log-probabilities; an argmax of equals is class 0."""
    if kind == "soft":
        return log_q.exp()
    if kind == "argmax":
        return one_hot((log_q[..., 1] > log_q[..., 0]).long())
    return one_hot((uniforms < log_q[..., 1].exp()).long())


def one_hot(labels: Tensor) -> Tensor:
    """(..., 2) float64."""
    return F.one_hot(labels, 2).double()


def _labeled_loss(net: Net, batch: Batch, weights: Tensor) -> Tensor:
    return (weights * cross_entropy(batch.targets, log_probs(net, batch.labeled))).sum(1)


def label_weights(held_out: bool, batch: Batch) -> tuple[Tensor, Tensor]:
    """Weights (R, 6) of the labels in the teacher's loss and in the loss that judges a student."""
    equal = torch.full_like(batch.targets[..., 0], 1 / batch.targets.shape[1])
    if not held_out:
        return equal, equal
    # Class 0 stands first, so the last of each class is where its successor differs, or the end.
    kept = torch.ones_like(equal)
    ends = batch.targets[:, 1:, 1] > batch.targets[:, :-1, 1]
    kept[:, :-1][ends] = 0.0
    kept[:, -1] = 0.0
    apart = 1.0 - kept
    return kept / kept.sum(1, keepdim=True), apart / apart.sum(1, keepdim=True)
