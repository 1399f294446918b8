"""Meta Pseudo Labels whose networks change roles (after saarst/TransferMPL, --switch_mode)."""

from collections.abc import Hashable

from mpl_fast.algorithms.base import EvalEnsemble, Metrics, NewLearner, RunFacts
from mpl_fast.algorithms.mpl import MetaPseudoLabels
from mpl_fast.batch import Batch
from mpl_fast.config import RolePlayConfig
from mpl_fast.learner import Learner


class RolePlay:
    """Two networks teach each other in turn and are evaluated together.

    Learners "first" and "second" begin as teacher and as student. A learner is network, optimizer,
    schedule and average in one, so that nothing is left behind in a role. Whose turn it is follows
    from the step's number: there is nothing to resume.
    """

    def __init__(self, config: RolePlayConfig, new_learner: NewLearner, facts: RunFacts) -> None:
        self.config = config
        self.period = config.swap_every or facts.epoch
        self.game = MetaPseudoLabels(config, new_learner, facts)
        self.learners = {"first": self.game.teacher, "second": self.game.student}
        self.eval_ensemble = EvalEnsemble([*self.learners.values()], config.ensemble)
        # A moving average for each network as a student.
        self.state = {
            f"{key}/{name}": value.clone()
            for key, value in self.game.state.items()
            for name in self.learners
        }

    def roles(self, t: int) -> tuple[Learner, Learner]:
        """Teacher and student of step `t`."""
        first, second = self.learners.values()
        return (first, second) if (t // self.period) % 2 == 0 else (second, first)

    def graph_key(self, t: int) -> Hashable | None:
        self._cast(t)
        game = self.game.graph_key(t)
        return None if game is None else (game, self.game.student is self.learners["second"])

    def step(self, batch: Batch, t: int) -> Metrics:
        self._cast(t)
        return self.game.step(batch, t)

    def _cast(self, t: int) -> None:
        """Gives out the roles of a step."""
        self.game.teacher, self.game.student = self.roles(t)
        student = "second" if self.game.student is self.learners["second"] else "first"
        self.game.state = {k: self.state[f"{k}/{student}"] for k in self.game.state}
        if t < self.config.student_delay_steps:
            self.game.student.freeze()
