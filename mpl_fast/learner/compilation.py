"""How networks are compiled: in place, with what is compiled kept on disk for the next start."""

import os
from pathlib import Path
from typing import Literal

import torch
from torch import nn

Mode = Literal["off", "default", "max-autotune"]
_graphs = False  # whether any network replays graphs
CACHES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}


def compile_in_place(network: nn.Module, mode: Mode, *, graphs: bool = False) -> None:
    """Compiles a network's `forward` for the shapes that it meets; parameters keep their names.

    `graphs` lets every pass replay CUDA graphs (nothing, on a CPU). Whoever runs such a network
    calls `mark_step` before every training step and before every
    evaluation batch, and clones what it keeps of an output beyond that.
    """
    if mode == "off":
        return
    # Otherwise DDP's bucket boundaries would split the network into several graphs.
    torch._dynamo.config.optimize_ddp = False
    # A form for each mode and shape that a recipe calls it in; past the limit it runs uncompiled.
    torch._dynamo.config.recompile_limit = 32
    # Dropout as uncompiled code draws it, or exact feedback would follow another mask's student.
    torch._inductor.config.fallback_random = True
    global _graphs
    _graphs = _graphs or graphs
    network.compile(dynamic=False, mode=_inductor_mode(mode, graphs))


def _inductor_mode(mode: Mode, graphs: bool) -> str:
    """PyTorch's name for it.

    With graphs, a pass's outputs and what its backward pass needs lie in one memory pool, and a
    pass of a new generation overwrites them. PyTorch begins a generation by itself at a compiled
    call when no backward pass is owed, and takes one backward pass of anybody for the payment of
    all: the student's backward pass comes between the teacher's forward and backward ones, so that
    the next judging of the student would overwrite what the teacher still needs. Once a step has
    been marked, generations begin at marks alone
    (`CUDAGraphTreeManager.can_start_new_generation` and `get_curr_generation` in
    torch/_inductor/cudagraph_trees.py), and the passes of a step are recorded as one path that
    keeps what is alive. In an evaluation without marks that path would grow with every batch.
    """
    if mode == "max-autotune":
        return "max-autotune" if graphs else "max-autotune-no-cudagraphs"
    return "reduce-overhead" if graphs else "default"


def mark_step() -> None:
    """Tells CUDA graphs of compiled networks that outputs of earlier passes are not needed."""
    if _graphs and torch.cuda.is_available():
        torch.compiler.cudagraph_mark_step_begin()


def keep_caches(folder: Path) -> None:
    """Makes this process keep compiled kernels in `folder`, where the next one finds them.

    To be called before anything is compiled; ranks may share the folder, for files in it appear
    whole. A place that the user chose by TORCHINDUCTOR_CACHE_DIR or TRITON_CACHE_DIR stays.
    """
    for variable, name in CACHES.items():
        if os.environ.get(variable) in (None, *_pytorchs_own(variable)):
            os.environ[variable] = str(folder.resolve() / name)


def _pytorchs_own(variable: str) -> list[str]:
    """The place that PyTorch writes into the environment by itself, often while it is imported."""
    if variable == "TRITON_CACHE_DIR":
        return []
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # late: 0.1 s

    return [default_cache_dir(), str(Path(default_cache_dir()).absolute())]


def deterministic() -> None:
    """Lets nothing be chosen by timing it: another choice may round differently after a restart."""
    torch._inductor.config.deterministic = True
