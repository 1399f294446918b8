"""Compiled in place, a network computes the same; a second process takes it from the cache."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mpl_fast.learner import compilation
from mpl_fast.learner.compilation import CACHES, WORKERS, compile_in_place, set_cache_dirs
from tests.tiny_run import ROOT

# A rank of two on a machine of six cores.
PROGRAM = """
import json, os, sys
os.sched_getaffinity = lambda pid: set(range(6))
os.environ["LOCAL_WORLD_SIZE"] = "2"
from pathlib import Path
import torch
import mpl_fast.training.run  # all that a trainer has imported when it compiles
import torch._dynamo  # writes PyTorch's own choice of a folder into the environment
from torch import nn
from mpl_fast.learner.compilation import compile_in_place, set_cache_dirs
from torch._inductor.compile_worker.subproc_pool import SubprocPool

class Network(nn.Module):  # PyTorch 2.11 compiles no plain nn.Sequential in place
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, images):
        return self.head(images).relu()

workers, start = [], SubprocPool.__init__

def counted(pool, count, *given, **named):
    workers.append(count)
    start(pool, count, *given, **named)

SubprocPool.__init__ = counted
set_cache_dirs(Path(sys.argv[1]))
torch.manual_seed(0)
network = Network()
names = list(network.state_dict())
images = torch.randn(2, 3)
plain = network(images).sum().item()
compile_in_place(network, "default")
loss = network(images).sum()
loss.backward()
from torch._inductor.async_compile import AsyncCompile
AsyncCompile.warm_pool()  # as the first Triton kernel does
counters = torch._dynamo.utils.counters
print(json.dumps({
    "same": names == list(network.state_dict()), "plain": plain, "compiled": loss.item(),
    "hits": counters["aot_autograd"]["autograd_cache_hit"],
    "misses": counters["aot_autograd"]["autograd_cache_miss"],
    "workers": workers, "folder": os.environ["TORCHINDUCTOR_CACHE_DIR"],
}))
"""


def run(folder: Path) -> dict[str, Any]:
    clean = {k: v for k, v in os.environ.items() if k not in (*CACHES, WORKERS)}
    command = [sys.executable, "-c", PROGRAM, str(folder)]
    environment = clean | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_the_second_process_finds_what_the_first_one_compiled(tmp_path: Path) -> None:
    first, second = run(tmp_path / "caches"), run(tmp_path / "caches")
    assert first["folder"] == second["folder"] == str(tmp_path / "caches" / "inductor")
    assert (first["hits"], first["misses"]) == (0, 1)
    assert (second["hits"], second["misses"]) == (1, 0)
    assert first["workers"] == second["workers"] == [3]  # in one pool, the cores of a rank
    assert first["same"]
    assert first["compiled"] == pytest.approx(first["plain"], rel=1e-5)
    assert second["compiled"] == first["compiled"]


def test_a_cache_folder_of_the_user_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    set_cache_dirs(tmp_path / "run")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "mine")
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "run" / "triton")


@pytest.mark.parametrize(
    ("mode", "graphs", "name"),
    [
        ("default", False, "default"),
        ("default", True, "reduce-overhead"),
        ("max-autotune", False, "max-autotune-no-cudagraphs"),
        ("max-autotune", True, "max-autotune"),
    ],
)
def test_pytorch_knows_the_modes_and_graphs_are_on_only_if_asked_for(
    mode: compilation.Mode, graphs: bool, name: str
) -> None:
    assert compilation._inductor_mode(mode, graphs) == name
    options = {} if name == "default" else torch._inductor.list_mode_options(name)
    assert options.get("triton.cudagraphs", False) is graphs


@pytest.mark.parametrize(
    ("cores", "ranks", "chosen", "workers"),
    [(12, None, None, 12), (12, "8", None, 1), (192, "8", None, 24), (96, "2", None, 32),
     (12, "2", "5", 5)],
)  # fmt: skip
def test_ranks_share_the_cores_for_compiling(
    cores: int,
    ranks: str | None,
    chosen: str | None,
    workers: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Unless the user chose the number of processes, which PyTorch reads when it is imported."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    for name, value in {"LOCAL_WORLD_SIZE": ranks, WORKERS: chosen}.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    with torch._inductor.config.patch(compile_threads=int(chosen or 32)):
        compile_in_place(nn.Linear(2, 2), "default")
        assert torch._inductor.config.compile_threads == workers


def test_off_leaves_a_network_alone() -> None:
    network = nn.Linear(2, 2)
    compile_in_place(network, "off", graphs=True)
    assert network._compiled_call_impl is None


def test_graphs_need_a_mark_once_a_backward_pass_came_between() -> None:
    """PyTorch's rules of generations, which `_inductor_mode` describes."""
    from torch._inductor import cudagraph_trees as trees

    manager = object.__new__(trees.CUDAGraphTreeManager)
    before = trees.MarkStepBox.mark_step_counter
    try:
        trees.MarkStepBox.mark_step_counter = 0
        manager.current_gen = manager.get_curr_generation() - 1  # at the next compiled call
        manager.running_forwards_with_pending_backwards = True  # the teacher's is pending
        assert not manager.can_start_new_generation()
        manager.running_forwards_with_pending_backwards = False  # the student's was run
        assert manager.can_start_new_generation()
        torch.compiler.cudagraph_mark_step_begin()
        manager.update_generation()  # the step's first pass
        assert not manager.can_start_new_generation()
        torch.compiler.cudagraph_mark_step_begin()  # the next step
        assert manager.can_start_new_generation()
    finally:
        trees.MarkStepBox.mark_step_counter = before


def test_timing_choices_can_be_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._inductor.config, "deterministic", False)
    compilation.disable_timing_choices()
    assert torch._inductor.config.deterministic
