"""Builds algorithm and data loaders from a config, and checks the config against the data."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mpl_fast import algorithms, models
from mpl_fast.algorithms.base import Algorithm, AlgorithmContext, Teacher
from mpl_fast.algorithms.mpl import count_held_out
from mpl_fast.batch import EvalBatches, Loader
from mpl_fast.config import LearnerConfig, MPLConfig, RunConfig, SupervisedConfig
from mpl_fast.data.loader import EvalLoader, TrainLoader
from mpl_fast.data.manifest import Manifest
from mpl_fast.distributed import DistEnv, world_size
from mpl_fast.errors import ConfigError, DataError
from mpl_fast.learner import Learner
from mpl_fast.training.auto import uses_bf16


def count_classes(
    config: RunConfig, manifest: Manifest, trained: Sequence[str] | None = None
) -> int:
    """Number of classes of the data, or of those that a checkpoint was `trained` on. Raises
    `ConfigError` if the config has another."""
    if "val" not in manifest.splits:
        raise DataError(f"{manifest.root} has no validation split: pack it with --val")
    have, wanted = len(manifest.classes if trained is None else trained), config.model.classes
    if wanted and wanted != have:
        where = manifest.root if trained is None else f"the checkpoint in {config.run_dir}"
        raise ConfigError(
            f"model.classes is {wanted} but {where} has {have} classes: set {have}, or 0"
        )
    return have


def check_batches(config: RunConfig, manifest: Manifest, dist_env: DistEnv) -> None:
    """Raises `ConfigError` for a batch size or device that the config cannot be trained with.

    Every rank needs the same number of images, and no batch may hold an image twice.
    """
    wanted = {"labeled": config.labeled_batch}
    if config.unlabeled_images:
        wanted["unlabeled"] = config.unlabeled_images
    for split, batch in wanted.items():
        records = manifest.splits[split].records
        if over := batch % dist_env.world:
            sizes = [str(n) for n in (batch - over, batch - over + dist_env.world) if n]
            raise ConfigError(
                f"{split}_batch {batch} is not divisible by {dist_env.world} ranks: "
                f"take {' or '.join(sizes)}, or another number of ranks"
            )
        if batch > records:
            raise ConfigError(
                f"{split}_batch {batch} is larger than the {records} {split} images in "
                f"{manifest.root}: lower it to {records} or less"
            )
    _check_microbatches(config, dist_env)
    if config.cuda_graphs not in ("auto", "off") and dist_env.device.type != "cuda":
        raise ConfigError(
            f"cuda_graphs is {config.cuda_graphs}, but device is {dist_env.device.type}: set auto"
        )
    algorithm, rows = config.algorithm, config.labeled_batch // dist_env.world
    if isinstance(algorithm, SupervisedConfig) and algorithm.mixup and rows % 2:
        raise ConfigError(
            f"labeled_batch {config.labeled_batch} gives a rank {rows} images, which "
            f"algorithm.mixup cannot pair: take a multiple of {2 * dist_env.world}"
        )
    if _held_out(config) and config.labeled_batch < 2 * dist_env.world:
        raise ConfigError(
            f"labeled_batch {config.labeled_batch} gives a rank one image, which "
            f"algorithm.held_out cannot share out: raise it to {2 * dist_env.world} or more"
        )


def _check_microbatches(config: RunConfig, dist_env: DistEnv) -> None:
    """Microbatches must be equal, or the mean over them would not be the mean of the batch."""
    labeled = config.labeled_batch // dist_env.world
    rows = {"labeled": labeled - count_held_out(labeled, _held_out(config))}
    if config.unlabeled_images:
        rows["unlabeled"] = config.unlabeled_images // dist_env.world
    for split, count in rows.items():
        if count % config.microbatches:
            raise ConfigError(
                f"microbatches {config.microbatches} does not divide the {count} {split} images "
                f"that a rank learns from in a step: change {split}_batch"
            )


def _held_out(config: RunConfig) -> float:
    return config.algorithm.held_out if isinstance(config.algorithm, MPLConfig) else 0.0


def build_algorithm(
    config: RunConfig,
    manifest: Manifest,
    classes: int,
    device: torch.device,
    *,
    fresh: bool = True,
    notes: list[str] | None = None,
    teacher: Teacher | None = None,
) -> Algorithm:
    """The algorithm of a resolved config with initialized networks, equal on every rank.

    `fresh`: no checkpoint will be loaded, so pretrained weights are read where the config has them;
    a sentence about them is appended to `notes` for each network. `teacher`: a fixed one, which
    training by recipe noisy_student needs.
    """
    steps_per_epoch = steps_in(1.0, config, manifest)
    context = AlgorithmContext(config.seed, steps_per_epoch, config.microbatches, teacher, classes)

    def new_learner(learner: LearnerConfig) -> Learner:
        assert config.compile != "auto" != config.cuda_graphs and config.grad_sync != "auto"
        network = build_network(
            config,
            classes,
            learner.dropout,
            drop_path=learner.drop_path,
            pretrained=config.model.pretrained if fresh else "",
            class_names=manifest.classes,
            notes=notes,
        )
        if config.model.norm == "sync" and world_size() > 1:
            network = models.synchronized(network)
        return Learner(
            network,
            learner,
            steps=config.steps,
            device=device,
            bf16=uses_bf16(config, device),
            compiled=config.compile,
            graphs=config.cuda_graphs,
            grad_sync=config.grad_sync,
        )

    torch.manual_seed(config.seed)
    return algorithms.build(config.algorithm, new_learner, context)


def build_network(
    config: RunConfig,
    classes: int,
    dropout: float = 0.0,
    *,
    drop_path: float = 0.0,
    pretrained: str = "",
    class_names: Sequence[str] = (),
    notes: list[str] | None = None,
) -> nn.Module:
    """The configured network (`models.build`); by default with random weights."""
    return models.build(
        config.model.name,
        classes,
        dropout,
        config.model.norm_momentum,
        drop_path=drop_path,
        image_size=config.data.image_size,
        pretrained=pretrained,
        class_names=class_names,
        notes=notes,
        frozen=config.model.frozen,
    )


def eval_loader(
    config: RunConfig, manifest: Manifest, dist_env: DistEnv, split: str = "val"
) -> EvalBatches:
    """Loader of this rank's images of a split, with evaluation's crop, in batches of at most as
    many as it has."""
    world, records = dist_env.world, manifest.splits[split].records
    return EvalLoader(
        config.data,
        manifest,
        batch=max(1, min(config.eval_batch // world, math.ceil(records / world))),
        rank=dist_env.rank,
        world=world,
        device=dist_env.device,
        dtype=torch.bfloat16 if uses_bf16(config, dist_env.device) else torch.float32,
        split_name=split,
    )


def steps_in(epochs: float, config: RunConfig, manifest: Manifest) -> int:
    """Steps in so many passes over the unlabeled images (labeled ones for recipes without unlabeled
    images), rounded up."""
    labeled_only = config.algorithm.labeled_only
    split = "labeled" if labeled_only else "unlabeled"
    batch = config.labeled_batch if labeled_only else config.unlabeled_batch
    return max(1, math.ceil(epochs * manifest.splits[split].records / batch))


def resolve_epochs(config: RunConfig, manifest: Manifest) -> RunConfig:
    """The config with `steps` and `eval_every` computed from epochs, where those are given."""
    steps, every = config.steps, config.eval_every
    if config.epochs:
        steps = steps_in(config.epochs, config, manifest)
    if config.eval_epochs:
        every = steps_in(config.eval_epochs, config, manifest)
    return dataclasses.replace(config, steps=steps, eval_every=every)


def train_loader(
    config: RunConfig,
    manifest: Manifest,
    dist_env: DistEnv,
    state: dict[str, Any] | None,
    began: int | None = None,
) -> Loader:
    """Endless loader of this rank's training batches, from the start or a checkpoint's `state`;
    with `began`, in a new order after so many steps, and `state` is one of another number of ranks.
    """
    return TrainLoader(
        config.data,
        manifest,
        labeled=config.labeled_batch // dist_env.world,
        unlabeled=config.unlabeled_images // dist_env.world,
        rank=dist_env.rank,
        world=dist_env.world,
        seed=config.seed,
        device=dist_env.device,
        dtype=torch.bfloat16 if uses_bf16(config, dist_env.device) else torch.float32,
        state=state,
        began=began,
    )
