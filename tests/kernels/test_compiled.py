"""torch.compile and torch.library: one graph without a break, for any batch size.

Plain PyTorch, and on Triton's interpreter the kernels: an op is one opaque call there, where on a
GPU its kernel is traced (`test_traced.py`).
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from mpl_fast import losses
from tests.kernels.cases import (
    EVERY_LOSS,
    INTERPRETED,
    LOSSES,
    TERMS,
    Arguments,
    flat,
    labels,
    named,
    rows,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
CLASSES = 10
# Of plain PyTorch only the trace is tested: to compile it takes minutes.
COMPILERS = ["aot_eager", "inductor"] if INTERPRETED else ["eager"]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    with losses.use("triton" if INTERPRETED else "reference"):
        yield
    torch.compiler.reset()


def problem(count: int) -> tuple[Tensor, Arguments]:
    scalars = torch.tensor(0.5), torch.tensor(-0.25)
    weight = torch.linspace(0.5, 2.0, count)
    a = Arguments(labels(count, CLASSES), rows(count + 1, CLASSES)[1:], weight, 0.1, 0.7, 0.2)
    return rows(count, CLASSES), a._replace(uda_weight=scalars[0], feedback=scalars[1])


Function = Callable[[Tensor, Arguments], list[Tensor]]


def outputs_of(name: str) -> Function:
    """A multiple of a loss that autograd differentiates, and statistics; or one pass."""

    def outputs(x: Tensor, a: Arguments) -> list[Tensor]:
        if name not in TERMS:
            return flat(LOSSES[name](x, a))
        loss, *statistics = named(TERMS[name](x, a)).values()
        return [loss * 2.0, *statistics]

    return outputs


def with_gradient(name: str, outputs: Function, count: int) -> list[Tensor]:
    """The backward pass is called outside of the compiled function."""
    x, a = problem(count)
    if name not in TERMS:
        return outputs(x, a)
    leaf = x.requires_grad_()
    loss, *statistics = outputs(leaf, a)
    assert not any(value.requires_grad for value in statistics)
    return [loss.detach(), *statistics, *torch.autograd.grad(3.0 * loss, leaf)]


@EVERY_LOSS
@pytest.mark.slow
def test_one_graph_serves_every_batch_size(name: str) -> None:
    """Empty ones, and without gradients, in another."""
    counter, plain = CompileCounterWithBackend(COMPILERS[0]), outputs_of(name)
    compiled = torch.compile(plain, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for count in (6, 9, 15, 0):
        found, wanted = (with_gradient(name, f, count) for f in (compiled, plain))
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        compilations.append(counter.frame_count)
    assert found[-1].shape == (0, CLASSES) or name == "pseudo"
    # The first may start over, to take in a float; no other batch size makes it compile again.
    assert 1 <= compilations[0] == compilations[2]
    with torch.no_grad():
        assert all(map(torch.equal, compiled(*problem(6)), plain(*problem(6))))
    if name in TERMS and INTERPRETED:
        x, a = problem(6)
        leaf = x.requires_grad_()
        loss = compiled(leaf, a)[0]
        with pytest.raises(RuntimeError, match=r"double backward|create_graph=False"):
            (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
            gradient.sum().backward()


@pytest.mark.slow
def test_numbers_that_change_are_no_new_graph() -> None:
    """Python's numbers become inputs of the graph."""
    counter, (x, arguments) = CompileCounterWithBackend(COMPILERS[-1]), problem(6)

    def step(leaf: Tensor, weight: float, feedback: float) -> list[Tensor]:
        a = arguments._replace(uda_weight=weight, feedback=feedback)
        loss = named(TERMS["exact"](leaf, a))["loss"]
        ce = named(TERMS["smoothed_ce"](leaf, a))
        return [loss + ce["loss"], ce["accuracy"], *flat(LOSSES["teacher"](leaf.detach(), a))]

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for numbers in [(0.7, -0.3), (8.1, 0.15), (1.0, 0.0), (2.5, -1e-3)]:
        results: list[list[Tensor]] = []
        for f in (compiled, step):
            leaf = x.clone().requires_grad_()
            loss, *others = f(leaf, *numbers)
            results.append([loss, *others, *torch.autograd.grad(loss, leaf)])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    assert counter.frame_count <= 2  # the first may take numbers for constants


X, ONE, Y = rows(6, CLASSES), torch.ones(()), labels(6, CLASSES)
SOFT, UNIFORMS, SAVED = X.flip(0), torch.linspace(0.1, 0.9, 6), torch.rand(4, 6) + 0.5


@pytest.mark.skipif(not INTERPRETED, reason="of kernels on the interpreter")
@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        ("teacher", (X, Y[:2], [Y[2:4]], [Y[4:]], 2, ONE, ONE, True, 0.7, 0.2, 0.1)),
        ("teacher", (X, Y[:0], [], [], 3, ONE, ONE, False, 0.7, 0.2, 0.1)),
        ("teacher", (X[:0], Y[:0], [], [], 0, ONE, ONE, False, 0.7, 0.2, 0.1)),
        ("student", (X, [Y], 0.1, True)),
        ("student", (X, [Y, UNIFORMS], 0.1, False)),
        ("student", (X, [SOFT, UNIFORMS], 0.1, True)),
        ("student", (X, [SOFT], 0.1, False)),
        ("student_gradient", (X, [Y], 0.1, False, SAVED[:2], ONE)),
        ("student_gradient", (X, [SOFT, UNIFORMS], 0.1, False, SAVED, ONE)),
        ("pseudo_labels", (X, [UNIFORMS])),
        ("cosine", (X, [SOFT], 0.7, 0.5)),
        ("cosine_gradient", (X, [SOFT], 0.7, 0.5, SAVED, ONE)),
        ("exact", (X, [SOFT, ONE])),
        ("exact_gradient", (X, [SOFT, ONE], SAVED[:3], ONE)),
    ],
)
def test_ops_satisfy_torch_library(op: str, arguments: tuple[object, ...]) -> None:
    """Schema, shapes of the fake, no hidden mutation or alias, dynamic shapes."""
    from mpl_fast.kernels import fused

    assert fused.__all__  # registers the ops
    results = torch.library.opcheck(getattr(torch.ops.mpl_fast, op).default, arguments)
    assert set(results.values()) == {"SUCCESS"}
