"""What a run prints before its first step: networks, data, disk space, and warnings."""

import shutil
from collections.abc import Iterator, Sequence

from mpl_fast import models
from mpl_fast.algorithms.base import Algorithm
from mpl_fast.algorithms.roleplay import RolePlay
from mpl_fast.config import FinetuneConfig, RunConfig
from mpl_fast.data.manifest import Manifest
from mpl_fast.data.randaugment import gray_views
from mpl_fast.distributed import DistEnv
from mpl_fast.training.checkpoint import Checkpoints
from mpl_fast.training.console import Console, quantity
from mpl_fast.training.saving import state_bytes
from mpl_fast.training.state import state_of

STALE = 0.02  # share of batch norms' initial statistics at the end of a run
PYTORCH_MOMENTUM = 0.1  # of batch norms by default


def introduce(
    config: RunConfig,
    algorithm: Algorithm,
    manifest: Manifest,
    dist_env: DistEnv,
    checkpoints: Checkpoints,
    console: Console,
    notes: Sequence[str],
    chosen: str,
) -> None:
    """Prints what is trained on what, what it needs, and warnings about it.

    `notes`: about the construction of each network. `chosen`: of `auto.resolve`.
    """
    console.print(_headline(config, algorithm, manifest, dist_env))
    _print_disk_space(config, _checkpoint_bytes(algorithm), checkpoints, console)
    for note in dict.fromkeys(notes):  # of several networks they are equal
        console.print(note)
    if isinstance(algorithm, RolePlay):
        console.print(
            "the first network begins as teacher, the second as student; they swap roles "
            f"every {algorithm.period} steps"
        )
    for warning in _warnings(config, algorithm):
        console.warn(warning)
    if chosen:
        console.print(chosen)
    if config.compile != "off":
        console.print(
            "compiling during the first steps, which takes minutes, or seconds if an earlier "
            "session has filled the cache"
        )


def _headline(
    config: RunConfig, algorithm: Algorithm, manifest: Manifest, dist_env: DistEnv
) -> str:
    """What is trained on what."""
    sizes = {models.count_parameters(one.network) for one in algorithm.learners.values()}
    return (
        f"{config.recipe} on {dist_env.world} x {dist_env.device.type} in {config.precision}: "
        f"{config.model.name}, {quantity(max(sizes))} trained parameters, "
        f"{len(manifest.classes)} classes, {config.labeled_batch} labeled + "
        f"{config.unlabeled_images} unlabeled images a step, {config.steps} steps, "
        f"run directory {config.run_dir}"
    )


def _checkpoint_bytes(algorithm: Algorithm) -> int:
    """Size of a checkpoint after the first step."""
    size = state_bytes(state_of(algorithm))
    for learner in algorithm.learners.values():
        if learner.config.optimizer == "adamw" and not learner.optimizer.state:
            size += 2 * state_bytes(learner.parameters)  # allocated in its first step
    return size


def _print_disk_space(
    config: RunConfig, size: int, checkpoints: Checkpoints, console: Console
) -> None:
    """Prints the space that checkpoints of `size` bytes will take; a warning if it is not there."""
    # One is written before the oldest is removed.
    count = config.checkpoint_keep + 1 + config.checkpoint_best
    text = f"checkpoints have {quantity(size, 'B')} each, at most {count} at a time: "
    text += quantity(count * size, "B")
    if checkpoints.rank == 0:
        free = shutil.disk_usage(checkpoints.folder).free
        text += f"; {quantity(free, 'B')} are free in {checkpoints.folder}"
        if free < (count - len(checkpoints.all())) * size:
            console.warn(f"{text}: free some space, or lower --checkpoint-keep")
            return
    console.print(text)


def _warnings(config: RunConfig, algorithm: Algorithm) -> Iterator[str]:
    """About options that do not fit together, or the length of the run."""
    learners = algorithm.learners
    strong = config.unlabeled_images or config.data.labeled_view == "strong"
    if strong and (warning := gray_views(config.data)):
        yield warning
    for what, delay in delays(algorithm).items():
        if delay >= config.steps:
            yield (
                f"{what} never moves: its delay of {delay} steps "
                f"is not over in a run of {config.steps}"
            )
    if config.model.pretrained or isinstance(config.algorithm, FinetuneConfig):
        return
    if any(one.config.trunk_delay_steps for one in learners.values()):
        yield (
            "trunk_delay_steps trains the last layer alone on random weights: it is for "
            "--model.pretrained, or recipe finetune"
        )
    network = next(iter(learners.values())).network
    momentum, share = models.initial_statistics_share(network, config.steps)
    if momentum < PYTORCH_MOMENTUM and share > STALE:
        yield (
            f"after {config.steps} steps, batch norms with a momentum of {momentum:g} still "
            f"have {share:.0%} of their initial statistics, with which the network is "
            f"evaluated: --model.norm-momentum {PYTORCH_MOMENTUM} is for short runs"
        )


def delays(algorithm: Algorithm) -> dict[str, int]:
    """Steps before networks begin to move, by what they are called."""
    learners = algorithm.learners
    found = {called(name): one.config.delay_steps for name, one in learners.items()}
    found |= {
        f"the trunk of {called(name)}": one.config.delay_steps + one.config.trunk_delay_steps
        for name, one in learners.items()
        if one.config.trunk_delay_steps
    }
    if isinstance(algorithm, RolePlay):
        found["a network as student"] = algorithm.config.student_delay_steps
    return found


def called(learner: str) -> str:
    """A learner's name in sentences: those of role playing are numbers."""
    return f"the {learner} network" if learner in ("first", "second") else f"the {learner}"
