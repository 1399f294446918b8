"""All options as frozen dataclasses: name, type, default, range and --help text in one place.

Nothing here imports torch or DALI, so that ``--help`` takes no seconds. Defaults are those of the
published ImageNet-10 % run (README of google-research/meta_pseudo_labels) unless a text gives
another source.
"""

from mpl_fast.config.algorithms import (
    RECIPES,
    AlgorithmConfig,
    ConsistencyConfig,
    FinetuneConfig,
    FixMatchConfig,
    MetaSemiConfig,
    MPLConfig,
    NoisyStudentConfig,
    RolePlayConfig,
    SMPLConfig,
    SupervisedConfig,
    UDAConfig,
)
from mpl_fast.config.fields import problems
from mpl_fast.config.learner import LearnerConfig
from mpl_fast.config.run import DataConfig, ModelConfig, RunConfig

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
    "NoisyStudentConfig",
    "RolePlayConfig",
    "RunConfig",
    "SMPLConfig",
    "SupervisedConfig",
    "UDAConfig",
    "problems",
]
