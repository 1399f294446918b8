"""Training algorithms, one file each; `build` makes the one that a config describes.

A new algorithm is a file here, a config (`mpl_fast.config.algorithms`) and a case of `build`.
"""

from typing import assert_never

from mpl_fast.algorithms.base import Algorithm, AlgorithmContext, LearnerFactory
from mpl_fast.algorithms.fixmatch import FixMatch
from mpl_fast.algorithms.metasemi import MetaSemi
from mpl_fast.algorithms.mpl import MetaPseudoLabels
from mpl_fast.algorithms.noisy_student import NoisyStudent
from mpl_fast.algorithms.parity import Google, Kekmodel
from mpl_fast.algorithms.roleplay import RolePlay
from mpl_fast.algorithms.smpl import SelfMetaPseudoLabels
from mpl_fast.algorithms.supervised import Supervised
from mpl_fast.algorithms.uda import UDA
from mpl_fast.config import (
    AlgorithmConfig,
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

__all__ = ["Algorithm", "AlgorithmContext", "LearnerFactory", "build"]


def build(
    config: AlgorithmConfig, new_learner: LearnerFactory, context: AlgorithmContext | None = None
) -> Algorithm:
    """The algorithm that `config` describes; mypy reports a config without a case."""
    context = context or AlgorithmContext()
    match config:
        case SupervisedConfig() | FinetuneConfig():
            return Supervised(config, new_learner, context)
        case UDAConfig():
            return UDA(config, new_learner, context)
        case FixMatchConfig():
            return FixMatch(config, new_learner, context)
        case NoisyStudentConfig():
            return NoisyStudent(config, new_learner, context)
        case RolePlayConfig():  # before MPLConfig, its base class
            return RolePlay(config, new_learner, context)
        case MPLConfig(feedback="parity_kekmodel"):
            return Kekmodel(config, new_learner, context)
        case MPLConfig(feedback="parity_google"):
            return Google(config, new_learner, context)
        case MPLConfig():
            return MetaPseudoLabels(config, new_learner, context)
        case SMPLConfig():
            return SelfMetaPseudoLabels(config, new_learner, context)
        case MetaSemiConfig():
            return MetaSemi(config, new_learner, context)
        case _:
            assert_never(config)
