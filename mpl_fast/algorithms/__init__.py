"""One file per algorithm; a new one is a file here, a line below and a line in `config.RECIPES`."""

from mpl_fast.algorithms.base import Algorithm, NewLearner
from mpl_fast.algorithms.mpl import MetaPseudoLabels
from mpl_fast.algorithms.supervised import Supervised
from mpl_fast.algorithms.uda import UDA
from mpl_fast.config import AlgorithmConfig, MPLConfig, SupervisedConfig, UDAConfig

__all__ = ["Algorithm", "build"]


def build(config: AlgorithmConfig, new_learner: NewLearner) -> Algorithm:
    """The algorithm that a config describes; mypy proves that none is forgotten."""
    match config:
        case SupervisedConfig():
            return Supervised(config, new_learner)
        case UDAConfig():
            return UDA(config, new_learner)
        case MPLConfig():
            return MetaPseudoLabels(config, new_learner)
