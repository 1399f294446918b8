"""What a run consists of, built from its config and checked against its data."""

from typing import Any

import torch

from mpl_fast import algorithms, models
from mpl_fast.algorithms.base import Algorithm
from mpl_fast.config import LearnerConfig, RunConfig
from mpl_fast.data.loader import EvalLoader, TrainLoader
from mpl_fast.data.manifest import Manifest
from mpl_fast.distributed import Place
from mpl_fast.errors import ConfigError, DataError
from mpl_fast.learner import Learner


def count_classes(config: RunConfig, manifest: Manifest) -> int:
    """Width of the networks. Raises `ConfigError` if config and data disagree."""
    if "val" not in manifest.splits:
        raise DataError(f"{manifest.root} has no validation split: pack it with --val")
    have, wanted = len(manifest.classes), config.model.classes
    if wanted and wanted != have:
        raise ConfigError(
            f"model.classes is {wanted} but {manifest.root} has {have} classes: set {have}, or 0"
        )
    return have


def check_batches(config: RunConfig, manifest: Manifest, place: Place) -> None:
    """Every rank gets the same number of images, and no batch holds an image twice."""
    wanted = {"labeled": config.labeled_batch}
    if config.recipe != "supervised":
        wanted["unlabeled"] = config.unlabeled_batch
    for split, batch in wanted.items():
        records = manifest.splits[split].records
        if batch % place.world:
            raise ConfigError(f"{split}_batch {batch} is not divisible by {place.world} ranks")
        if batch > records:
            raise ConfigError(
                f"{split}_batch {batch} is larger than the {records} {split} images in "
                f"{manifest.root}: lower it to {records} or less"
            )


def build_algorithm(config: RunConfig, classes: int, device: torch.device) -> Algorithm:
    """The configured algorithm with freshly initialised networks, the same on every rank."""

    def new_learner(learner: LearnerConfig) -> Learner:
        model = config.model
        return Learner(
            models.build(model.name, classes, learner.dropout, model.norm_momentum),
            learner,
            steps=config.steps,
            device=device,
            bf16=uses_bf16(config, device),
            compiled=config.compile,
        )

    torch.manual_seed(config.seed)
    return algorithms.build(config.algorithm, new_learner)


def eval_loader(config: RunConfig, manifest: Manifest, place: Place) -> EvalLoader:
    """Validation images for this rank."""
    return EvalLoader(
        config.data,
        manifest,
        batch=max(1, config.eval_batch // place.world),
        rank=place.rank,
        world=place.world,
        device=place.device,
        dtype=torch.bfloat16 if uses_bf16(config, place.device) else torch.float32,
    )


def images_per_step(config: RunConfig) -> int:
    """Distinct images that one step takes, over all ranks."""
    return config.labeled_batch + (0 if config.recipe == "supervised" else config.unlabeled_batch)


def uses_bf16(config: RunConfig, device: torch.device) -> bool:
    """Whether forward passes run under bfloat16 autocast."""
    return config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")


def train_loader(
    config: RunConfig, manifest: Manifest, place: Place, state: dict[str, Any] | None
) -> TrainLoader:
    """Endless training batches for this rank, from the start or from a checkpoint's `state`."""
    unlabeled = images_per_step(config) - config.labeled_batch
    return TrainLoader(
        config.data,
        manifest,
        labeled=config.labeled_batch // place.world,
        unlabeled=unlabeled // place.world,
        rank=place.rank,
        world=place.world,
        seed=config.seed,
        device=place.device,
        dtype=torch.bfloat16 if uses_bf16(config, place.device) else torch.float32,
        state=state,
    )
