"""Ways to run the same training step of a network: layout, precision, compiler, CUDA graph."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.bench_losses.capture import captured

Step = Callable[[], Tensor]
WARMUP = 3


class Contestant(NamedTuple):
    """A name, and what it stands for."""

    name: str
    channels_last: bool = True
    bf16: bool = False
    compiled: str = ""  # a mode of torch.compile
    graphed: bool = False


BASE = Contestant("eager NCHW fp32", channels_last=False)
BEST = Contestant("compile NHWC bf16", bf16=True, compiled="default")
EVERYWHERE = (
    BASE,
    Contestant("eager NHWC fp32"),
    Contestant("eager NHWC bf16", bf16=True),
    Contestant("compile NHWC fp32", compiled="default"),
    BEST,
)
GRAPH = BEST._replace(name="compile NHWC bf16, CUDA graph", graphed=True)
TUNED = Contestant("max-autotune NHWC bf16", bf16=True, compiled="max-autotune-no-cudagraphs")


def contestants(device: torch.device, *, tuned: bool) -> list[Contestant]:
    """Those of this device, the one that the others are compared with first.

    `tuned`: also one that compiles for minutes.
    """
    on_gpu = [GRAPH] if device.type == "cuda" else []
    return [*EVERYWHERE, *on_gpu, *([TUNED] if tuned else [])]


def prepared(who: Contestant, network: nn.Module, images: Tensor, labels: Tensor) -> Step:
    """Forward, cross-entropy and backward of one batch, compiled and warmed up; returns the loss.

    Takes the network over. `images` are ``(N, 3, H, W)`` float32, `labels` ``(N,)``.
    """
    layout = torch.channels_last if who.channels_last else torch.contiguous_format
    network.to(images.device, memory_format=layout).train()  # type: ignore[call-overload]
    images = images.contiguous(memory_format=layout)
    if who.compiled:
        # A break in the graph would be an error: it is part of what is claimed that there is none.
        network.compile(dynamic=False, fullgraph=True, mode=who.compiled)

    def step() -> Tensor:
        network.zero_grad(set_to_none=True)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=who.bf16):
            logits = network(images)
        loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
        return loss.detach()

    return _graphed(step) if who.graphed else step


def peak_bytes(step: Step, network: nn.Module) -> int:
    """Of the GPU's memory that a step takes, gradients included, besides weights and images."""
    network.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _graphed(step: Step) -> Step:
    """Replays the step; its gradients stay where the capture put them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARMUP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    losses: list[Tensor] = []
    graph = captured(lambda: losses.append(step()))

    def replay() -> Tensor:
        graph.replay()
        return losses[0]

    return replay
