"""The machine and the versions that a measurement of the losses was made with."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from tools.bench import machine
from tools.bench_losses.others import apex_cross_entropy


def describe(commit: str | None) -> dict[str, Any]:
    """What can be found out; `commit` where there is no git to ask."""
    found = machine.describe(commit)
    found |= found.pop("versions")
    found |= {"liger_kernel": _liger(), "apex": "installed" if apex_cross_entropy() else None}
    if torch.cuda.is_available():
        found["l2_bytes"] = torch.cuda.get_device_properties(0).L2_cache_size
    return found


def _liger() -> str | None:
    try:
        return version("liger-kernel")
    except PackageNotFoundError:
        return None
