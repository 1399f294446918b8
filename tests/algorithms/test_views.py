"""One pass or two, now or later: the same numbers, and as many passes as are promised."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from mpl_fast.algorithms.base import train_step
from mpl_fast.algorithms.mpl import MetaPseudoLabels
from mpl_fast.algorithms.views import Views
from mpl_fast.config import MPLConfig
from tests.algorithms.meta_problems import NESTEROV, STUDENT, batch, config, counted, mpl

L, U = 6, 5
ALL = L + 2 * U
NORMS, GRAPHS, VIEWS = ("joint", "split"), ("hold", "recompute"), ("weak", "strong")


def trained(steps: int, **options: Any) -> MetaPseudoLabels:
    """After some steps with batch norm and dropout."""
    algorithm = mpl(config(student=NESTEROV, **options), norm=True, dropout=0.5)
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


def test_the_comparison_above_would_see_other_statistics_or_dropout() -> None:
    joint, split = (trained(2, feedback="difference", bn_batches=norms) for norms in NORMS)
    one, two = (algorithm.teacher.network.state_dict() for algorithm in (joint, split))
    assert not torch.allclose(one["1.running_mean"], two["1.running_mean"])


TEACHER: dict[tuple[str, str, bool], list[tuple[int, bool]]] = {
    # Batch norms, graph, and whether the weak view hears: the images of each pass, with gradient?
    ("joint", "hold", False): [(ALL, True)],
    ("joint", "hold", True): [(ALL, True)],
    ("joint", "recompute", False): [(ALL, False), (ALL, True)],
    ("joint", "recompute", True): [(ALL, False), (ALL, True)],
    ("split", "hold", False): [(U, False), (L + U, True)],
    ("split", "hold", True): [(U, True), (L + U, True)],
    ("split", "recompute", False): [(U, False), (L + U, True)],
    ("split", "recompute", True): [(U, False), (U, True), (L + U, True)],
}
STUDENTS: dict[str, list[tuple[int, bool]]] = {
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
    algorithm = mpl(
        config(
            name,
            bn_batches=norms,
            teacher_graph=graph,
            derivative="central" if central else "forward",
        ),
        norm=True,
    )
    teacher, student = (counted(algorithm.learners[n].network) for n in ("teacher", "student"))
    train_step(algorithm, batch(0, L, U), 0)
    heard = name in ("sampled", "per_example", "exact")
    assert teacher == TEACHER[norms, graph, heard]
    assert student == STUDENTS[feedback]


@pytest.mark.parametrize("feedback", ["difference", "exact"])
def test_a_waiting_student_is_asked_for_no_more_than_without_feedback(feedback: str) -> None:
    algorithm = mpl(config(feedback, replace(STUDENT, delay_steps=1)), norm=True)
    student = counted(algorithm.student.network)
    train_step(algorithm, batch(0, L, U), 0)
    assert student == STUDENTS["off"]


@pytest.mark.parametrize("feedback", ["parity_kekmodel", "parity_google"])
def test_passes_of_the_published_steps(feedback: str) -> None:
    algorithm = mpl(config(feedback), norm=True)
    teacher, student = (counted(algorithm.learners[n].network) for n in ("teacher", "student"))
    train_step(algorithm, batch(0, L, U), 0)
    assert teacher == [(ALL, True)]
    assert student == [(L + U, True), (L, False)]


def views(norms: Any, **options: bool) -> tuple[Views, Callable[[], MetaPseudoLabels]]:
    algorithm = mpl(MPLConfig(teacher=STUDENT, student=STUDENT), norm=True)
    algorithm.teacher.begin_step(0)
    return Views(algorithm.teacher, batch(0, L, U), norms, **options), lambda: algorithm


@pytest.mark.parametrize("heard", [False, True])
def test_split_weak_rows_have_a_gradient_only_if_they_are_heard(heard: bool) -> None:
    made, algorithm = views("split", weak_gradient=heard)
    peeked = made.detached_logits("weak")
    assert not peeked.requires_grad
    logits = made.logits()
    torch.testing.assert_close(logits[L : L + U], peeked, rtol=0, atol=0)
    parameters = algorithm().teacher.parameters
    given = torch.autograd.grad(logits[L : L + U].sum(), parameters, allow_unused=True)
    assert any(g is not None and bool(g.any()) for g in given) == heard


def test_each_half_of_a_split_is_normalized_by_itself() -> None:
    made, algorithm = views("split")
    data, network = batch(0, L, U), algorithm().teacher.network
    weak, rest = made.logits()[L : L + U], made.detached_logits("strong")
    torch.testing.assert_close(weak, network(data.weak))
    torch.testing.assert_close(rest, network(torch.cat([data.labeled, data.strong]))[L:])
    joint, _ = views("joint")
    assert not torch.allclose(joint.detached_logits("weak"), weak)
    whole = network(torch.cat([data.labeled, data.weak, data.strong]))
    torch.testing.assert_close(joint.detached_logits("strong"), whole[-U:])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("norms", NORMS)
def test_a_peek_leaves_the_statistics_to_the_pass_with_gradient(
    norms: str, recompute: bool
) -> None:
    made, algorithm = views(norms, weak_gradient=True, recompute=recompute)
    seen = algorithm().teacher.network.state_dict()["1.num_batches_tracked"]
    made.detached_logits("weak")
    assert seen == (0 if recompute else 1)
    made.detached_logits("weak")
    made.logits()
    made.logits()
    assert seen == (1 if norms == "joint" else 2)
