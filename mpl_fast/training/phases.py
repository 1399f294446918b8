"""The runs of a command, one after another."""

from collections.abc import Sequence
from pathlib import Path

from mpl_fast import distributed
from mpl_fast.config import RunConfig
from mpl_fast.config.run import CHECKPOINTS
from mpl_fast.data.manifest import Manifest, read_manifest
from mpl_fast.errors import PREEMPTED, ConfigError
from mpl_fast.learner import compilation
from mpl_fast.training.build import check_batches, count_classes, resolve_epochs
from mpl_fast.training.checkpoint import checkpoints_in
from mpl_fast.training.process import keep_freed_memory
from mpl_fast.training.run import Run
from mpl_fast.training.run_dir import closing, open_for
from mpl_fast.training.trial import check_training, memory_errors


def train(config: RunConfig, *later: RunConfig) -> int:
    """Trains to the end, to `stop_at` or until a signal; returns the exit code.

    The runs of `later` configs follow, each when the one before is complete. Raises `UserError` for
    what the user can correct, on every rank where it occurs.
    """
    prepared = [_prepared(one) for one in (config, *later)]
    dist_env = distributed.init(config.device, config.hang_timeout)
    if dist_env.device.type == "cpu":
        keep_freed_memory()
    for config, manifest, classes in prepared:
        check_batches(config, manifest, dist_env)
        check_training(config, classes, dist_env.world)
    code = 0
    for number, (config, manifest, classes) in enumerate(prepared):
        if number:
            compilation.release()
        run_dir = open_for(config, dist_env)
        with closing(run_dir), memory_errors(config), distributed.lost_ranks(config.run_dir):
            run = Run(config, dist_env, manifest, classes, run_dir)
            if not run.ended:
                _check_not_begun(later[number:], config)
            code = run.go()
        if not run.complete:
            break
        if prepared[number + 1 :] and any(distributed.all_gather_object(run.stop.requested)):
            run.console.print("stopped by a signal: the same command goes on with the next run")
            code = PREEMPTED
            break
        del run
    return code


def _prepared(config: RunConfig) -> tuple[RunConfig, Manifest, int]:
    """The config with its length in steps, the data, and the number of classes."""
    manifest = read_manifest(config.data.root)
    config = resolve_epochs(config, manifest)
    return config, manifest, count_classes(config, manifest)


def _check_not_begun(later: Sequence[RunConfig], config: RunConfig) -> None:
    """Raises `ConfigError` if a later run has begun from an earlier end of this one, which would go
    on."""
    starts = (one for one in later if getattr(one.algorithm, "start", None) == config.run_dir)
    for one in starts:
        if checkpoints_in(Path(one.run_dir) / CHECKPOINTS["newest"]):
            raise ConfigError(
                f"{one.run_dir} has begun from an earlier end of {config.run_dir}, which now goes "
                "on: move it to another place, or give the --patience of before"
            )
