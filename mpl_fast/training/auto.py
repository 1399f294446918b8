"""What `auto` means for the options of how a step is run: by recipe, device and machines.

All but the precision change how fast a step is, not what it computes. A run's config.yaml keeps
`auto`, so a run of GPUs can be evaluated, fine-tuned or resumed on a CPU; its checkpoints have the
precision, which a resumed run keeps.
"""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.utils._triton import has_triton_package

from mpl_fast import models
from mpl_fast.config import RunConfig
from mpl_fast.config.fields import replaced
from mpl_fast.errors import ConfigError
from mpl_fast.training.saving import State

CPUINFO = Path("/proc/cpuinfo")
PLAIN = {"grad_sync": "allreduce", "compile": "off", "cuda_graphs": "off"}


class Choice(NamedTuple):
    """A value, and why it is not the one that GPUs usually have."""

    value: str
    reason: str = ""


def resolve(config: RunConfig, device: torch.device, machines: int) -> tuple[RunConfig, str]:
    """The config of a training run without `auto` in these options, and what was chosen as text,
    which is empty where nothing was.

    Raises `ConfigError` for graphs of compiled networks that cannot be compiled.
    """
    if device.type != "cuda":
        return plain(config), ""
    chosen = []
    for option, choose in CHOICES.items():
        if getattr(config, option) == "auto":
            value, reason = choose(config, machines)
            config = replaced(config, {option: value})
            chosen.append(f"{option} {value}" + (f" ({reason})" if reason else ""))
    return config, ", ".join(chosen)


def plain(config: RunConfig) -> RunConfig:
    """The config for training on a CPU, or for evaluation alone: there compiling would take longer
    than it saves, and nothing is captured or exchanged."""
    found: RunConfig = replaced(
        config, {k: v for k, v in PLAIN.items() if getattr(config, k) == "auto"}
    )
    return found


def _grad_sync(config: RunConfig, machines: int) -> Choice:
    """The exchange overlaps with the backward pass where it takes long (docs/features.md)."""
    if machines == 1:
        return Choice("allreduce")
    if config.model.norm == "sync" and config.compile != "off":
        return Choice("allreduce", "DDP's pieces of a network cannot contain model.norm sync")
    if config.microbatches > 1:
        return Choice("allreduce", "DDP would exchange after each of the microbatches")
    if config.cuda_graphs == "step":
        return Choice("allreduce", "DDP's buckets cannot be captured in cuda_graphs step")
    return Choice("ddp")


def _compile(config: RunConfig, machines: int) -> Choice:
    if config.model.norm == "sync" and config.grad_sync == "ddp":
        reason = "model.norm sync cannot be compiled with grad_sync ddp"
    elif not has_triton_package():
        reason = "Triton is not installed"
    else:
        return Choice("default")
    if config.cuda_graphs == "model":
        raise ConfigError(
            f"cuda_graphs model is for compiled networks, but {reason}: set cuda_graphs auto"
        )
    return Choice("off", reason)


def _cuda_graphs(config: RunConfig, machines: int) -> Choice:
    reason = config.no_step_graph
    return Choice("off", reason) if reason else Choice("step")


# In this order: whether a step can be captured depends on grad_sync.
CHOICES = {"grad_sync": _grad_sync, "compile": _compile, "cuda_graphs": _cuda_graphs}


def uses_bf16(config: RunConfig, device: torch.device) -> bool:
    """Whether forward passes run under bfloat16 autocast.

    On a CPU, `auto` is bf16 with matrix units (AMX), for networks without grouped convolutions:
    where bf16 was measured to be faster. With vector instructions alone (AVX512-BF16) it was faster
    on an AMD processor and slower on an Intel one limited to them, so that `auto` is fp32 there
    (docs/benchmarks.md).
    """
    if config.precision != "auto":
        return config.precision == "bf16"
    if device.type == "cuda":
        return True
    return _has_amx() and not _has_grouped_convolutions(config.model.name)


def evaluated_in(config: RunConfig, shared: State, device: torch.device) -> RunConfig:
    """The config for evaluating a checkpoint: on a CPU, what was trained in fp32 stays so."""
    fp32 = config.precision == "auto" and shared.get("precision", "fp32") == "fp32"
    return replaced(config, {"precision": "fp32"}) if fp32 and device.type == "cpu" else config


@cache
def _has_amx() -> bool:
    """Whether the system has AMX with bfloat16. It lists no units that it does not switch on."""
    try:
        return "amx_bf16" in CPUINFO.read_text().split()
    except OSError:  # another system than Linux
        return False


@cache
def _has_grouped_convolutions(name: str) -> bool:
    with torch.device("meta"):
        network = models.build(name, classes=2)
    return any(m.groups > 1 for m in network.modules() if isinstance(m, nn.Conv2d))
