"""NVIDIA's apex, if it is installed: found without importing it, told from its namesake."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

from mpl_fast.errors import ConfigError

State = Literal["usable", "without_extensions", "another_package", "absent"]
KEY = "optimizer_backend"  # what asks for it
SOURCE = "https://github.com/NVIDIA/apex"
PROBLEMS: dict[State, str] = {
    "absent": f"needs NVIDIA's apex, which is not installed: build it from {SOURCE}",
    "another_package": "needs NVIDIA's apex, but the package named apex here is another one (the "
    f"registry's, a web toolkit): pip uninstall apex, then build NVIDIA's from {SOURCE}",
    "without_extensions": "needs apex's CUDA extensions, and the apex here was built without them: "
    f"build it with APEX_CPP_EXT=1 APEX_CUDA_EXT=1, from {SOURCE}",
}


def find() -> State:
    """What is installed under the name of apex; nothing of it is imported.

    (The registry's package of that name has nothing to do with NVIDIA's, which has to be built.)
    """
    spec = find_spec("apex")
    if spec is None:
        return "absent"
    folders = [Path(place) for place in spec.submodule_search_locations or ()]
    if not any((folder / "optimizers" / "fused_sgd.py").is_file() for folder in folders):
        return "another_package"
    return "usable" if find_spec("amp_C") else "without_extensions"


def demand() -> None:
    """Raises the one-line `ConfigError` of why apex cannot be used, if it cannot."""
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

    It knows neither `grad_scale` nor `found_inf`: clipping, and leaving a step out, are the
    caller's. "momentum_buffer" may be put into its states as zeros, as in PyTorch's. Raises
    `ConfigError` where it cannot be used.
    """
    demand()
    optimizers: Any = import_module("apex.optimizers")  # late: a second, and it needs CUDA
    made: torch.optim.Optimizer = optimizers.FusedSGD(
        groups, lr=lr, momentum=momentum, nesterov=nesterov
    )
    return made
