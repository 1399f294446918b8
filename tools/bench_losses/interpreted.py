"""Our kernels without a GPU: right or wrong, and their launches, on Triton's interpreter.

A process of its own, since Triton decides about it when a kernel is decorated; prints JSON.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from tools.bench_losses import contestants, correctness, counts
from tools.bench_losses.problems import LOSSES, Shape, draw

Json = dict[str, Any]
# float32, since the interpreter truncates to bfloat16; and small, since it is slow.
SHAPES = [Shape(loss, 100, 104, 16, torch.float32) for loss in LOSSES]


@contextmanager
def counted() -> Iterator[list[str]]:
    """Names of the kernels that are launched inside; the interpreter's own copies do not count."""
    from triton.runtime.interpreter import InterpretedFunction

    launched: list[str] = []
    run = InterpretedFunction.run

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        launched.append(self.__name__)
        with _disable_current_modes():
            return run(self, *args, **kwargs)

    InterpretedFunction.run = noted
    try:
        yield launched
    finally:
        InterpretedFunction.run = run


def measure(shape: Shape, name: str) -> Json:
    """Compared with float64; launches of kernels and of PyTorch's own operations together."""
    error = correctness.attempt(correctness.case(shape, "cpu"), name, "cpu")
    call, x = contestants.build(name, shape), draw(shape, "cpu")
    with counted() as launched, counts.Counter() as counter:
        call(x)
    cell = counts.row(shape, name, counter.launches + len(launched), None)
    cell |= {"kernels": launched, "error": error}
    return cell | ({"wrong": error["wrong"]} if error["wrong"] else {})


def main() -> None:
    """Every loss, in every way of ours."""
    torch.set_num_threads(1)
    cells = [
        measure(shape, name)
        for shape in SHAPES
        for name in contestants.OURS
        if name in contestants.names(shape)
    ]
    json.dump(cells, sys.stdout, default=str)


if __name__ == "__main__":
    main()
