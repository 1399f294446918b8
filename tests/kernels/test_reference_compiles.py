"""torch.compile takes the losses in plain PyTorch as one graph, for any number of rows."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_leaves

from mpl_fast import losses

SCALE = torch.tensor(2.0)


def plain(x: Tensor, target: Tensor) -> object:
    n = len(target)
    a, b, c = x.split(n)
    teacher = losses.teacher_loss(x, target, n, uda_weight=SCALE, feedback=0.3, threshold=0.2)
    labels = losses.pseudo_labels(b, uniforms=a[:, 0].sigmoid())
    hard = losses.student_loss(torch.cat((a, c)), labels.label, target, label_smoothing=0.1)
    soft = losses.student_loss(c, b, temperature=0.5)
    cosine = losses.cosine_loss(c, b, threshold=0.2).loss + losses.cosine_loss(a, target).loss
    exact = losses.exact_feedback(a, b, weight=SCALE)
    h = losses.mpl_feedback(hard.labeled_ce, losses.smoothed_ce(a, target).loss)
    return teacher, labels, hard, soft, cosine, exact, h


def one_pass(x: Tensor, target: Tensor) -> object:
    n = len(target)
    options = {"uda_weight": SCALE, "feedback": 0.3, "grad_scale": SCALE}
    teacher = losses.teacher_loss_and_grad(x, target, n, **options)  # type: ignore[arg-type]
    student = losses.student_loss_and_grad(x[: 2 * n], x[2 * n :], target, temperature=0.5)
    return teacher, student


@pytest.mark.parametrize("function", [plain, one_pass])
def test_one_graph_for_any_number_of_rows(function: Callable[[Tensor, Tensor], object]) -> None:
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=graphs)
    counts = set()
    for n in (4, 5, 7):
        x = torch.randn(3 * n, 10, generator=torch.Generator().manual_seed(n)).requires_grad_()
        target = torch.arange(n)
        got, expected = tree_leaves(compiled(x, target)), tree_leaves(function(x, target))
        assert len(got) == len(expected) > 10
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other)
        counts.add(graphs.frame_count)
    assert len(counts) == 1  # nothing was compiled after the first number of rows
    assert 0 not in counts
