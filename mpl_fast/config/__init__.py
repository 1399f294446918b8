"""Everything that can be set, as frozen dataclasses: one place for a knob's name, default, unit and
source.

Nothing here imports torch or DALI, so that ``--help`` answers at once. Defaults are those of the
published ImageNet-10 % run (README of google-research/meta_pseudo_labels) unless a comment says
otherwise.
"""

from mpl_fast.config.algorithms import (
    ConsistencyConfig,
    FinetuneConfig,
    FixMatchConfig,
    MetaSemiConfig,
    MPLConfig,
    RolePlayConfig,
    SMPLConfig,
    SupervisedConfig,
    UDAConfig,
)
from mpl_fast.config.check import problems
from mpl_fast.config.learner import LearnerConfig
from mpl_fast.config.run import RECIPES, AlgorithmConfig, DataConfig, ModelConfig, RunConfig

__all__ = [
    "RECIPES",
    "AlgorithmConfig",
    "ConsistencyConfig",
    "DataConfig",
    "FinetuneConfig",
    "FixMatchConfig",
    "LearnerConfig",
    "MPLConfig",
    "MetaSemiConfig",
    "ModelConfig",
    "RolePlayConfig",
    "RunConfig",
    "SMPLConfig",
    "SupervisedConfig",
    "UDAConfig",
    "problems",
]
