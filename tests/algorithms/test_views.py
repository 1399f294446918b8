"""Views: one forward pass or two, now or recomputed: equal numbers, documented passes."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpl_fast.algorithms.base import train_step
from mpl_fast.algorithms.mpl import MetaPseudoLabels
from mpl_fast.algorithms.views import View, Views
from tests.algorithms.problems import NESTEROV, STUDENT, batch, mpl, mpl_config

L, U = 6, 5
ALL = L + 2 * U
NORMS, GRAPHS = ("joint", "split"), ("hold", "recompute")
VIEWS: tuple[View, ...] = ("weak", "strong")
Passes = list[tuple[int, bool]]  # images of each forward pass, and whether it has a gradient


def count_passes(network: nn.Module) -> Passes:
    """A list that grows with every forward pass of the network."""
    passes: Passes = []
    first = next(itertools.islice(network.children(), 1))

    def note(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        passes.append((len(output), output.requires_grad))

    first.register_forward_hook(note)
    return passes


def passes_of_a_step(algorithm: MetaPseudoLabels) -> tuple[Passes, Passes]:
    """Those of the teacher and of the student."""
    teacher, student = (count_passes(x.network) for x in algorithm.learners.values())
    train_step(algorithm, batch(0, L, U), 0)
    return teacher, student


def trained(steps: int, **options: Any) -> MetaPseudoLabels:
    """After some steps with batch norm and dropout."""
    algorithm = mpl(mpl_config(student=NESTEROV, **options), norm=True, dropout=0.5)
    torch.manual_seed(2)
    for t in range(steps):
        train_step(algorithm, batch(t, L, U), t)
    return algorithm


@pytest.mark.parametrize("feedback", ["difference", "sampled", "exact"])
@pytest.mark.parametrize("pseudo", VIEWS)
@pytest.mark.parametrize("norms", NORMS)
def test_recomputing_changes_no_bit(norms: str, pseudo: str, feedback: str) -> None:
    made = [
        trained(4, feedback=feedback, pseudo=pseudo, bn_batches=norms, teacher_graph=graph)
        for graph in GRAPHS
    ]
    for name in ("teacher", "student"):
        held, recomputed = (algorithm.learners[name].network.state_dict() for algorithm in made)
        assert {"1.running_mean", "1.num_batches_tracked"} <= set(held)
        for key in held:
            assert torch.equal(held[key], recomputed[key]), f"{name}.{key}"


TEACHER: dict[tuple[str, str, bool], Passes] = {
    # Batch norms, graph, and whether the feedback's gradient goes through the weak view.
    ("joint", "hold", False): [(ALL, True)],
    ("joint", "hold", True): [(ALL, True)],
    ("joint", "recompute", False): [(ALL, False), (ALL, True)],
    ("joint", "recompute", True): [(ALL, False), (ALL, True)],
    ("split", "hold", False): [(U, False), (L + U, True)],
    ("split", "hold", True): [(U, True), (L + U, True)],
    ("split", "recompute", False): [(U, False), (L + U, True)],
    ("split", "recompute", True): [(U, False), (U, True), (L + U, True)],
}
STUDENTS: dict[str, Passes] = {
    "off": [(U, True), (L, False)],
    "difference": [(L, False), (U, True), (L, False)],
    "sampled": [(L, False), (U, True), (L, False)],
    "per_example": [(U, True), (L, True), (U, False)],
    "exact": [(U, True), (L, True), (U, False)],
    "exact, central": [(U, True), (L, True), (U, False), (U, False)],
}


@pytest.mark.parametrize("feedback", STUDENTS)
@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("norms", NORMS)
def test_passes_are_those_of_the_table(norms: str, graph: str, feedback: str) -> None:
    name, central = feedback.split(",")[0], "central" in feedback
    options: dict[str, Any] = {"derivative": "central" if central else "forward"}
    chosen = mpl_config(name, bn_batches=norms, teacher_graph=graph, **options)
    teacher, student = passes_of_a_step(mpl(chosen, norm=True))
    assert teacher == TEACHER[norms, graph, name in ("sampled", "per_example", "exact")]
    assert student == STUDENTS[feedback]


@pytest.mark.parametrize("feedback", ["difference", "exact"])
def test_a_delayed_student_has_no_more_passes_than_without_feedback(feedback: str) -> None:
    chosen = mpl_config(feedback, replace(STUDENT, delay_steps=1))
    assert passes_of_a_step(mpl(chosen, norm=True))[1] == STUDENTS["off"]


@pytest.mark.parametrize("feedback", ["parity_kekmodel", "parity_google"])
def test_passes_of_the_published_steps(feedback: str) -> None:
    teacher, student = passes_of_a_step(mpl(mpl_config(feedback), norm=True))
    assert teacher == [(ALL, True)]
    assert student == [(L + U, True), (L, False)]


def views(norms: Any, **options: bool) -> tuple[Views, MetaPseudoLabels]:
    algorithm = mpl(mpl_config("difference", NESTEROV), norm=True)
    algorithm.teacher.begin_step(0)
    return Views(algorithm.teacher, batch(0, L, U), norms, **options), algorithm


@pytest.mark.parametrize("norms", NORMS)
def test_logits_are_named_rows_in_the_order_labeled_weak_strong(norms: str) -> None:
    made, algorithm = views(norms)
    logits = made.logits()
    assert [len(x) for x in logits] == [ALL, L, U, U]
    assert torch.equal(logits.all, torch.cat([logits.labeled, logits.weak, logits.strong]))
    data, network = batch(0, L, U), algorithm.teacher.network
    if norms == "joint":
        expected = network(torch.cat([data.labeled, data.weak, data.strong]))
    else:
        labeled, strong = network(torch.cat([data.labeled, data.strong])).split([L, U])
        expected = torch.cat([labeled, network(data.weak), strong])
    torch.testing.assert_close(logits.all, expected)
    for view in VIEWS:
        assert torch.equal(made.detached_logits(view), getattr(logits, view))


@pytest.mark.parametrize("weak_gradient", [False, True])
def test_split_weak_rows_have_a_gradient_only_if_it_is_chosen(weak_gradient: bool) -> None:
    made, algorithm = views("split", weak_gradient=weak_gradient)
    detached = made.detached_logits("weak")
    assert not detached.requires_grad
    weak = made.logits().weak
    torch.testing.assert_close(weak, detached, rtol=0, atol=0)
    found = torch.autograd.grad(weak.sum(), algorithm.teacher.parameters, allow_unused=True)
    assert any(g is not None and bool(g.any()) for g in found) == weak_gradient


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("norms", NORMS)
def test_detached_logits_leave_the_statistics_to_the_pass_with_gradient(
    norms: str, recompute: bool
) -> None:
    made, algorithm = views(norms, weak_gradient=True, recompute=recompute)
    tracked = algorithm.teacher.network.state_dict()["1.num_batches_tracked"]
    made.detached_logits("weak")
    assert tracked == (0 if recompute else 1)
    made.detached_logits("weak")
    made.logits()
    made.logits()
    assert tracked == (1 if norms == "joint" else 2)
