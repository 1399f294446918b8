"""The checks of this folder can fail: each finds the fault that it is for."""

import json
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from mpl_fast import losses
from tests.null_gpu import machine
from tests.null_gpu.test_step_graphs import steps
from tests.null_gpu.test_steps import step

pytestmark = pytest.mark.slow
VARIANT = "mpl difference"


def _nothing(h: Tensor) -> Tensor:
    return h


def _item(h: Tensor) -> Tensor:
    return h * h.item()


def _size_by_content(h: Tensor) -> Tensor:
    return h + len(h[None].nonzero())


def _cpu_operand(h: Tensor) -> Tensor:
    return h + torch.ones(1)


def _cpu_scalar(h: Tensor) -> Tensor:
    return h + torch.ones(())


def _pageable_copy(h: Tensor) -> Tensor:
    return h + torch.ones(1).to(h.device, non_blocking=True)[0]


def _pinned_copy(h: Tensor) -> Tensor:
    return h + torch.ones(1, pin_memory=True).to(h.device, non_blocking=True)[0]


def _other_stream(h: Tensor) -> Tensor:
    with torch.cuda.stream(torch.cuda.Stream()):
        return h.add_(1)


def _dtype(h: Tensor) -> Tensor:
    return torch.dot(h[None], torch.ones(1, dtype=torch.float64, device=h.device))


SYNCHRONIZING = "called a synchronizing CUDA operation"
CAPTURING = "operation not permitted when stream is capturing"
FAULTS: dict[Callable[[Tensor], Tensor], tuple[str, str]] = {
    # What is found in a step, and what in a step as a graph; empty if it is right there.
    _nothing: ("", ""),
    _item: (SYNCHRONIZING, CAPTURING),
    _size_by_content: (SYNCHRONIZING, CAPTURING),
    _cpu_operand: ("Expected all tensors to be on the same device", "same device"),
    _cpu_scalar: ("mixes devices: aten.add.Tensor", ""),
    _pageable_copy: ("MEMCPY pageable->device", "unless the CPU tensor is pinned"),
    _pinned_copy: ("", ""),
    _other_stream: ("", "ESCAPED KERNEL"),
    _dtype: ("expected both vectors to have same dtype", "same dtype"),
}


def measure() -> dict[str, list[list[str]]]:
    """Faults that are found in a step and in a graph; in a process on the null GPU."""
    return {fault.__name__: [_eager(fault), _graphed(fault)] for fault in FAULTS}


def _injected(fault: Callable[[Tensor], Tensor]) -> Any:
    right = losses.mpl_feedback

    def wrong(*arguments: Any, **named: Any) -> Tensor:
        return fault(right(*arguments, **named))

    return mock.patch.object(losses, "mpl_feedback", wrong)


def _eager(fault: Callable[[Tensor], Tensor]) -> list[str]:
    from tests.null_gpu.training import ALL

    with _injected(fault):
        try:
            return [*step(ALL[VARIANT], bf16=True)["faults"]]
        except RuntimeError as error:  # of the first step, which is not watched
            return [str(error)]


def _graphed(fault: Callable[[Tensor], Tensor]) -> list[str]:
    with _injected(fault):
        found: list[str] = steps(VARIANT)["faults"]
    return found


@pytest.fixture(scope="module")
def found() -> dict[str, list[list[str]]]:
    """What `measure` found."""
    measured: dict[str, list[list[str]]] = json.loads(machine.run("tests.null_gpu.test_faults"))
    return measured


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__.strip("_"))
def test_a_fault_is_found(
    fault: Callable[[Tensor], Tensor], found: dict[str, list[list[str]]]
) -> None:
    for expected, faults in zip(FAULTS[fault], found[fault.__name__], strict=True):
        assert any(expected in line for line in faults) if expected else not faults


if __name__ == "__main__":
    print(json.dumps(measure()))
