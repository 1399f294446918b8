"""What makes a run repeatable: seeds, deterministic kernels, and the generators' states."""

import os
import random
from typing import Any

import torch

from mpl_fast import compilation
from mpl_fast.config import RunConfig
from mpl_fast.distributed import Place


def prepare(config: RunConfig, place: Place) -> None:
    """Precision, determinism and this rank's random generator."""
    torch.backends.cuda.matmul.allow_tf32 = (
        torch.backends.cudnn.allow_tf32
    ) = not config.deterministic
    torch.backends.cudnn.benchmark = not config.deterministic
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        if config.compile != "off":
            compilation.deterministic()
    torch.manual_seed(config.seed * 1_000_003 + place.rank + 1)  # dropout differs between ranks


def state() -> dict[str, Any]:
    """Of every generator that training draws from on this rank (DALI keeps its own)."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return {"torch": torch.get_rng_state(), "cuda": cuda, "python": random.getstate()}


def restore(saved: dict[str, Any]) -> None:
    """Sets the generators to what `state` gave."""
    torch.set_rng_state(saved["torch"])
    if saved["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["cuda"])
    random.setstate(saved["python"])
