"""Every loss as one function of logits and arguments, its float64 oracle, and tolerances."""

import os
from collections.abc import Callable
from typing import Literal, NamedTuple

import pytest
import torch
from torch import Tensor

from mpl_fast import losses
from mpl_fast.kernels.outputs import Scalar

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DOUBLE, FLOAT = torch.float64, torch.float32
# Two classes; fewer than a warp; ImageNet; one past a power of two; five blocks, read in a loop.
CLASSES = (2, 10, 1000, 1025, 9000)
LOOP = 40 if INTERPRETED else 9000  # a row that is read in several blocks
WIDTHS = (6, LOOP)
UPSTREAM = 3.0  # the gradient with respect to a loss that is differentiated


class Arguments(NamedTuple):
    """What losses of N rows take besides logits."""

    label: Tensor  # (N,) int64
    other: Tensor  # (N, C) logits
    weight: Tensor | None = None  # (N,)
    smoothing: float = 0.0
    temperature: float = 1.0
    threshold: float = 0.0
    uda_weight: Scalar = 1.0
    feedback: Scalar = 0.5
    pseudo: Literal["weak", "strong", "given"] = "given"
    unlabeled: int | None = None  # pairs of rows of the teacher; by default a third of N

    def double(self) -> "Arguments":
        """The same in float64."""
        weight = None if self.weight is None else self.weight.double()
        return self._replace(other=self.other.double(), weight=weight)


class Answer(NamedTuple):
    """All outputs of a loss, and the gradient of UPSTREAM times the loss; of one pass, of it."""

    outputs: dict[str, Tensor]
    gradient: Tensor


def flat(answer: Answer) -> list[Tensor]:
    return [*answer.outputs.values(), answer.gradient]


Loss = Callable[[Tensor, Arguments], Answer]
Terms = Callable[[Tensor, Arguments], Tensor | tuple[Tensor, ...]]


def named(out: Tensor | tuple[Tensor, ...]) -> dict[str, Tensor]:
    if isinstance(out, Tensor):
        return {"loss": out}
    return dict(zip(out._fields, out, strict=True))  # type: ignore[attr-defined]


def _teacher(x: Tensor, a: Arguments) -> Answer:
    pairs = len(x) // 3 if a.unlabeled is None else a.unlabeled
    target, pseudo, truth = a.label.split((len(x) - 2 * pairs, pairs, pairs))
    out, gradient = losses.teacher_loss_and_grad(
        x,
        target,
        pairs,
        uda_weight=a.uda_weight,
        feedback=a.feedback,
        temperature=a.temperature,
        threshold=a.threshold,
        label_smoothing=a.smoothing,
        pseudo=pseudo if a.pseudo == "given" else a.pseudo,
        truth=truth,
    )
    return Answer(named(out), gradient)


def _student_and_grad(x: Tensor, a: Arguments, pseudo: Tensor) -> Answer:
    loss, gradient = losses.student_loss_and_grad(
        x, pseudo, label_smoothing=a.smoothing, weight=a.weight
    )
    return Answer({"loss": loss}, gradient)


def differentiated(terms: Terms) -> Loss:
    def answer(x: Tensor, a: Arguments) -> Answer:
        leaf = x.detach().requires_grad_()
        outputs = named(terms(leaf, a))
        (gradient,) = torch.autograd.grad(UPSTREAM * outputs["loss"], leaf)
        return Answer({name: value.detach() for name, value in outputs.items()}, gradient)

    return answer


