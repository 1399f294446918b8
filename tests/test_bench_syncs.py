"""The counts of waits, launches and collectives are right for steps of which they are known."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tiny_run import ROOT, environment
from tools import bench_syncs
from tools.bench_steps import contestants
from tools.bench_steps.contestants import Flavor
from tools.bench_steps.launches import launches
from tools.bench_steps.setting import Setting
from tools.bench_steps.waits import waits

CPU = torch.device("cpu")
TINY = Setting("wrn_10_1", 2, 2, 8, CPU)
X = torch.arange(6.0)
PROGRAM = """
import json, sys
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from mpl_fast import distributed
from tools.bench_steps.collectives import collectives

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
    (where, times), *others = waits(wait, CPU).items()
    assert where.startswith(f"{name} in tests/test_bench_syncs.py:")
    assert times == 1
    assert others == []


@pytest.mark.parametrize(
    "work",
    [
        lambda: X[torch.tensor([1, 2])] + X[2],
        lambda: torch.where(X > 2, X, 0.0).sum(),
        lambda: nn.functional.one_hot(torch.tensor([0, 2]), 4),  # looks only on a CPU
        lambda: X.to(torch.float64).clamp(max=2.0),
    ],
)
def test_what_does_not_wait_is_not_counted(work: Any) -> None:
    assert not waits(work, CPU)


def test_a_wait_in_a_backward_pass_is_counted() -> None:
    def noted(gradient: Tensor) -> Tensor:
        return gradient * gradient.sum().item()

    def step() -> None:
        x = X.clone().requires_grad_()
        y = x * 2
        y.register_hook(noted)
        y.sum().backward()

    assert sum(waits(step, CPU).values()) == 1


def test_the_plain_step_waits_six_times_and_ours_never() -> None:
    plain = contestants.plain(TINY, amp=False)
    ours = contestants.ours(TINY, "mpl", Flavor())
    assert ours is not None
    for one in (plain, ours):
        one.step()
    assert sum(waits(plain.step, CPU).values()) == 6
    assert all("plain.py" in where for where in waits(plain.step, CPU))
    assert not waits(ours.step, CPU)


def test_operators_are_counted_and_views_are_not() -> None:
    assert launches(lambda: (X.view(2, 3).t() + 1).mul(2), CPU) == 2


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
        timeout=120,
        env=environment() | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text()) == {"allreduce_": 3, "broadcast_": 1}


@pytest.mark.slow
def test_smoke_counts_all_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    recipes = ["mpl", "uda", "supervised"]
    code = bench_syncs.main(["--smoke", "--device", "cpu", "--recipe", *recipes, "--out", str(out)])
    found = json.loads(out.read_text())
    numbers = {row["name"]: row["median"] for row in found["rows"]}
    assert numbers["plain mpl: host synchronizations"] == 6
    for recipe in recipes:
        assert numbers[f"{recipe}: host synchronizations"] == 0
        assert numbers[f"{recipe}: operator calls"] > 100
    assert numbers["mpl: operator calls"] < numbers["plain mpl: operator calls"]
    # One for each update, and one for the feedback.
    assert [numbers[f"{recipe}: collectives"] for recipe in recipes] == [3, 1, 1]
    assert code == 0
    assert all(row["steady"] for row in found["rows"])


def test_above_the_budget_is_exit_code_1_and_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the plain step in the place of ours, and four collectives."""
    monkeypatch.setattr(
        contestants, "ours", lambda setting, recipe, flavor: contestants.plain(setting, amp=False)
    )
    exchanged = {"mpl": Counter({"allreduce_": 4})}
    monkeypatch.setattr(bench_syncs, "counted", lambda setting, recipes: exchanged)
    out = tmp_path / "out.json"
    assert bench_syncs.main(["--smoke", "--recipe", "mpl", "--out", str(out)]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert "above the budget: mpl: host synchronizations" in first and "plain.py" in first
    assert "above the budget: mpl: collectives: {'allreduce_': 4}" in second
    where = json.loads(out.read_text())["where"]
    assert sum(where["mpl: host synchronizations"].values()) == 6


def test_one_line_for_a_wrong_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        bench_syncs.main(["--model", "wrn_28_3", "--out", str(tmp_path / "out.json")])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "wrn_28_3" in said
