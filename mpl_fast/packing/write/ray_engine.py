"""Runs jobs as Ray tasks (--engine ray)."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mpl_fast.errors import UserError
from mpl_fast.packing.write.pool import Advance, Job, T

_POLL = 0.2  # seconds


def run_ray(jobs: Sequence[Job[T]], progress: Callable[[int, int], None]) -> list[T]:
    """Run all jobs as run_jobs does, on the cluster of RAY_ADDRESS or else on a local one.

    Every node needs the sources and the work folder under the same paths.
    """
    try:
        import ray  # an extra of its own, and slow to import
    except ImportError as error:
        raise UserError(
            "--engine ray: Ray is not installed; pip install 'mpl_fast[ray]'"
        ) from error
    root = str(Path(__file__).resolve().parents[3])
    try:
        ray.init(runtime_env={"env_vars": {"PYTHONPATH": root}}, logging_level=logging.WARNING)
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--engine ray: no cluster is reached or started ({reason})") from error
    try:
        # Tasks of a lost node run again elsewhere; an error of a task is final.
        task: Any = ray.remote(max_retries=3)(_run)
        pending = {task.remote(job.call): at for at, job in enumerate(jobs)}
        results: dict[int, T] = {}
        records = size = 0
        while pending:
            done, _ = ray.wait(list(pending), timeout=_POLL)
            for reference in done:
                at = pending.pop(reference)
                results[at] = _result(ray, reference)
                records, size = records + jobs[at].records, size + jobs[at].size
            progress(records, size)
    finally:
        ray.shutdown()
    return [results[at] for at in range(len(jobs))]


def _run(call: Callable[[Advance], T]) -> T:
    return call(lambda records, size: None)


def _result(ray: Any, reference: Any) -> Any:
    """Return the result of a task; its UserError is raised as such, as in the local engine."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from error
        raise
    except ray.exceptions.RayError as error:
        raise UserError(
            f"--engine ray: a task was lost ({type(error).__name__}); finished shards are "
            "kept, run the same command again"
        ) from error
