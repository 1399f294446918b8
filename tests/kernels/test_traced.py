"""Graphs of PyTorch's compiler where Triton compiles: kernels, and no opaque op.

Graphs are traced on the CPU as for a GPU, and never run.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

pytest.importorskip("triton")

from functorch.compile import make_boxed_func  # type: ignore[import-untyped]
from torch._dynamo.backends.common import aot_autograd
from torch._library.triton import get_triton_kernels_for_op
from triton.runtime import driver

from mpl_fast import losses
from mpl_fast.kernels.aot import SimulatedDriver
from tests.kernels.cases import LOSSES, TERMS, Arguments, labels, named, rows

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
    ),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
]


@pytest.fixture(autouse=True)
def simulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The compiler needs the GPU's architecture to find out which arguments a kernel writes."""
    monkeypatch.setattr(driver, "_active", SimulatedDriver(90))
    torch.compiler.reset()
    with losses.use("triton"):
        yield
    torch.compiler.reset()


class Tracer:
    """A backend that keeps the graphs, and runs them as ones that return zeros."""

    def __init__(self) -> None:
        self.graphs: list[GraphModule] = []

    def __call__(self, graph: GraphModule, examples: Sequence[Any]) -> Any:
        return aot_autograd(fw_compiler=self.keep, bw_compiler=self.keep)(graph, examples)

    def keep(self, graph: GraphModule, examples: Sequence[Any]) -> Any:
        self.graphs.append(graph)
        (output,) = (node for node in graph.graph.nodes if node.op == "output")
        return make_boxed_func(lambda *_: [self.zeros(x) for x in output.args[0]])

    @staticmethod
    def zeros(node: object) -> object:
        value = node.meta["val"] if isinstance(node, Node) else node
        if isinstance(value, torch.Tensor):
            return torch.zeros([hint(size) for size in value.shape], dtype=value.dtype)
        return hint(value)


def hint(value: Any) -> Any:
    """The number that a symbol stood for when it was traced."""
    return value.node.hint if isinstance(value, torch.SymInt) else value


def calls(graph: GraphModule, name: str) -> list[Node]:
    return [n for n in graph.graph.nodes if n.op == "call_function" and name in str(n.target)]


CLASSES = 16


def traced(name: str, logits: Tensor) -> tuple[Tensor, ...]:
    """Outputs of a loss; first one that autograd differentiates."""
    count = logits.shape[0]
    other = logits.detach() * 0.5
    label = losses.pseudo_labels(other).label if name == "student hard" else labels(count, CLASSES)
    scalar = torch.tensor(0.5)
    a = Arguments(label, other, None, 0.1, 0.7, 0.2, scalar, scalar)
    if name in TERMS:
        return tuple(named(TERMS[name](logits, a)).values())
    outputs, gradient = LOSSES[name](logits, a)
    return (logits * gradient).sum(), *outputs.values()


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "pseudo"])
@pytest.mark.slow
def test_one_kernel_forward_one_backward_and_no_copies(name: str) -> None:
    tracer = Tracer()

    def loss(logits: Tensor) -> tuple[Tensor, ...]:
        return traced(name, logits)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=tracer)
    logits = rows(9, CLASSES, torch.bfloat16).requires_grad_()
    torch.autograd.grad(compiled(logits)[0], logits)
    forward, backward = tracer.graphs[-2:]
    # The label of a hard student is computed by a kernel, too.
    counts = 1 + (name == "student hard"), int(name in TERMS)
    for graph, count in zip((forward, backward), counts, strict=True):
        assert len(calls(graph, "triton_kernel_wrapper_functional")) == count
        assert not calls(graph, "mpl_fast")
    for kernel in calls(forward, "triton_kernel_wrapper_functional"):
        assert kernel.kwargs["tensors_to_clone"]  # what it writes, and nothing that it reads
        read: Any = kernel.kwargs["kwargs"]
        assert "x_ptr" in read and "x_ptr" not in kernel.kwargs["tensors_to_clone"]  # type: ignore[operator]
        grid: Any = kernel.kwargs["grid"]
        assert isinstance(grid[0][0], Node)  # another batch is not another kernel
    for kernel in (k for graph in (forward, backward) for k in calls(graph, "triton_kernel")):
        given: Any = kernel.kwargs["kwargs"]
        values = [x.meta["val"] for x in given.values() if isinstance(x, Node)]
        # Inductor would hand 1 / n to the kernel as an integer.
        assert not [x for x in values if isinstance(x, torch.SymFloat)]


@pytest.mark.parametrize(
    ("op", "kernel"),
    [
        ("teacher", "teacher_kernel"),
        ("student", "student_kernel"),
        ("student_gradient", "student_gradient_kernel"),
        ("pseudo_labels", "pseudo_kernel"),
        ("cosine", "cosine_kernel"),
        ("cosine_gradient", "cosine_gradient_kernel"),
        ("exact", "exact_kernel"),
        ("exact_gradient", "exact_gradient_kernel"),
    ],
)
def test_the_compilers_cache_contains_the_kernel_of_an_op(op: str, kernel: str) -> None:
    """Or it would reuse the code of an older version of the kernel."""
    from mpl_fast.kernels import fused

    assert fused.__all__  # registers the ops
    found: Any = get_triton_kernels_for_op(f"mpl_fast::{op}")
    assert [one.__name__ for one in found] == [kernel]
