"""NVIDIA's apex as an optional optimizer backend: detection without import, and its SGD."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

from mpl_fast.errors import ConfigError

State = Literal["usable", "without_extensions", "another_package", "absent"]
KEY = "optimizer_backend"  # the option that selects it
SOURCE = "https://github.com/NVIDIA/apex"
PROBLEMS: dict[State, str] = {
    "absent": f"needs NVIDIA's apex, which is not installed: build it from {SOURCE}",
    "another_package": "needs NVIDIA's apex, but the package named apex here is another one (the "
    f"registry's, a web toolkit): pip uninstall apex, then build NVIDIA's from {SOURCE}",
    "without_extensions": "needs apex's CUDA extensions, and the apex here was built without them: "
    f"build it with APEX_CPP_EXT=1 APEX_CUDA_EXT=1, from {SOURCE}",
}


def find() -> State:
    """What is installed under the name apex, without importing it.

    The package of that name on PyPI is an unrelated one; NVIDIA's has to be built.
    """
    spec = find_spec("apex")
    if spec is None:
        return "absent"
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if not any((folder / "optimizers" / "fused_sgd.py").is_file() for folder in folders):
        return "another_package"
    return "usable" if find_spec("amp_C") else "without_extensions"


def require() -> None:
    """Raises `ConfigError`, with the reason in one line, if apex cannot be used."""
    state = find()
    if state != "usable":
        raise ConfigError(f"{KEY} apex {PROBLEMS[state]}; or take torch, which computes the same")
    if not torch.cuda.is_available():
        raise ConfigError(f"{KEY} apex needs a CUDA device: take torch, which computes the same")


def fused_sgd(
    groups: list[dict[str, Any]],
    *,
    lr: float,
    momentum: float,
    nesterov: bool,
) -> torch.optim.Optimizer:
    """apex's SGD over parameter groups on a CUDA device, each with its "weight_decay".

    It supports neither `grad_scale` nor `found_inf`: the caller clips and skips steps. Its states
    have a "momentum_buffer" like PyTorch's, which may be allocated before the first step. Raises
    `ConfigError` if apex cannot be used.
    """
    require()
    optimizers: Any = import_module("apex.optimizers")  # late: a second, and it needs CUDA
    made: torch.optim.Optimizer = optimizers.FusedSGD(
        groups, lr=lr, momentum=momentum, nesterov=nesterov
    )
    return made
