"""Counts of operators, bytes, waits and collectives are right for work of which they are known."""

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tools.bench import count
from tools.bench.count import host_syncs, operators

CPU = torch.device("cpu")
X = torch.arange(6.0)


@pytest.mark.parametrize(
    ("work", "launches", "numbers"),
    [
        (lambda a, b: a + b, 1, 300),
        (lambda a, b: a.add_(b), 1, 300),  # read both, write one
        (lambda a, b: a.copy_(b), 1, 200),
        (lambda a, b: a.zero_(), 1, 100),
        (lambda a, b: a.view(10, 10).t()[0], 0, 0),
        (lambda a, b: torch._foreach_lerp_([a, a], [b, b], 0.5), 1, 600),
        (lambda a, b: torch._foreach_copy_([a, a], [b, b]), 1, 400),
        (lambda a, b: a.sum(), 1, 101),
        (lambda a, b: a[:1].expand(100) + b, 1, 201),
        (lambda a, b: (a.view(10, 10).t() + 1).mul(2), 2, 400),
    ],
)
def test_operators_and_what_they_read_and_write(
    work: Callable[[Tensor, Tensor], Any], launches: int, numbers: int
) -> None:
    a, b = torch.ones(100), torch.ones(100)
    found = operators(lambda: work(a, b))
    assert (found.launches, found.bytes) == (launches, 4 * numbers)


def test_a_backward_operator_that_fills_first_launches_twice() -> None:
    x = torch.ones(4, requires_grad=True)
    y = x[:2].sum()
    found = operators(lambda: y.backward())
    assert found.launches == 3  # ones_like, zeros and the copy


@pytest.mark.parametrize(
    ("name", "wait"),
    [
        ("_local_scalar_dense", lambda: X.sum().item()),
        ("_local_scalar_dense", lambda: float(X[0])),
        ("_local_scalar_dense", lambda: bool((X > 2).any())),
        ("equal", lambda: torch.equal(X, X + 1)),
        ("nonzero", lambda: X.nonzero()),
        ("index", lambda: X[X > 2]),
        ("masked_select", lambda: X.masked_select(X > 2)),
        ("tolist", lambda: X.tolist()),
        ("cpu", lambda: X.cpu()),
        ("numpy", lambda: X.numpy()),
        ("_unique2", lambda: X.unique()),
    ],
)
def test_what_waits_is_counted_with_its_line(name: str, wait: Any) -> None:
    (where, times), *others = host_syncs(wait, CPU).items()
    assert where.startswith(f"{name} in tests/tools/test_bench_count.py:")
    assert times == 1
    assert others == []


@pytest.mark.parametrize(
    "work",
    [
        lambda: X[torch.tensor([1, 2])] + X[2],
        lambda: torch.where(X > 2, X, 0.0).sum(),
        lambda: nn.functional.one_hot(torch.tensor([0, 2]), 4),  # reads its labels only on a CPU
        lambda: X.to(torch.float64).clamp(max=2.0),
    ],
)
def test_what_does_not_wait_is_not_counted(work: Any) -> None:
    assert not host_syncs(work, CPU)


def test_a_wait_in_a_backward_pass_is_counted() -> None:
    def scaled(gradient: Tensor) -> Tensor:
        return gradient * gradient.sum().item()

    def step() -> None:
        x = X.clone().requires_grad_()
        y = x * 2
        y.register_hook(scaled)
        y.sum().backward()

    assert host_syncs(step, CPU).total() == 1


def test_launches_are_what_the_device_shows_but_shadows_of_the_hosts_regions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kinds = [("CPU", False), ("CUDA", False), ("CUDA", True), ("CUDA", False)]
    events = [
        SimpleNamespace(device_type=SimpleNamespace(name=kind), is_user_annotation=shadow)
        for kind, shadow in kinds  # a shadow is such as "Torch-Compiled Region"
    ]
    profiler = nullcontext(SimpleNamespace(events=lambda: events))
    monkeypatch.setattr(count, "profile", lambda activities: profiler)
    called = list[int]()
    assert (count.launches(lambda: called.append(1)), called) == (2, [1])


def test_extra_memory_is_the_peak_without_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("synchronize", "reset_peak_memory_stats", "memory_allocated", "max_memory_allocated")
    cuda = Mock()
    cuda.memory_allocated.return_value, cuda.max_memory_allocated.return_value = 100, 130
    for name in names:
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    assert count.extra_memory(cuda.work) == 30
    order = [call[0] for call in cuda.method_calls]
    assert order[1:] == [*names[1:3], "work", "synchronize", "max_memory_allocated"]


def test_collectives_of_a_program_of_which_they_are_known() -> None:
    """DDP's exchange, one for each of its two buckets, and two by hand."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        net = nn.Sequential(nn.Linear(600, 600), nn.Linear(600, 600))  # 1.4 MB each
        replica = DistributedDataParallel(net, bucket_cap_mb=1)

        def step() -> None:
            replica(torch.ones(2, 600)).sum().backward()
            dist.all_reduce(torch.ones(3))
            dist.broadcast(torch.ones(3), 0)

        for _ in range(3):
            step()
        assert count.collectives(step) == {"allreduce_": 3, "broadcast_": 1}
    finally:
        dist.destroy_process_group()