# Losses that autograd differentiates.
TERMS: dict[str, Terms] = {
    "smoothed_ce": lambda x, a: losses.smoothed_ce(x, a.label, label_smoothing=a.smoothing),
    "student hard": lambda x, a: losses.student_loss(
        x, a.label, label_smoothing=a.smoothing, weight=a.weight
    ),
    "student soft": lambda x, a: losses.student_loss(
        x, a.other, label_smoothing=a.smoothing, weight=a.weight
    ),
    "cosine": lambda x, a: losses.cosine_loss(
        x, a.other, temperature=a.temperature, threshold=a.threshold
    ),
    "exact": lambda x, a: losses.exact_feedback(x, a.other, weight=a.feedback),
}
# All of them. Of N rows a third is labeled, weak and strong to the teacher.
LOSSES: dict[str, Loss] = {
    **{name: differentiated(terms) for name, terms in TERMS.items()},
    "student hard, one pass": lambda x, a: _student_and_grad(x, a, a.label),
    "student soft, one pass": lambda x, a: _student_and_grad(x, a, a.other),
    "teacher": _teacher,
    "pseudo": lambda x, a: Answer(named(losses.pseudo_labels(x)), x[:0].detach()),
}
EVERY_LOSS = pytest.mark.parametrize("name", LOSSES)
EVERY_TERMS = pytest.mark.parametrize("name", TERMS)


def oracle(name: str, x: Tensor, a: Arguments) -> Answer:
    """The answer of the definition in float64."""
    with losses.use("reference"):
        return LOSSES[name](x.double(), a.double())


def rows(count: int, classes: int, dtype: torch.dtype = FLOAT) -> Tensor:
    """Logits of a network that is sure of some rows."""
    generator = torch.Generator().manual_seed(count * 100_003 + classes)
    return (torch.randn(count, classes, generator=generator) * 4).to(dtype)


def labels(count: int, classes: int) -> Tensor:
    return torch.arange(count) * 7 % classes


def problem(
    device: str, count: int, classes: int, dtype: torch.dtype = FLOAT
) -> tuple[Tensor, Arguments]:
    """Logits and arguments of some rows."""
    other = rows(count + 1, classes, dtype)[1:].to(device)
    a = Arguments(labels(count, classes).to(device), other)
    return rows(count, classes, dtype).to(device), a


def assert_same(got: Answer, wanted: Answer) -> None:
    """Outputs and gradient as near to float64 as their types allow; NaN where it has NaN."""
    assert got.outputs.keys() == wanted.outputs.keys()
    for name, value in got.outputs.items():
        if name == "label":
            assert value.tolist() == wanted.outputs[name].tolist()
            continue
        assert value.dtype == FLOAT, name
        close = tolerance(value)
        torch.testing.assert_close(
            value.double(),
            wanted.outputs[name].double(),
            rtol=close,
            atol=close,
            equal_nan=True,
            msg=f"{name}: {value} is not {wanted.outputs[name]}",
        )
    if len(wanted.gradient):
        assert_gradient(got.gradient, wanted.gradient)


def assert_gradient(got: Tensor, wanted: Tensor) -> None:
    """As near to the float64 gradient as its type allows, at every element and as a whole."""
    assert got.shape == wanted.shape
    # The interpreter truncates to bfloat16 where others round: 2**-7 of an element and not 2**-8.
    step = {FLOAT: 0.0, torch.bfloat16: 2**-7 if INTERPRETED else 2**-8, torch.float16: 2**-11}
    relative = 1.02 * step[got.dtype] + tolerance(got)
    # A gradient is a difference of numbers near 1 here, and may be much less than they are.
    noise = tolerance(got) * max(wanted.nan_to_num().norm().item(), 0.5)
    torch.testing.assert_close(got.double(), wanted, rtol=relative, atol=noise, equal_nan=True)
    rounding = (_stored(wanted, got.dtype) - wanted).nan_to_num().norm().item()
    error = (got.double() - wanted).nan_to_num().norm().item()
    assert error <= 1.05 * rounding + noise


def tolerance(x: Tensor) -> float:
    """Relative error of float32: less in the kernels than in plain PyTorch."""
    return 1e-6 if INTERPRETED else 2e-6 if x.is_cuda else 3e-5


def _stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Float64 as it is stored in a type, on the interpreter truncated."""
    if dtype == torch.bfloat16 and INTERPRETED:
        return (x.float().view(torch.int32) & -(1 << 16)).view(FLOAT).double()
    return x.to(dtype).double()
