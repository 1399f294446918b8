"""For every Python process of `tests.null_gpu.first_run`, which puts this folder on its path.

The null GPU has no kernels of DALI and no CUPTI, and what the host reads of its memory was never
computed: functions that need them are replaced when their module has been imported, as
`tests.null_gpu.trainer` does for one process.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def _torch(_torch: Any) -> None:
    import tests.null_gpu.device  # noqa: F401  # cuDNN's operators


def _profiler(profiler: Any) -> None:
    without = profiler.profile

    def profile(*given: Any, activities: Any = None, **named: Any) -> Any:
        return without(*given, activities=[profiler.ProfilerActivity.CPU], **named)

    profiler.profile = profile


def _loader(loader: Any) -> None:
    loader.dali_gpu = lambda config, device: None


def _metrics(metrics: Any) -> None:
    from tests.null_gpu.device import zeros_on_host

    row = metrics._row
    metrics._row = lambda pending: row(pending._replace(values=zeros_on_host(pending.values)))


def _evaluate(evaluate: Any) -> None:
    from tests.null_gpu.device import no_hits

    evaluate._hits = no_hits


def _learner(learner: Any) -> None:
    from tests.null_gpu.device import always_finite

    learner.Learner.finite = always_finite


AFTER: dict[str, Callable[[Any], None]] = {
    "torch": _torch,
    "torch.profiler": _profiler,
    "mpl_fast.data.loader": _loader,
    "mpl_fast.training.metrics": _metrics,
    "mpl_fast.training.evaluate": _evaluate,
    "mpl_fast.learner.learner": _learner,
}


class _Replacing(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in AFTER:
            return None
        replace = AFTER.pop(name)
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return None
        loader: Loader = spec.loader
        executes = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            executes(module)
            replace(module)

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Replacing())
