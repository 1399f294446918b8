"""Compiles networks in place, with the compiler's caches on disk for the next start."""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from mpl_fast.distributed import cores_per_rank

Mode = Literal["off", "default", "max-autotune"]
_graphs = False  # whether any compiled network replays CUDA graphs
WORKERS, MAX_WORKERS = "TORCHINDUCTOR_COMPILE_THREADS", 32
CACHES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}


def compile_in_place(
    network: nn.Module, mode: Mode, *, graphs: bool = False, ddp: bool = False
) -> None:
    """Compiles a network's `forward` for each input shape; parameters keep their names.

    `graphs`: passes replay CUDA graphs (no effect on a CPU). The caller must then call `mark_step`
    before every training step and every evaluation batch, and clone outputs that it keeps longer.
    `ddp`: DDP will average the gradients.
    """
    if mode == "off":
        return
    # Compiled whole, a network has all of its gradients at the end of its backward pass, and DDP
    # would exchange nothing before. PyTorch splits it where DDP's buckets end.
    torch._dynamo.config.optimize_ddp = ddp
    # One compilation for each mode and input shape; beyond the limit the network runs uncompiled.
    torch._dynamo.config.recompile_limit = 32
    # Dropout masks as in uncompiled code, where feedback exact takes its derivatives.
    torch._inductor.config.fallback_random = True
    # Inductor's own default is a process a core in every rank; they start with the first graph. The
    # ranks of a machine compile side by side: the keys of compiled graphs have the device's index,
    # so that ranks share Triton's kernels on disk, but no graph. If one rank compiled first, the
    # others would wait for it and then lower every graph again.
    if WORKERS not in os.environ:
        torch._inductor.config.compile_threads = min(MAX_WORKERS, cores_per_rank())
    global _graphs
    _graphs = _graphs or graphs
    network.compile(dynamic=False, mode=_inductor_mode(mode, graphs))


def _inductor_mode(mode: Mode, graphs: bool) -> str:
    """PyTorch's name of a mode, and why graphs need `mark_step`.

    With graphs, the outputs of a pass and its saved activations are in one memory pool, and a pass
    of a new generation overwrites them. Without marks PyTorch starts a generation at a compiled
    call when no backward pass is pending, and one backward pass of any network counts for all
    pending ones: the student's backward pass comes between the teacher's forward and backward
    passes, so the student's next forward pass would overwrite the teacher's activations. Once a
    step has been marked, generations start at marks only
    (`CUDAGraphTreeManager.can_start_new_generation` and `get_curr_generation` in
    torch/_inductor/cudagraph_trees.py), and the passes of a step are recorded as one path that
    preserves live tensors. In an evaluation without marks that path would grow with every batch.
    """
    if mode == "max-autotune":
        return "max-autotune" if graphs else "max-autotune-no-cudagraphs"
    return "reduce-overhead" if graphs else "default"


def mark_step() -> None:
    """Allows CUDA graphs of compiled networks to overwrite the outputs of earlier passes."""
    if _graphs and torch.cuda.is_available():
        torch.compiler.cudagraph_mark_step_begin()


@contextmanager
def on_start(callback: Callable[[], None]) -> Iterator[None]:
    """Inside, calls `callback` whenever PyTorch begins to compile."""
    handler = torch._dynamo.callback.callback_handler

    def started(_: object) -> None:
        callback()

    handler.register_start_callback(started)
    try:
        yield
    finally:
        handler.remove_start_callback(started)


def release() -> None:
    """Frees the memory of networks that are no longer referenced, of what was compiled for them
    and of their CUDA graphs."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def set_cache_dirs(folder: Path) -> None:
    """Makes the compilers cache their results in `folder`, for later processes of the run.

    Must be called before anything is compiled. Ranks may share the folder: the compilers write its
    files atomically. Folders that the user set by TORCHINDUCTOR_CACHE_DIR or TRITON_CACHE_DIR stay.
    """
    for variable, name in CACHES.items():
        if os.environ.get(variable) in (None, *_pytorch_defaults(variable)):
            os.environ[variable] = str(folder.resolve() / name)


def _pytorch_defaults(variable: str) -> list[str]:
    """What PyTorch itself writes into the variable, often while it is imported."""
    if variable == "TRITON_CACHE_DIR":
        return []
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # late: 0.1 s

    return [default_cache_dir(), str(Path(default_cache_dir()).absolute())]


def disable_timing_choices() -> None:
    """Disables autotuning by timing, whose choice may differ, and round differently, after a
    restart."""
    torch._inductor.config.deterministic = True
