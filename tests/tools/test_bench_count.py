"""Counts of operators, bytes, waits and collectives are right for work of which they are known."""

import json
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tiny_run import ROOT, environment
from tools.bench import count
from tools.bench.count import host_syncs, operators

CPU = torch.device("cpu")
X = torch.arange(6.0)
PROGRAM = """
import json, sys
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from mpl_fast import distributed
from tools.bench.count import collectives

distributed.init("cpu")
net = nn.Sequential(nn.Linear(600, 600), nn.Linear(600, 600))  # 1.4 MB each
replica = DistributedDataParallel(net, bucket_cap_mb=1, forward_sync_buffers=False)

def step():
    replica(torch.ones(2, 600)).sum().backward()
    torch.distributed.all_reduce(torch.ones(3))
    torch.distributed.broadcast(torch.ones(3), 0)

for _ in range(3):
    step()
found = collectives(step)
if distributed.rank() == 0:
    open(sys.argv[1], "w").write(json.dumps(found))
distributed.shutdown()
"""


@pytest.mark.parametrize(
    ("work", "calls", "numbers"),
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
    work: Callable[[Tensor, Tensor], Any], calls: int, numbers: int
) -> None:
    a, b = torch.ones(100), torch.ones(100)
    found = operators(lambda: work(a, b))
    assert (found.calls, found.launches, found.bytes) == (calls, calls, 4 * numbers)


def test_a_backward_operator_that_fills_first_launches_twice() -> None:
    x = torch.ones(4, requires_grad=True)
    y = x[:2].sum()
    found = operators(lambda: y.backward())
    assert found.launches == found.calls + 1


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


def test_shadows_of_the_hosts_regions_are_no_launches() -> None:
    def event(kind: str, shadow: bool) -> Any:
        where = types.SimpleNamespace(name=kind)
        return types.SimpleNamespace(device_type=where, is_user_annotation=shadow)

    assert count._is_launch(event("CUDA", False))
    assert not count._is_launch(event("CUDA", True))  # such as "Torch-Compiled Region"
    assert not count._is_launch(event("CPU", False))


def test_extra_memory_is_the_peak_without_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def noted(name: str, value: int) -> Callable[[], int]:
        def call() -> int:
            order.append(name)
            return value

        return call

    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, noted(name, 0))
    monkeypatch.setattr(torch.cuda, "memory_allocated", noted("before", 100))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", noted("peak", 130))
    assert count.extra_memory(noted("work", 0)) == 30
    assert order[1:] == ["reset_peak_memory_stats", "before", "work", "synchronize", "peak"]


@pytest.mark.slow
def test_collectives_of_a_program_of_which_they_are_known(tmp_path: Path) -> None:
    """DDP's exchange, one for each of its two buckets, and two by hand."""
    script, out = tmp_path / "program.py", tmp_path / "out.json"
    script.write_text(PROGRAM)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, *launcher, str(script), str(out)],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment() | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text()) == {"allreduce_": 3, "broadcast_": 1}
