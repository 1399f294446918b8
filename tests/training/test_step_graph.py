"""What a CUDA graph of a step repeats is the step: shown on a CPU by repeating its Python.

The stand-in for a graph calls the step again with the images, the random numbers and the step's
number that it was made with; a step that depends on its number in any other way is found out.
"""

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import pytest
import torch

from mpl_fast.algorithms.base import Algorithm, Metrics, train_step
from mpl_fast.algorithms.uda import UDA
from mpl_fast.batch import Batch
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
from mpl_fast.config.run import Graphs
from mpl_fast.training.step_graph import WARMUP, Replay, StepGraph
from tests.algorithms import problems
from tests.algorithms.problems import assert_same

LEARNER = LearnerConfig(lr=0.1, warmup=4, ema=0.9, dropout=0.0, max_grad_norm=1.0)
LATE = replace(LEARNER, delay_steps=9, warmup=2)
TRUNK = replace(LEARNER, trunk_delay_steps=8)
CONSISTENCY = ConsistencyConfig(weight=2.0, ramp=3)
MPL = MPLConfig(teacher=LEARNER, student=LEARNER, consistency=CONSISTENCY, feedback_ramp=5)
ADAM = replace(LEARNER, optimizer="adamw", nesterov=False)
CONFIGS: dict[str, AlgorithmConfig] = {
    "supervised": SupervisedConfig(learner=LEARNER),
    "mixup": SupervisedConfig(learner=LEARNER, mixup=1.0),
    "fixmatch": FixMatchConfig(learner=LEARNER, threshold=0.3),
    "uda": UDAConfig(learner=LEARNER, consistency=CONSISTENCY),
    "adamw": UDAConfig(learner=ADAM, consistency=CONSISTENCY),
    "mpl": MPL,
    "mpl off split": replace(MPL, feedback="off", bn_batches="split"),
    "mpl sampled baseline": replace(MPL, feedback="sampled", baseline=0.9),
    "mpl late student": replace(MPL, student=LATE, held_out=0.5),
    "roleplay": RolePlayConfig(
        teacher=LEARNER,
        student=LEARNER,
        consistency=CONSISTENCY,
        swap_every=4,
        student_delay_steps=9,
    ),
    "mpl trunks": replace(MPL, teacher=TRUNK, student=replace(TRUNK, trunk_delay_steps=12)),
    "adamw trunk": UDAConfig(learner=replace(TRUNK, optimizer="adamw"), consistency=CONSISTENCY),
    "smpl": SMPLConfig(learner=LEARNER, consistency=CONSISTENCY),
}
STEPS = 26


def batch(seed: int) -> Batch:
    return problems.batch(seed, 4, 6)


class Repeats:
    """The stand-in for a graph, which counts its captures and replays."""

    def __init__(self) -> None:
        self.made, self.replayed = 0, 0

    def __call__(self, work: Replay) -> Replay:
        self.made += 1

        def replay() -> Metrics:
            self.replayed += 1
            return work()

        return replay


def new(config: AlgorithmConfig, graphs: Graphs) -> Algorithm:
    return problems.new(
        config, lambda: problems.network(norm=True, dropout=0.3), steps=STEPS, graphs=graphs
    )


def trained(algorithm: Algorithm, graph: StepGraph | None) -> tuple[Any, list[dict[str, Any]]]:
    torch.manual_seed(1)
    metrics = []
    for t in range(STEPS):
        row = train_step(algorithm, batch(t), t, graph.step if graph else None)
        metrics.append({name: value.tolist() for name, value in row.items()})
    return problems.state(algorithm), metrics


@pytest.mark.parametrize("name", CONFIGS)
def test_repeated_steps_are_the_steps(name: str) -> None:
    plain, graphed, repeats = new(CONFIGS[name], "off"), new(CONFIGS[name], "step"), Repeats()
    state, metrics = trained(plain, None)
    graphed_state, graphed_metrics = trained(graphed, StepGraph(graphed, repeats))
    assert graphed_metrics == metrics
    assert_same(graphed_state, state, ignore=("capturable",))  # an option
    keys = {"roleplay": 3, "mpl late student": 2, "mpl trunks": 2, "adamw trunk": 2}.get(name, 1)
    assert repeats.made == keys
    assert repeats.replayed >= STEPS - 9 - keys * WARMUP


def test_a_step_that_still_changes_would_be_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above can fail: with a graph_key that ends a ramp too early."""

    def early(self: object, t: int) -> Hashable:
        return ""

    monkeypatch.setattr(UDA, "graph_key", early)
    slow = replace(CONSISTENCY, ramp=20)
    config = UDAConfig(learner=LEARNER, consistency=slow)
    plain, graphed = new(config, "off"), new(config, "step")
    _, metrics = trained(plain, None)
    _, graphed_metrics = trained(graphed, StepGraph(graphed, Repeats()))
    assert graphed_metrics != metrics


def test_no_graph_is_made_of_what_none_can_repeat() -> None:
    for config in (
        MetaSemiConfig(learner=LEARNER),
        replace(MPL, feedback="exact"),
        replace(MPL, teacher_graph="recompute"),
        replace(MPL, feedback="parity_kekmodel"),
    ):
        algorithm, repeats = new(config, "step"), Repeats()
        trained(algorithm, StepGraph(algorithm, repeats))
        assert repeats.made == 0


def test_what_a_step_moves_stays_where_it_is() -> None:
    algorithm = new(MPL, "step")
    places = []
    for t in range(3):
        train_step(algorithm, batch(t), t)
        learners = algorithm.learners.values()
        tensors = [x for n in learners for x in (*n.network.state_dict().values(), n.skipped)]
        tensors += [x for n in learners for s in n.optimizer.state.values() for x in s.values()]
        tensors += [n.optimizer.param_groups[0]["lr"] for n in learners]
        places.append([x.data_ptr() for x in tensors])
    assert places[0] == places[1] == places[2]
