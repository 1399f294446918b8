"""What the benchmark of the losses stands on: captures that fail, the JSON, its time, apex."""

import json
import os
import random
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tools.bench_losses import capture, others, progress

ROOT = Path(__file__).resolve().parents[1]


class PretendedDevice:
    """What torch.cuda's captures do to a process, where a failed one is left as PyTorch leaves it.

    Its random generator refuses to be used outside of a capture that never ended, the capture's
    stream stays the current one, and its memory pool stays open.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.stream, self.generator = "default", "sound"
        self.mode: int | str = 0
        self.pools: set[str] = set()
        cuda, device = torch.cuda, self
        for name, value in {
            "synchronize": lambda: None,
            "current_stream": lambda: device.stream,
            "Stream": lambda: "side",
            "set_stream": lambda stream: setattr(device, "stream", stream),
            "graph_pool_handle": lambda: "pool",
            "CUDAGraph": object,
            "current_device": lambda: 0,
            "default_generators": (self,),
            "graph": self.graph,
            "get_sync_debug_mode": lambda: device.mode,
            "set_sync_debug_mode": lambda mode: setattr(device, "mode", mode),
            "is_current_stream_capturing": lambda: device.stream == "side",
        }.items():
            patch.setattr(cuda, name, value)
        patch.setattr(torch._C, "_cuda_endAllocateToPool", self.close, raising=False)

    def graphsafe_get_state(self) -> str:
        return self.generator

    def clone_state(self) -> str:
        return "clone"

    def graphsafe_set_state(self, state: str) -> None:
        self.generator = state

    def close(self, device: int, pool: str) -> None:
        if pool not in self.pools:
            raise RuntimeError("not currently recording to this pool")
        self.pools.discard(pool)

    def graph(self, graph: object, pool: str, stream: str) -> Any:
        device = self

        class Capture:
            def __enter__(self) -> None:
                device.stream, device.generator = stream, device.generator + ", captured"
                device.pools.add(pool)

            def __exit__(self, kind: object, *_: object) -> None:
                if kind is not None:
                    raise RuntimeError("operation failed due to a previous error during capture")
                device.stream, device.generator = "default", device.generator.split(",")[0]
                device.pools.discard(pool)

        return Capture()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> PretendedDevice:
    """A pretended one."""
    return PretendedDevice(monkeypatch)


@pytest.mark.parametrize("fails", [False, True])
def test_a_capture_leaves_nothing_behind(device: PretendedDevice, fails: bool) -> None:
    inside: list[tuple[str, str]] = []

    def work() -> None:
        inside.append((device.stream, device.generator))
        if fails:
            raise RuntimeError("operation not permitted when stream is capturing")

    if fails:
        with pytest.raises(RuntimeError, match="during capture"):
            capture.captured(work)
    else:
        capture.captured(work)
    assert inside == [("side", "clone, captured")]
    assert (device.stream, device.generator, device.pools) == ("default", "sound", set())


def test_who_synchronizes_is_found_without_a_capture(device: PretendedDevice) -> None:
    def waits() -> None:
        assert device.mode == "error"
        raise RuntimeError("called a synchronizing CUDA operation")

    def fails() -> None:
        raise RuntimeError("out of memory")

    device.mode = 1
    assert "called a synchronizing CUDA operation" in capture.synchronization(waits)
    assert capture.synchronization(lambda: None) == ""
    with pytest.raises(RuntimeError, match="out of memory"):
        capture.synchronization(fails)
    assert device.mode == 1


def test_a_device_that_is_lost_is_noticed(
    device: PretendedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture.require_device("cpu")
    device.stream = "side"
    with pytest.raises(capture.DeviceLostError, match=r"unusable: .* still captured"):
        capture.require_device("cpu")
    device.stream = "default"

    def refused(*sizes: int, device: str) -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch, "rand", refused)
    with pytest.raises(capture.DeviceLostError, match="illegal memory access"):
        capture.require_device("cpu")
    monkeypatch.setattr(torch, "rand", lambda *sizes, device: torch.full(sizes, torch.nan))
    with pytest.raises(capture.DeviceLostError, match="64 ones add up to nan"):
        capture.require_device("cpu")


def test_rounds_are_of_all_in_new_order(monkeypatch: pytest.MonkeyPatch) -> None:
    from tools.bench_losses import clock

    log: list[str] = []

    def timed(work: Callable[[], Any]) -> float:
        work()
        return float(len(log))

    monkeypatch.setattr(clock, "_event_time", timed)
    works = [lambda name=name: log.append(name) for name in "abc"]
    found = clock.interleaved(works, random.Random(0), rounds=8)
    assert [len(times) for times in found] == [8, 8, 8]
    rounds = [log[n : n + 3] for n in range(0, len(log), 3)]
    assert len(rounds) == clock.WARM_ROUNDS + 8
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1
    # Each has its own times: the positions at which it ran, the warming rounds left out.
    assert found[1] == [n + 1.0 for n, name in enumerate(log) if name == "b"][clock.WARM_ROUNDS :]


def test_inputs_outgrow_the_cache_but_not_the_memory() -> None:
    from tools.bench_losses.clock import set_count

    l2 = 50 * 2**20
    assert set_count(10**6, l2) == 200  # of 211 that fill it four times
    assert set_count(10 * 10**6, l2) * 10 * 10**6 > 4 * l2
    assert set_count(139 * 10**6, l2) == 8
    assert set_count(762 * 10**6, l2) == 3  # ImageNet-21k in float32


def test_shadows_of_the_hosts_regions_are_no_launches() -> None:
    from tools.bench_losses.clock import is_launch

    def event(kind: str, shadow: bool) -> Any:
        where = types.SimpleNamespace(name=kind)
        return types.SimpleNamespace(device_type=where, is_user_annotation=shadow)

    assert is_launch(event("CUDA", False))
    assert not is_launch(event("CUDA", True))  # such as "Torch-Compiled Region"
    assert not is_launch(event("CPU", False))


@pytest.mark.slow
def test_the_command_needs_no_dali() -> None:
    """The machine with the GPU has none."""
    script = (
        "import sys\n"
        "sys.modules['nvidia.dali'] = None\n"
        "import tools.bench_kernels, tools.bench_losses.cells, tools.bench_losses.sweep\n"
        "import tools.bench_losses.step\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_json_is_whole_or_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "out.json"
    progress.write_json({"error": float("nan"), "far": (1.0, float("inf"))}, place)
    assert json.loads(place.read_text()) == {"error": "nan", "far": [1.0, "inf"]}
    synced: list[int] = []

    def fails(number: int) -> None:
        synced.append(number)
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="no space"):
        progress.write_json({"error": 1}, place)
    assert synced
    assert json.loads(place.read_text())["error"] == "nan"


def test_time_is_asked_of_what_took_it_before(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    run = progress.Progress({"skipped": []}, 100.0, lambda: None)
    with run.timed("slow"):
        now[0] = 70.0
    assert not run.allows("a second slow one", "slow")
    assert run.allows("a first of another kind", "fast")
    with run.timed("fast"):
        now[0] = 71.0
    now[0] = 98.0
    assert run.allows("a second fast one", "fast")
    assert run.result["skipped"] == ["no time: a second slow one"]


def test_apex_of_the_registry_is_not_nvidias(monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> Any:
        others.apex_cross_entropy.cache_clear()
        return others.apex_cross_entropy()

    try:
        monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))  # of Pyramid
        assert found() is None
        theirs: Callable[[], None] = lambda: None  # noqa: E731
        contrib = types.ModuleType("apex.contrib.xentropy")
        contrib.SoftmaxCrossEntropyLoss = theirs  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "apex.contrib.xentropy", contrib)
        assert found() is theirs
    finally:
        others.apex_cross_entropy.cache_clear()
