"""Runs shard jobs as Ray tasks (--engine ray)."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpl_fast.errors import UserError
from mpl_fast.packing.options import ImageOptions
from mpl_fast.packing.write.shard_receipt import Remark
from mpl_fast.packing.write.workers import Jobs, run_job

_POLL = 0.2  # seconds


def run_ray(jobs: Jobs, progress: Callable[[int, int], None]) -> list[list[Remark]]:
    """Run all jobs as Ray tasks, on the cluster of RAY_ADDRESS or else on a local one.

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
        task = ray.remote(max_retries=3)(_ray_job)
        pending = {
            task.remote(jobs.work, shard.number, jobs.image_options, jobs.read_threads): shard
            for shard in jobs.shards
        }
        remarks: dict[int, list[Remark]] = {}
        images = size = 0
        while pending:
            done, _ = ray.wait(list(pending), timeout=_POLL)
            for reference in done:
                shard = pending.pop(reference)
                remarks[shard.number] = _ray_result(ray, reference)
                images, size = images + shard.records, size + shard.bytes
            progress(images, size)
    finally:
        ray.shutdown()
    return [remarks[shard.number] for shard in jobs.shards]


def _ray_job(
    work: Path, number: int, image_options: ImageOptions, read_threads: int
) -> list[Remark]:
    return run_job(work, number, image_options, read_threads, lambda images, size: None)


def _ray_result(ray: Any, reference: Any) -> list[Remark]:
    """Return the result of a task; its UserError is raised as such, as in the local engine."""
    try:
        result: list[Remark] = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from error
        raise
    except ray.exceptions.RayError as error:
        raise UserError(
            f"--engine ray: a task was lost ({type(error).__name__}); finished shards are "
            "kept, run the same command again"
        ) from error
    return result
