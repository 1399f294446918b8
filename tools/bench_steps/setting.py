"""What a step is measured on: a network, synthetic images that are on the device, and a recipe."""

import dataclasses
from typing import NamedTuple

import torch
from torch import nn

from mpl_fast import models
from mpl_fast.batch import Batch, image_buffer
from mpl_fast.config import (
    AlgorithmConfig,
    ConsistencyConfig,
    FixMatchConfig,
    LearnerConfig,
    MetaSemiConfig,
    MPLConfig,
    RolePlayConfig,
    SMPLConfig,
    SupervisedConfig,
    UDAConfig,
)
from mpl_fast.config.algorithms import NormBatches

SMALL = ("wrn", "shake", "convlarge")  # networks for images of 32 pixels, in 10 classes
STEPS = 10**6  # of the run that is imitated: its learning rate hardly changes

# No dropout, so that codes that draw it in another order can be compared.
_ONE = LearnerConfig(lr=0.03, warmup=0, dropout=0.0)
_AVERAGED = dataclasses.replace(_ONE, ema=0.995)
# No ramps: a CUDA graph repeats only steps that have come to rest.
_AGREE = ConsistencyConfig(weight=8.0, ramp=0)
_MPL = MPLConfig(teacher=_ONE, student=_AVERAGED, consistency=_AGREE)
RECIPES: dict[str, AlgorithmConfig] = {
    "mpl": _MPL,
    "mpl_exact": dataclasses.replace(_MPL, feedback="exact"),
    "mpl_roleplay": RolePlayConfig(teacher=_AVERAGED, student=_AVERAGED, consistency=_AGREE),
    "uda": UDAConfig(learner=_AVERAGED, consistency=_AGREE),
    "fixmatch": FixMatchConfig(learner=_AVERAGED),
    "supervised": SupervisedConfig(learner=_AVERAGED),
    "smpl": SMPLConfig(learner=_AVERAGED, consistency=_AGREE),
    "smpl_exact": SMPLConfig(learner=_AVERAGED, consistency=_AGREE, feedback="exact"),
    "metasemi": MetaSemiConfig(learner=_AVERAGED),
}
PARITY = dataclasses.replace(
    _MPL,
    teacher=dataclasses.replace(_ONE, conventions="kekmodel", max_grad_norm=1e9),
    student=dataclasses.replace(_AVERAGED, conventions="kekmodel", max_grad_norm=1e9),
    consistency=dataclasses.replace(_AGREE, ramp=5),
    feedback="parity_kekmodel",
)


class Setting(NamedTuple):
    """The sizes of a step."""

    model: str
    labeled: int  # images
    mu: int  # unlabeled images for each of them
    size: int  # pixels
    device: torch.device

    @property
    def classes(self) -> int:
        """Width of the last layer."""
        return 10 if self.model.startswith(SMALL) else 1000

    @property
    def distinct(self) -> int:
        """Images of a step, each counted once."""
        return self.labeled * (1 + self.mu)


def default_size(model: str) -> int:
    """Pixels that a network was made for."""
    return 32 if model.startswith(SMALL) else 224


def network(setting: Setting, seed: int = 0) -> nn.Module:
    """Fresh weights on the CPU; a seed gives the same ones again."""
    torch.manual_seed(seed)
    return models.build(setting.model, setting.classes)


def batch(setting: Setting, recipe: str, dtype: torch.dtype = torch.float32) -> Batch:
    """Random images as a loader hands them over; a labeled-only recipe gets as many images."""
    labeled, unlabeled = setting.labeled, setting.labeled * setting.mu
    if recipe == "supervised":
        labeled, unlabeled = setting.distinct, 0
    generator = torch.Generator().manual_seed(1)
    views = image_buffer(labeled, unlabeled, setting.size, dtype, setting.device)
    for view in views:
        view.copy_(torch.randn(view.shape, generator=generator))
    labels, truth = (
        torch.randint(setting.classes, (n,), generator=generator).to(setting.device)
        for n in (labeled, unlabeled)
    )
    return Batch(views[0], labels, views[1], views[2], truth)


def with_norm_batches(config: AlgorithmConfig, kind: NormBatches) -> AlgorithmConfig | None:
    """The recipe with its views normalized `joint` or `split`; None if it has no such choice."""
    if isinstance(config, MPLConfig | UDAConfig | FixMatchConfig):
        return dataclasses.replace(config, bn_batches=kind)
    return config if kind == "joint" else None
