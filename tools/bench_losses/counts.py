"""Launches and bytes without a GPU: eager ones by operation, compiled ones as generated."""

import math
import re
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tools.bench_losses import contestants, correctness
from tools.bench_losses.problems import Shape, draw

Json = dict[str, Any]
# They look at memory in another way, or take some without writing to it.
FREE = {"view", "_unsafe_view", "t", "transpose", "slice", "split", "split_with_sizes", "unsqueeze"}
FREE |= {"squeeze", "expand", "detach", "alias", "as_strided", "select", "_reshape_alias", "unbind"}
FREE |= {"permute", "empty_like", "empty", "new_empty", "new_empty_strided", "is_same_size"}
FREE |= {"lift_fresh", "scalar_tensor", "promote_types"}
# In the function that a compiled graph is run by.
_CALL = re.compile(
    r"^\s+(?:\w+ = )?(?:cpp_fused\w*|extern_kernels\.[\w.]+|torch\.ops\.[\w.]+)\(", re.M
)
MORE = {"nll_loss_backward": 1, "slice_backward": 1}  # they fill with zeros first


class Counter(TorchDispatchMode):
    """Counts what would be launched, and the bytes of its operands and results."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches, self.bytes = 0, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[-1]
        if name not in FREE:
            self.launches += 1 + MORE.get(name, 0)
            leaves = tree_leaves((args, kwargs, out))
            self.bytes += sum(_bytes(t) for t in leaves if isinstance(t, Tensor))
        return out


def _bytes(x: Tensor) -> int:
    """Of the memory that a tensor lies in; what is expanded is read from one place."""
    sizes = (n for n, step in zip(x.shape, x.stride(), strict=True) if step or n == 0)
    return math.prod(sizes) * x.element_size()


def eager(shape: Shape, name: str) -> Json:
    """What a contestant in plain PyTorch launches for a loss and its gradient."""
    call, x = contestants.build(name, shape), draw(shape, "cpu")
    with Counter() as counter:
        call(x)
    return row(shape, name, counter.launches, counter.bytes)


def compiled(shape: Shape, name: str) -> Json:
    """How many functions torch.compile makes of it for this CPU, and how many loops they hold.

    Neither is a count of a GPU's kernels: there, other things can be fused. It is checked, too.
    """
    from torch._inductor import config, metrics
    from torch._inductor.utils import run_and_get_code

    contestants.clear()
    one, call = correctness.case(shape, "cpu"), contestants.build(name, shape)
    metrics.reset()
    # What comes out of a cache is not counted; vectorized loops are counted twice, for their tails.
    # Processes that compile in parallel take longer to start than there is to compile.
    patched = {"force_disable_caches": True, "cpp.simdlen": 1, "compile_threads": 1}
    with config.patch(patched):
        error, modules = run_and_get_code(correctness.compare, one, call, name, "cpu")
    calls = sum(len(_CALL.findall(code.partition("def call(")[2])) for code in modules)
    found = row(shape, name, calls, None)
    found |= {"loops": metrics.generated_kernel_count, "error": error}
    return found | ({"wrong": error["wrong"]} if error["wrong"] else {})


def row(shape: Shape, name: str, launches: int, moved: int | None) -> Json:
    """A cell without times."""
    return {
        **shape._asdict(),
        "dtype": str(shape.dtype).removeprefix("torch."),
        "rows": shape.rows,
        "contestant": name,
        "launches": launches,
        "bytes": moved,
        "minimal_bytes": shape.minimal_bytes,
        "times_minimal": None if moved is None else moved / shape.minimal_bytes,
    }
