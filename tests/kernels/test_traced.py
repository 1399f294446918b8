"""What PyTorch's compiler sees of the fused losses where Triton compiles: kernels, nothing opaque.

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
from mpl_fast.kernels.aot import PretendDriver
from tests.kernels import compile_in_interpreter as traced
from tests.kernels.interpreted_rows import rows

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
    ),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
]


@pytest.fixture(autouse=True)
def pretend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The compiler asks for the GPU's architecture to find out which arguments a kernel writes."""
    monkeypatch.setattr(driver, "_active", PretendDriver(90))
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


def soft_student(logits: Tensor) -> tuple[Tensor, ...]:
    return losses.student_loss(logits, logits.detach() * 0.5, None, num_classes=traced.CLASSES)


def hard_student(logits: Tensor) -> tuple[Tensor, ...]:
    label = losses.pseudo_labels(logits, num_classes=traced.CLASSES).label
    return losses.student_loss(logits, label, label[:0], num_classes=traced.CLASSES)


def student_and_grad(logits: Tensor) -> tuple[Tensor, ...]:
    label = torch.zeros(logits.shape[0], dtype=torch.int64)
    out, gradient = losses.student_loss_and_grad(logits, label, num_classes=traced.CLASSES)
    return (logits * gradient).sum(), out.loss


def cosine(logits: Tensor) -> tuple[Tensor, ...]:
    return losses.cosine_loss(logits, logits.detach() * 0.5, num_classes=traced.CLASSES)


def exact(logits: Tensor) -> tuple[Tensor, ...]:
    direction = torch.ones_like(logits, dtype=torch.float32)
    return (losses.exact_feedback(logits, direction, weight=traced.SCALAR),)


@pytest.mark.parametrize(
    ("loss", "labeled", "kernels"),
    [
        (traced.whole, 3, [1, 1]),
        (traced.plain, 0, [1, 1]),
        (traced.labeled, 0, [1, 1]),
        (traced.one_pass, 3, [1, 0]),
        (soft_student, 0, [1, 1]),
        (hard_student, 0, [2, 1]),
        (student_and_grad, 0, [1, 0]),
        (cosine, 0, [1, 1]),
        (exact, 0, [1, 1]),
    ],
)
def test_one_kernel_forward_one_backward_and_no_copies(
    loss: traced.Loss, labeled: int, kernels: list[int]
) -> None:
    tracer = Tracer()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=tracer)
    logits = rows(labeled + 8, traced.WIDTH, torch.bfloat16).requires_grad_()
    torch.autograd.grad(compiled(logits)[0], logits)
    forward, backward = tracer.graphs[-2:]
    for graph, count in zip((forward, backward), kernels, strict=True):
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
    ("op", "kernels"),
    [
        ("teacher", ["teacher_kernel"]),
        ("student", ["student_kernel"]),
        ("pseudo_labels", ["pseudo_kernel"]),
        ("cosine", ["cosine_kernel"]),
        ("cosine_gradient", ["cosine_gradient_kernel"]),
        ("exact", ["exact_kernel"]),
        ("exact_gradient", ["exact_gradient_kernel"]),
    ],
)
def test_the_compilers_cache_knows_the_kernels_of_an_op(op: str, kernels: list[str]) -> None:
    """Or it would serve the code of yesterday's kernel."""
    found: Any = get_triton_kernels_for_op(f"mpl_fast::{op}")
    assert [kernel.__name__ for kernel in found] == kernels
