"""CUDA graphs whose capture fails, on a simulated device, and a device that is lost."""

from typing import Any

import pytest
import torch

from tools.bench import cuda_graph


class SimulatedDevice:
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
def device(monkeypatch: pytest.MonkeyPatch) -> SimulatedDevice:
    """A simulated one."""
    return SimulatedDevice(monkeypatch)


@pytest.mark.parametrize("fails", [False, True])
def test_a_capture_leaves_nothing_behind(device: SimulatedDevice, fails: bool) -> None:
    inside: list[tuple[str, str]] = []

    def work() -> None:
        inside.append((device.stream, device.generator))
        if fails:
            raise RuntimeError("operation not permitted when stream is capturing")

    if fails:
        with pytest.raises(RuntimeError, match="during capture"):
            cuda_graph.captured(work)
    else:
        cuda_graph.captured(work)
    assert inside == [("side", "clone, captured")]
    assert (device.stream, device.generator, device.pools) == ("default", "sound", set())


def test_what_synchronizes_is_found_without_a_capture(device: SimulatedDevice) -> None:
    def waits() -> None:
        assert device.mode == "error"
        raise RuntimeError("called a synchronizing CUDA operation")

    def fails() -> None:
        raise RuntimeError("out of memory")

    device.mode = 1
    assert "called a synchronizing CUDA operation" in cuda_graph.synchronization(waits)
    assert cuda_graph.synchronization(lambda: None) == ""
    with pytest.raises(RuntimeError, match="out of memory"):
        cuda_graph.synchronization(fails)
    assert device.mode == 1


def test_a_device_that_is_lost_is_noticed(
    device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda_graph.require_device("cpu")
    device.stream = "side"
    with pytest.raises(cuda_graph.DeviceLostError, match=r"unusable: .* still captured"):
        cuda_graph.require_device("cpu")
    device.stream = "default"

    def refused(*sizes: int, device: str) -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch, "rand", refused)
    with pytest.raises(cuda_graph.DeviceLostError, match="illegal memory access"):
        cuda_graph.require_device("cpu")
    monkeypatch.setattr(torch, "rand", lambda *sizes, device: torch.full(sizes, torch.nan))
    with pytest.raises(cuda_graph.DeviceLostError, match="64 ones add up to nan"):
        cuda_graph.require_device("cpu")
