"""One file per algorithm; a new one is a file here, a line below and a line in `config.RECIPES`."""

from mpl_fast.algorithms.base import Algorithm, NewLearner, RunFacts
from mpl_fast.algorithms.fixmatch import FixMatch
from mpl_fast.algorithms.metasemi import MetaSemi
from mpl_fast.algorithms.mpl import MetaPseudoLabels
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
    RolePlayConfig,
    SMPLConfig,
    SupervisedConfig,
    UDAConfig,
)

__all__ = ["Algorithm", "RunFacts", "build"]


def build(
    config: AlgorithmConfig, new_learner: NewLearner, facts: RunFacts | None = None
) -> Algorithm:
    """The algorithm that a config describes; mypy proves that none is forgotten."""
    facts = facts or RunFacts()
    match config:
        case SupervisedConfig() | FinetuneConfig():
            return Supervised(config, new_learner, facts)
        case UDAConfig():
            return UDA(config, new_learner, facts)
        case FixMatchConfig():
            return FixMatch(config, new_learner, facts)
        case RolePlayConfig():  # before MPLConfig, of which it is one
            return RolePlay(config, new_learner, facts)
        case MPLConfig():
            return _mpl(config)(config, new_learner, facts)
        case SMPLConfig():
            return SelfMetaPseudoLabels(config, new_learner, facts)
        case MetaSemiConfig():
            return MetaSemi(config, new_learner, facts)


def _mpl(config: MPLConfig) -> type[MetaPseudoLabels]:
    parities = {"parity_kekmodel": Kekmodel, "parity_google": Google}
    return parities.get(config.feedback, MetaPseudoLabels)
