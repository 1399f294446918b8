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
    EVERY_TERMS,
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
interpreted = pytest.mark.skipif(not INTERPRETED, reason="of kernels on the interpreter")
CLASSES = 10
# Of plain PyTorch only the trace is tested: to compile it takes minutes.
COMPILERS = ["aot_eager", "inductor"] if INTERPRETED else ["eager"]
ONE_PASS = {name: LOSSES[name] for name in LOSSES if name not in TERMS}


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


def compiled_and_plain(name: str, backend: object) -> list[Callable[..., list[Tensor]]]:
    """A loss with its gradient, compiled and not: backward passes are called outside the graph."""
    if name in ONE_PASS:
        one = ONE_PASS[name]
        compiled = torch.compile(one, fullgraph=True, dynamic=True, backend=backend)  # type: ignore[call-overload]
        return [lambda x, a, f=f: flat(f(x, a)) for f in (compiled, one)]
    terms = TERMS[name]

    def doubled(x: Tensor, a: Arguments) -> tuple[Tensor, ...]:
        loss, *statistics = named(terms(x, a)).values()
        return loss * 2.0, *statistics

    compiled = torch.compile(doubled, fullgraph=True, dynamic=True, backend=backend)  # type: ignore[call-overload]
    return [lambda x, a, f=f: gradients(f, x, a) for f in (compiled, doubled)]


def gradients(
    f: Callable[[Tensor, Arguments], tuple[Tensor, ...]], x: Tensor, a: Arguments
) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    loss, *statistics = f(leaf, a)
    assert not any(value.requires_grad for value in statistics)
    return [loss.detach(), *statistics, *torch.autograd.grad(3.0 * loss, leaf)]


@pytest.mark.parametrize(
    ("name", "backend"),
    [*((name, COMPILERS[0]) for name in LOSSES), *(("smoothed_ce", c) for c in COMPILERS[1:])],
)
@pytest.mark.slow
def test_one_graph_serves_every_batch_size(name: str, backend: str) -> None:
    counter = CompileCounterWithBackend(backend)
    functions, compilations = compiled_and_plain(name, counter), []
    for count in (6, 9, 15):
        found, wanted = (f(*problem(count)) for f in functions)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        compilations.append(counter.frame_count)
    # The first may start over, to take in a float; no other batch size makes it compile again.
    assert 1 <= compilations[0] == compilations[-1]


@EVERY_LOSS
def test_a_batch_may_be_empty(name: str) -> None:
    compiled, plain = compiled_and_plain(name, COMPILERS[0])
    found, wanted = compiled(*problem(0)), plain(*problem(0))
    assert all(map(torch.equal, found, wanted))
    assert found[-1].shape == (0, CLASSES) or name == "pseudo"


@EVERY_TERMS
def test_compiled_without_gradients(name: str) -> None:
    x, a = problem(6)
    compiled = torch.compile(TERMS[name], fullgraph=True, backend=COMPILERS[0])
    with torch.no_grad():
        found, wanted = (named(f(x, a)) for f in (compiled, TERMS[name]))
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@interpreted
@EVERY_TERMS
def test_two_derivatives_are_refused_when_compiled(name: str) -> None:
    x, a = problem(6)
    leaf = x.requires_grad_()
    compiled = torch.compile(TERMS[name], fullgraph=True, backend=COMPILERS[0])
    loss = named(compiled(leaf, a))["loss"]
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()


@pytest.mark.parametrize("backend", COMPILERS)
@pytest.mark.slow
def test_numbers_that_change_are_no_new_graph(backend: str) -> None:
    """Python's numbers become inputs of the graph."""
    counter = CompileCounterWithBackend(backend)
    x, a = problem(6)

    def step(leaf: Tensor, weight: float, feedback: float) -> list[Tensor]:
        given = a._replace(uda_weight=weight, feedback=feedback)
        exact = named(TERMS["exact"](leaf, given))["loss"]
        return [exact, *flat(LOSSES["teacher"](leaf.detach(), given))]

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for numbers in [(0.7, -0.3), (8.1, 0.15), (1.0, 0.0), (2.5, -1e-3)]:
        found: list[Tensor] = []
        wanted: list[Tensor] = []
        for f, results in ((compiled, found), (step, wanted)):
            leaf = x.clone().requires_grad_()
            results += f(leaf, *numbers)
            results += torch.autograd.grad(results[0], leaf)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
        compilations.append(counter.frame_count)
    assert compilations[-1] <= 2  # the first may take numbers for constants


X, ONE, Y = rows(6, CLASSES), torch.ones(()), labels(6, CLASSES)
SOFT, UNIFORMS, SAVED = X.flip(0), torch.linspace(0.1, 0.9, 6), torch.rand(4, 6) + 0.5


@interpreted
@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        ("teacher", (X, Y[:2], [], [], 2, ONE, ONE, False, 0.7, 0.2, 0.1)),
        ("teacher", (X, Y[:2], [Y[2:4]], [Y[4:]], 2, ONE, ONE, True, 0.7, 0.2, 0.1)),
        ("teacher", (X, Y, [], [], 0, ONE, ONE, False, 0.7, 0.2, 0.1)),
        ("teacher", (X, Y[:0], [], [], 3, ONE, ONE, False, 0.7, 0.2, 0.1)),
        ("teacher", (X[:0], Y[:0], [], [], 0, ONE, ONE, False, 0.7, 0.2, 0.1)),
        ("student", (X, [Y], 0.1, True)),
        ("student", (X, [Y, UNIFORMS], 0.1, False)),
        ("student", (X, [SOFT, UNIFORMS], 0.1, True)),
        ("student", (X, [SOFT], 0.1, False)),
        ("student_gradient", (X, [Y], 0.1, False, SAVED[:2], ONE)),
        ("student_gradient", (X, [SOFT, UNIFORMS], 0.1, False, SAVED, ONE)),
        ("pseudo_labels", (X, [])),
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
