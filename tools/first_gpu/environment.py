"""Prints the machine as JSON: GPU, driver, versions, missing packages; exit code 2 without GPU."""

import json
import os
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch

from mpl_fast.errors import ConfigError, run_command
from tools.bench.machine import describe, output_of

# Of setup.py and of the tests, by the names under which they are imported.
NEEDED = (
    "triton", "nvidia.dali", "numpy", "tensorboardX", "timm", "yaml", "simplejpeg", "cv2",
    "pytest", "hypothesis", "scipy", "sklearn", "PIL",
)  # fmt: skip
OPTIONAL = ("torchvision", "liger_kernel", "spdl", "apex", "matplotlib", "pyarrow")
PREFIXES = ("CUDA", "CUBLAS", "CUDNN", "NCCL", "NVIDIA", "PYTORCH", "TORCH", "TRITON", "OMP")


def main(commit: str | None = None) -> int:
    """Raises `ConfigError` if there is no GPU."""
    if not torch.cuda.is_available():
        raise ConfigError(
            f"PyTorch {torch.__version__} finds no GPU: run this where nvidia-smi shows one, with "
            "a PyTorch that is built for CUDA"
        )
    print(json.dumps(environment(commit, os.environ), indent=1))
    return 0


def environment(commit: str | None, variables: Mapping[str, str]) -> dict[str, Any]:
    """What `tools.bench.machine.describe` finds, and more of the GPU and of the packages."""
    properties = torch.cuda.get_device_properties(0)
    return {
        **describe(commit),
        "gpus": torch.cuda.device_count(),
        "compute_capability": [properties.major, properties.minor],
        "cudnn": torch.backends.cudnn.version(),
        "nccl": [*torch.cuda.nccl.version()],
        "built_for": torch.cuda.get_arch_list(),
        "missing": [name for name in NEEDED if not installed(name)],
        "optional_missing": [name for name in OPTIONAL if not installed(name)],
        "variables": {k: v for k, v in sorted(variables.items()) if k.startswith(PREFIXES)},
        "nvidia_smi": output_of("nvidia-smi").splitlines(),
    }


def installed(name: str) -> bool:
    """Whether a module can be found; `name` may be within a package."""
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # its package
        return False


if __name__ == "__main__":
    run_command("first_gpu_run", lambda: main(*sys.argv[1:]))
