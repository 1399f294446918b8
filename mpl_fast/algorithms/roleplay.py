"""Meta Pseudo Labels whose two networks swap roles (after saarst/TransferMPL, --switch_mode)."""

from collections.abc import Hashable

from mpl_fast.algorithms.base import AlgorithmContext, EvalEnsemble, LearnerFactory, Metrics
from mpl_fast.algorithms.mpl import MetaPseudoLabels
from mpl_fast.batch import Batch
from mpl_fast.config import RolePlayConfig


class RolePlay:
    """Two networks are teacher and student by turns, and are evaluated as an ensemble.

    The learners "first" and "second" begin as teacher and as student. A learner holds network,
    optimizer, schedule and average, so all of them change roles together. The roles are a function
    of the step's number, so there is nothing to resume.
    """

    def __init__(
        self, config: RolePlayConfig, new_learner: LearnerFactory, context: AlgorithmContext
    ) -> None:
        self.config = config
        self.period = config.swap_every or context.steps_per_epoch
        self.mpl = MetaPseudoLabels(config, new_learner, context)
        self.learners = {"first": self.mpl.teacher, "second": self.mpl.student}
        self.eval_ensemble = EvalEnsemble([*self.learners.values()], config.ensemble)
        # Each network has its own moving averages for its time as the student.
        self.state = {
            f"{key}/{name}": value.clone()
            for key, value in self.mpl.state.items()
            for name in self.learners
        }

    def graph_key(self, t: int) -> Hashable | None:
        self._assign_roles(t)
        key = self.mpl.graph_key(t)
        return None if key is None else (key, self.mpl.student is self.learners["second"])

    def step(self, batch: Batch, t: int) -> Metrics:
        self._assign_roles(t)
        return self.mpl.step(batch, t)

    def _assign_roles(self, t: int) -> None:
        swapped = (t // self.period) % 2 == 1
        teacher, student = ("second", "first") if swapped else ("first", "second")
        self.mpl.teacher, self.mpl.student = self.learners[teacher], self.learners[student]
        self.mpl.state = {key: self.state[f"{key}/{student}"] for key in self.mpl.state}
        if t < self.config.student_delay_steps:
            self.mpl.student.freeze()
