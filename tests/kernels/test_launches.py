"""What a loss launches, and which kernels are compiled for it: counted without a GPU.

Triton compiles for a pretended one and nothing runs: values are whatever was in memory.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from mpl_fast import losses
from mpl_fast.kernels import aot

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)

Launched = tuple[str, Any, float]
LABELS = torch.tensor([0, 1, 2, 3, 4, 5, 6])
SCALAR, DOUBLE = torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float64)
# Of PyTorch's operations these launch nothing: they allocate, or look at memory in another way.
SILENT = {"detach", "new_empty", "unbind", "slice"}


class Launches(TorchDispatchMode):
    """Collects names of PyTorch's operations that would launch, and kernels beside them."""

    def __init__(self, kernels: list[Launched]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels, self.before, self.names = kernels, len(kernels), list[str]()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        if name not in SILENT:
            self.names.append(name)
        return function(*args, **(kwargs or {}))

    def all(self) -> list[str]:
        return sorted([*self.names, *(name for name, _, _ in self.kernels[self.before :])])


@pytest.fixture(scope="module")
def kernels() -> Iterator[list[Launched]]:
    with aot.recording(90) as launches, losses.use("triton"):
        yield launches


def logits() -> Tensor:
    """7 rows; not a leaf, as those of a network, which is given gradients without a copy."""
    return torch.zeros(7, 16, requires_grad=True) * 1.0


def teacher(x: Tensor, weight: float | Tensor = SCALAR) -> losses.TeacherOut:
    return losses.teacher_loss(x, LABELS[:3], 2, uda_weight=weight, feedback=SCALAR)


PLAIN: dict[str, tuple[Callable[[Tensor], tuple[Tensor, ...]], list[str], list[str]]] = {
    "loss": (lambda x: teacher(x)[:1], ["sum", "teacher_kernel"], ["teacher_kernel"]),
    "number": (
        lambda x: teacher(x, 2.0)[:1],
        ["full", "sum", "teacher_kernel"],
        ["teacher_kernel"],
    ),
    "float64": (
        lambda x: teacher(x, DOUBLE)[:1],
        ["_to_copy", "sum", "teacher_kernel"],
        ["teacher_kernel"],
    ),
    "term": (
        lambda x: teacher(x)[1:2],
        ["sum", "teacher_kernel"],
        ["teacher_kernel", "zeros_like"],
    ),
    "two terms": (
        lambda x: teacher(x)[:2],
        ["sum", "teacher_kernel"],
        ["teacher_kernel", "zeros_like"],
    ),
    "all terms": (lambda x: teacher(x)[:4], ["sum", "teacher_kernel"], ["teacher_kernel"]),
    "smoothed_ce": (
        lambda x: losses.smoothed_ce(x, LABELS)[:1],
        ["sum", "teacher_kernel"],
        ["teacher_kernel"],
    ),
    "student": (
        lambda x: losses.student_loss(x, LABELS)[:1],
        ["student_kernel", "sum"],
        ["student_kernel"],
    ),
    "exact": (
        lambda x: (losses.exact_feedback(x, x.detach(), weight=SCALAR),),
        ["exact_kernel", "sum"],
        ["exact_gradient_kernel"],
    ),
    "cosine": (
        lambda x: losses.cosine_loss(x, x.detach())[:1],
        ["cosine_kernel", "sum"],
        ["cosine_gradient_kernel"],
    ),
}


@pytest.mark.parametrize("name", PLAIN)
def test_two_forward_one_backward_and_the_one_that_starts_it(
    name: str, kernels: list[Launched]
) -> None:
    loss, forward, backward = PLAIN[name]
    x = logits()
    with Launches(kernels) as seen:
        value = loss(x)
    assert seen.all() == forward
    with Launches(kernels) as seen:
        torch.autograd.grad(value, x, [SCALAR] * len(value), retain_graph=True)
    assert seen.all() == backward
    with Launches(kernels) as seen:
        torch.autograd.grad(value, x)
    assert seen.all() == sorted(["ones_like"] * len(value) + backward)


def test_two_launches_in_one_pass(kernels: list[Launched]) -> None:
    x = logits()
    with Launches(kernels) as seen:
        losses.teacher_loss_and_grad(
            x, LABELS[:3], 2, uda_weight=SCALAR, feedback=SCALAR, grad_scale=SCALAR
        )
    assert seen.all() == ["sum", "teacher_kernel"]
    with Launches(kernels) as seen:
        losses.student_loss_and_grad(x, LABELS, grad_scale=SCALAR)
    assert seen.all() == ["student_kernel", "sum"]
    with Launches(kernels) as seen:
        losses.pseudo_labels(x)
    assert seen.all() == ["pseudo_kernel"]


def test_feedback(kernels: list[Launched]) -> None:
    with Launches(kernels) as seen:
        losses.mpl_feedback(SCALAR, SCALAR)
    assert seen.all() == ["sub"]
    with Launches(kernels) as seen:
        losses.mpl_feedback(SCALAR, SCALAR, SCALAR.clone())
    assert seen.all() == ["abs", "clone", "lerp_", "lt", "sub", "sub", "where"]


def everything(x: Tensor, labels: Tensor, numbers: Tensor) -> None:
    """Each loss with its gradient; whatever a caller may give has been cut from these tensors."""
    weight, feedback, upstream = numbers[0], numbers[1], numbers[2]
    rows, label = len(x), labels[: len(x)]
    terms = losses.teacher_loss(
        x,
        label[:3],
        2,
        uda_weight=weight,
        feedback=feedback,
        pseudo=labels[3:5],
        truth=labels[5:7],
    )[:4]
    torch.autograd.grad(terms, x, [upstream] * 4)
    torch.autograd.grad(losses.smoothed_ce(x, label).loss, x, upstream)
    for pseudo in (label, x.detach()):
        taught = losses.student_loss(x, pseudo, weight=numbers[:rows])
        torch.autograd.grad(taught.loss, x, upstream)
        losses.student_loss_and_grad(x, pseudo, grad_scale=upstream)
        torch.autograd.grad(losses.cosine_loss(x, pseudo).loss, x, upstream)
    losses.teacher_loss_and_grad(
        x, label[:3], 2, uda_weight=weight, feedback=feedback, grad_scale=upstream
    )
    losses.pseudo_labels(x, uniforms=numbers[:rows])
    exact = losses.exact_feedback(x, x.detach(), weight=weight)
    torch.autograd.grad(exact, x, upstream)


def test_where_single_numbers_lie_is_not_compiled_in(kernels: list[Launched]) -> None:
    """Views into larger tensors, 4 or 8 bytes further on: else a kernel of their own for each."""
    found = []
    for shift in (0, 1, 3):
        before = len(kernels)
        everything(logits(), torch.zeros(16, dtype=torch.int64)[shift:], torch.ones(16)[shift:])
        found.append([(name, kernel.hash) for name, kernel, _ in kernels[before:]])
    assert len(found[0]) == 18
    assert found[0] == found[1] == found[2]


def test_where_rows_lie_is(kernels: list[Launched]) -> None:
    """Only where rows start at multiples of 16 bytes are they read 16 bytes at a time."""
    digests = set()
    for shift in (0, 1):
        losses.pseudo_labels(torch.zeros(7 * 16 + 1)[shift:][: 7 * 16].view(7, 16))
        digests.add(kernels[-1][1].hash)
    assert len(digests) == 2
