"""Launches of each loss, and the kernels that are compiled for it, counted without a GPU.

Triton compiles for a simulated one and nothing runs: values are undefined.
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
from mpl_fast.kernels.outputs import Dual
from tests.kernels.cases import EVERY_TERMS, LOSSES, TERMS, Arguments, named

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)

Launched = tuple[str, Any, float]
LABELS = torch.arange(9)
SCALAR, DOUBLE = torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float64)
# Of PyTorch's operations these launch nothing: they allocate, or look at memory in another way.
SILENT = {"detach", "empty_like", "movedim", "new_empty", "permute", "split_with_sizes", "unbind"}
SILENT |= {"slice", "view"}


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
    """9 rows; not a leaf, as those of a network, whose gradient is not copied."""
    return torch.zeros(9, 16, requires_grad=True) * 1.0


ROWS: Arguments = Arguments(LABELS, torch.zeros(9, 16), feedback=SCALAR, uda_weight=SCALAR)


@EVERY_TERMS
def test_two_forward_one_backward_and_the_one_that_starts_it(
    name: str, kernels: list[Launched]
) -> None:
    x = logits()
    with Launches(kernels) as counted:
        loss = named(TERMS[name](x, ROWS))["loss"]
    (forward, total) = counted.all()
    assert (forward, total) == (forward.removesuffix("_kernel") + "_kernel", "sum")
    backward = forward.replace("_kernel", "_gradient_kernel")
    with Launches(kernels) as counted:
        torch.autograd.grad(loss, x, SCALAR, retain_graph=True)
    assert counted.all() == [backward]
    with Launches(kernels) as counted:
        torch.autograd.grad(loss, x)
    assert counted.all() == sorted(["ones_like", backward])


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in TERMS])
def test_one_pass_is_a_kernel_and_a_sum(name: str, kernels: list[Launched]) -> None:
    x = logits()
    with Launches(kernels) as counted:
        LOSSES[name](x, ROWS)
    kernel = f"{name.split()[0]}_kernel"
    assert counted.all() == ([kernel] if name == "pseudo" else sorted(["sum", kernel]))


@pytest.mark.parametrize(("weight", "launch"), [(2.0, "full"), (DOUBLE, "_to_copy")])
def test_a_weight_that_is_no_float32_tensor_is_a_launch(
    weight: float | Tensor, launch: str, kernels: list[Launched]
) -> None:
    x = logits()
    with Launches(kernels) as counted:
        LOSSES["teacher"](x, ROWS._replace(uda_weight=weight))
    assert counted.all() == [launch, "sum", "teacher_kernel"]
    with Launches(kernels) as counted:
        TERMS["exact"](x, ROWS._replace(feedback=weight))
    assert counted.all() == sorted([launch, "exact_kernel", "sum"])


def test_feedback(kernels: list[Launched]) -> None:
    with Launches(kernels) as counted:
        losses.mpl_feedback(SCALAR, SCALAR)
    assert counted.all() == ["sub"]
    with Launches(kernels) as counted:
        losses.mpl_feedback(SCALAR, SCALAR, SCALAR.clone())
    assert counted.all() == ["abs", "clone", "lerp_", "lt", "sub", "sub", "where"]


def normalized(rows: int, channels: int, given: bool) -> Callable[[], object]:
    """A batch norm and a ReLU with their derivative, of images of 2 x 2 pixels."""
    image = torch.zeros(rows, channels, 2, 2).to(memory_format=torch.channels_last)
    x, weight = (Dual(tensor, tensor) for tensor in (image, torch.zeros(channels)))
    statistics = (weight.primal, weight.primal) if given else None
    rule = losses.backend(image).batch_norm_jvp
    return lambda: rule(x, weight, weight, statistics, 1e-5, 0.0)


@pytest.mark.parametrize("given", [False, True])
def test_batch_norm_with_derivative_and_relu(given: bool, kernels: list[Launched]) -> None:
    call = normalized(9, 16, given)
    with Launches(kernels) as counted:
        call()
    moments = [] if given else ["join_kernel", "moments_kernel"]
    assert counted.all() == [*moments, "normalize_kernel"]


def test_numbers_of_images_and_of_channels_are_not_compiled_in(kernels: list[Launched]) -> None:
    found = set()
    for rows, channels in ((7, 64), (8, 64), (9, 128), (16, 2048)):
        before = len(kernels)
        normalized(rows, channels, given=False)()
        found |= {(name, kernel.hash) for name, kernel, _ in kernels[before:]}
    # Of 2 and of 3 to 4 parts.
    names = ["join_kernel", "join_kernel", "moments_kernel", "normalize_kernel"]
    assert sorted(name for name, _ in found) == names


def everything(x: Tensor, label: Tensor, numbers: Tensor) -> None:
    """Each loss with its gradient; all that a caller may pass is a view of these tensors."""
    a = Arguments(label[:9], x.detach(), numbers[:9], uda_weight=numbers[0], feedback=numbers[1])
    for loss in LOSSES.values():
        loss(x, a)
    for terms in TERMS.values():
        leaf = x.detach().requires_grad_()
        torch.autograd.grad(named(terms(leaf, a))["loss"], leaf, numbers[2])
    losses.pseudo_labels(x, uniforms=numbers[:9])


@pytest.mark.slow
def test_addresses_of_single_numbers_are_not_compiled_in(kernels: list[Launched]) -> None:
    """Views into larger tensors, 4 or 8 bytes further on: else a kernel of their own for each."""
    found = []
    for shift in (0, 1, 3):
        before = len(kernels)
        everything(logits(), torch.zeros(16, dtype=torch.int64)[shift:], torch.ones(16)[shift:])
        found.append([(name, kernel.hash) for name, kernel, _ in kernels[before:]])
    assert len(found[0]) == 2 * 2 * len(TERMS) + len(LOSSES) - len(TERMS) + 1
    assert found[0] == found[1] == found[2]


def test_addresses_of_rows_are(kernels: list[Launched]) -> None:
    """Only where rows start at multiples of 16 bytes are they read 16 bytes at a time."""
    digests = set()
    for shift in (0, 1):
        losses.pseudo_labels(torch.zeros(7 * 16 + 1)[shift:][: 7 * 16].view(7, 16))
        digests.add(kernels[-1][1].hash)
    assert len(digests) == 2
