"""Algorithms and batches on the null GPU, and what is wrong with the work of a step on it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mpl_fast import algorithms
from mpl_fast.algorithms.base import Algorithm, AlgorithmContext
from mpl_fast.batch import Batch, image_buffer
from mpl_fast.config import AlgorithmConfig, LearnerConfig
from mpl_fast.config.run import GradientSync, Graphs
from mpl_fast.distributed import local_rank
from mpl_fast.learner import Learner
from mpl_fast.learner.compilation import Mode
from mpl_fast.models import build
from mpl_fast.models.wide_resnet import WideResNet
from tests.algorithms.problems import LEARNER, MPL, SMPL, UDA, VARIANTS
from tests.null_gpu import device
from tests.null_gpu.device import Seen

DEVICE = torch.device("cuda", local_rank())
ADAMW = replace(LEARNER, optimizer="adamw", nesterov=False)
ALL: dict[str, AlgorithmConfig] = {
    **VARIANTS,
    "uda adamw": replace(UDA, learner=ADAMW),
    "mpl split": replace(MPL, bn_batches="split"),
    "mpl exact central": replace(MPL, feedback="exact", derivative="central"),
    "mpl drop_path": replace(MPL, student=replace(LEARNER, drop_path=0.2)),
    "smpl exact central": replace(SMPL, feedback="exact", derivative="central"),
}
# What makes the host wait, what is done outside of a graph, and what would fail on a GPU.
FAULTS = ("SYNC", "REFUSED", "ESCAPED", "HOSTALLOC")


def one_block() -> nn.Module:
    """`wrn_10_1` with one of its three blocks: there is less to compile."""
    network = build("wrn_10_1", 10, dropout=0.1)
    assert isinstance(network, WideResNet)
    network.blocks = network.blocks[2:]
    network.stem = nn.Conv2d(3, 32, 3, padding=1, bias=False)
    return network


def new(
    config: AlgorithmConfig,
    *,
    network: Callable[[], nn.Module] | None = None,
    model: str = "wrn_10_1",
    classes: int = 10,
    bf16: bool = True,
    compiled: Mode = "off",
    graphs: Graphs = "off",
    grad_sync: GradientSync = "allreduce",
    context: AlgorithmContext | None = None,
) -> Algorithm:
    """An algorithm whose networks have dropout."""

    def learner(chosen: LearnerConfig) -> Learner:
        return Learner(
            network()
            if network
            else build(model, classes, dropout=0.1, drop_path=chosen.drop_path),
            chosen,
            steps=100,
            device=DEVICE,
            bf16=bf16,
            compiled=compiled,
            graphs=graphs,
            grad_sync=grad_sync,
        )

    context = replace(context or AlgorithmContext(), classes=classes)
    return algorithms.build(config, learner, context)


def batch(labeled: int = 8, unlabeled: int = 32, size: int = 32, *, bf16: bool = True) -> Batch:
    """Images in the memory layout of the loader's."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    images, weak, strong = image_buffer(labeled, unlabeled, size, dtype, DEVICE)
    labels, truth = (
        torch.zeros(rows, dtype=torch.int64, device=DEVICE) for rows in (labeled, unlabeled)
    )
    return Batch(images, labels, weak, strong, truth)


def watched(work: Callable[[], object]) -> tuple[list[str], Seen]:
    """Runs some work that must not make the host wait. Returns what was wrong, and all it did."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    device.watch()
    faults = []
    try:
        work()
    except Exception as error:  # of any layer: it is part of what is found
        faults.append(f"{type(error).__name__}: {error}".splitlines()[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    seen = device.seen()
    copies = [line for line in seen.log if "MEMCPY" in line and "pageable" in line]
    return [*faults, *seen.lines(*FAULTS), *copies], seen


class _Mixed(TorchDispatchMode):
    """Names the operators that are given tensors of both CPU and GPU. PyTorch lets 0-dim ones of
    the CPU pass, but a graph repeats the value that they had."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if len({tensor.is_cuda for tensor in tensors}) > 1:
            self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def mixed(work: Callable[[], object]) -> list[str]:
    """Operators of some work that mix devices."""
    with _Mixed() as found:
        work()
    return [f"mixes devices: {name}" for name in sorted(found.names)]
