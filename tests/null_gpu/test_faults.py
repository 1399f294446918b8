"""The checks of this folder can fail: each finds the fault that it is for."""

import json
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from mpl_fast import losses
from tests.null_gpu import machine
from tests.null_gpu.test_compiled import compiled_steps
from tests.null_gpu.test_step_graphs import steps
from tests.null_gpu.test_steps import step

pytestmark = pytest.mark.slow
VARIANT = "mpl difference"
Found = dict[str, Any]


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
ESCAPED = "ESCAPED KERNEL"
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
    _other_stream: ("", ESCAPED),
    _dtype: ("expected both vectors to have same dtype", "same dtype"),
}


class _Network(nn.Module):
    """A small network with a fault."""

    calls = 0

    def __init__(self, fault: Callable[["_Network", Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fault = fault

    def forward(self, images: Tensor) -> Tensor:
        return self.fault(self, self.layers(images))


def _right(network: _Network, logits: Tensor) -> Tensor:
    return logits


def _breaks(network: _Network, logits: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return logits


def _waits(network: _Network, logits: Tensor) -> Tensor:
    return logits * logits.sum().item()


def _counts(network: _Network, logits: Tensor) -> Tensor:
    network.calls += 1
    return logits + network.calls


# What is found of a compiled network.
COMPILED_FAULTS: dict[Callable[[_Network, Tensor], Tensor], set[str]] = {
    _right: set(),
    _breaks: {"breaks"},
    _waits: {"breaks", "faults"},
    _counts: {"compiled_again"},
}


def measure() -> Found:
    """Faults that are found in a step, in a graph, and in compiled networks; in a process on the
    null GPU."""
    found: Found = {fault.__name__: [_eager(fault)] for fault in FAULTS}
    found |= {fault.__name__: _compiled(fault) for fault in COMPILED_FAULTS}
    # Last those that end a capture: after one, torch 2.11 refuses random numbers.
    for fault in sorted(FAULTS, key=lambda fault: FAULTS[fault][1] not in ("", ESCAPED)):
        found[fault.__name__].append(_graphed(fault))
    return found


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


def _compiled(fault: Callable[[_Network, Tensor], Tensor]) -> Any:
    from tests.null_gpu.training import ALL

    return compiled_steps(ALL["supervised"], lambda: _Network(fault), warmup=1)


@pytest.fixture(scope="module")
def found() -> Found:
    """What `measure` found."""
    measured: Found = json.loads(machine.run("tests.null_gpu.test_faults"))
    return measured


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__.strip("_"))
def test_a_fault_is_found(fault: Callable[[Tensor], Tensor], found: Found) -> None:
    for expected, faults in zip(FAULTS[fault], found[fault.__name__], strict=True):
        assert any(expected in line for line in faults) if expected else not faults


@pytest.mark.parametrize("fault", [_item, _size_by_content, _pageable_copy])
def test_of_a_step_that_cannot_be_captured_one_line_names_the_option(
    fault: Callable[[Tensor], Tensor], found: Found
) -> None:
    _, reason = FAULTS[fault]
    _, faults = found[fault.__name__]
    assert any("ConfigError: cuda_graphs step" in line and reason in line for line in faults)
    assert any(line.endswith("): set cuda_graphs off") for line in faults)


@pytest.mark.parametrize("fault", COMPILED_FAULTS, ids=lambda fault: fault.__name__.strip("_"))
def test_a_fault_of_a_compiled_network_is_found(
    fault: Callable[[_Network, Tensor], Tensor], found: Found
) -> None:
    wrong = {what for what in ("breaks", "faults", "compiled_again") if found[fault.__name__][what]}
    expected = COMPILED_FAULTS[fault]
    assert wrong >= expected if expected else not wrong


if __name__ == "__main__":
    print(json.dumps(measure()))
