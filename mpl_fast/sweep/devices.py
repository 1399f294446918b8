"""The GPUs, or the shares of the CPU cores, that trials run on at the same time."""

import os
import shutil
import subprocess

from mpl_fast.config import RunConfig
from mpl_fast.errors import ConfigError
from mpl_fast.first_few import counted


def slots(config: RunConfig, ranks: int, jobs: int, trials: int) -> list[dict[str, str]]:
    """The environment of each trial that runs at a time: its GPUs and its CPU threads.

    A trial has `ranks` GPUs, or CPU cores where there is no GPU. `jobs` is how many trials run at
    a time; 0: as many of the `trials` as there are GPUs or cores for. Raises `ConfigError` for
    more.
    """
    gpus = [] if config.device == "cpu" else visible_gpus()
    cores = len(os.sched_getaffinity(0))
    what, have = ("GPU", len(gpus)) if gpus else ("CPU core", cores)
    if config.device == "cuda" and not gpus:
        raise ConfigError("device is cuda, but no GPU is visible: give --device cpu")
    most = have // ranks
    if gpus and not most:
        raise ConfigError(
            f"--ranks-per-trial {ranks} needs as many GPUs, there are {have}: lower it to {have}"
        )
    jobs = jobs or max(1, min(most, trials))
    if jobs > max(1, most):
        raise ConfigError(
            f"--jobs {jobs} with {counted(ranks, 'rank')} each is more than {counted(have, what)}: "
            f"give {max(1, most)} or auto"
        )
    share = str(max(1, cores // (jobs * ranks)))
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", share)}
    if not gpus:
        return [threads] * jobs
    groups = (gpus[job * ranks : (job + 1) * ranks] for job in range(jobs))
    return [threads | {"CUDA_VISIBLE_DEVICES": ",".join(group)} for group in groups]


def visible_gpus() -> list[str]:
    """The GPUs of this machine as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip() not in ("", "-1")]
    command = shutil.which("nvidia-smi")
    if not command:
        return []
    listed = subprocess.run([command, "-L"], capture_output=True, text=True, check=False)
    return [str(number) for number, _ in enumerate(listed.stdout.splitlines())]
