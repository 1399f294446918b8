"""A forward pass without values, which finds a network that does not fit before a run begins."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from mpl_fast import models
from mpl_fast.config import LearnerConfig, RunConfig
from mpl_fast.config.fields import sections
from mpl_fast.errors import ConfigError
from mpl_fast.training.build import build_network
from mpl_fast.training.rows import count

# In messages of PyTorch, CUDA's libraries and DALI.
MEMORY_IS_FULL = (
    "out of memory", "allocate memory", "ALLOC_FAILED", "Can't allocate", "CUDA allocation",
    "MemoryError",
)  # fmt: skip


def check_training(config: RunConfig, classes: int, world: int) -> None:
    """Raises `ConfigError` if the network cannot train on images of this size, or not on batches as
    small as a rank has in a step, or has no stochastic depth and should."""
    rows = count(
        config.algorithm,
        config.labeled_batch // world,
        config.unlabeled_images // world,
        steps=config.steps,
        microbatches=config.microbatches,
        norm_ranks=world if config.model.norm == "sync" else 1,
    ).smallest
    failure = _failure(config, classes, rows, training=True)
    if failure and rows == 1 and not _failure(config, classes, 2, training=True):
        batches = "labeled_batch or unlabeled_batch" if config.unlabeled_images else "labeled_batch"
        raise ConfigError(
            f"model.name {config.model.name} cannot train on one image of "
            f"{config.data.image_size} pixels alone, as a step does: raise {batches} to two or "
            f"more for each rank and microbatch ({failure})"
        )
    _check(config, classes, failure)


def check_evaluation(config: RunConfig, classes: int) -> None:
    """Raises `ConfigError` if the network cannot classify images of this size."""
    _check(config, classes, _failure(config, classes, 1, training=False))


@contextmanager
def memory_errors(config: RunConfig) -> Iterator[None]:
    """Turns an error of full memory, of a GPU or of the machine, into a `ConfigError` that names
    the options to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        if any(words in text for words in MEMORY_IS_FULL):
            raise _out_of_memory(config, text) from error
        raise


def _out_of_memory(config: RunConfig, text: str) -> ConfigError:
    options = [f"lower --labeled-batch (now {config.labeled_batch})"]
    if config.unlabeled_images:
        options.append(f"lower --unlabeled-batch (now {config.unlabeled_images})")
    if not config.algorithm.whole_batch:
        options.append(f"raise --microbatches (now {config.microbatches})")
    if getattr(config.algorithm, "teacher_graph", "recompute") != "recompute":
        options.append("set --algorithm.teacher_graph recompute")
    options.append(f"lower --eval-batch (now {config.eval_batch}) if it was evaluating")
    failure = ConfigError(
        f"memory is full ({text[:120]}): {', or '.join(options)}; the same command with --dry-run "
        "prints what a step needs"
    )
    failure.alone = True  # others may have more memory
    return failure


def _check(config: RunConfig, classes: int, failure: str) -> None:
    """Raises `ConfigError` for the failure, naming another size of images if that one works."""
    if not failure:
        return
    name, side = config.model.name, config.data.image_size
    usual = models.image_size(name)
    other = replace(config, data=replace(config.data, image_size=usual))
    if usual == side or _failure(other, classes, 2, training=True):
        raise ConfigError(f"model.name {name} cannot be trained here: take another ({failure})")
    raise ConfigError(
        f"model.name {name} does not take images of {side} pixels: set data.image_size {usual}, "
        f"for which it was made, or take another network ({failure})"
    )


def _failure(config: RunConfig, classes: int, rows: int, *, training: bool) -> str:
    """Why a network of its own cannot classify `rows` images; empty if it can.

    On the meta device tensors have shapes and no values, so that any network costs little.
    """
    side = config.data.image_size
    try:
        with torch.device("meta"), torch.no_grad():
            network = build_network(config, classes, drop_path=_drop_path(config)).train(training)
            logits: Tensor = network(torch.empty(rows, 3, side, side))
    except ConfigError:  # of an unknown name, or no stochastic depth
        raise
    except Exception as error:  # of any layer of any network
        return "".join(traceback.format_exception_only(error)).splitlines()[0]
    shape = tuple(getattr(logits, "shape", ()))
    return "" if shape == (rows, classes) else f"its output is {shape}, not {(rows, classes)}"


def _drop_path(config: RunConfig) -> float:
    """The largest rate of stochastic depth of any network."""
    parts = [part for _, part in sections(config.algorithm)]
    return max(part.drop_path for part in parts if isinstance(part, LearnerConfig))
