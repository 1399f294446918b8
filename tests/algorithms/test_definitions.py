"""Steps of the algorithms are those of their definitions, metrics included."""

from dataclasses import replace

import pytest
import torch

from mpl_fast.algorithms import AlgorithmContext
from mpl_fast.algorithms.base import train_step
from mpl_fast.config import (
    AlgorithmConfig,
    ConsistencyConfig,
    FixMatchConfig,
    MetaSemiConfig,
    MPLConfig,
    RolePlayConfig,
    SMPLConfig,
    UDAConfig,
)
from tests.algorithms import definitions
from tests.algorithms.definitions import PlainLearner
from tests.algorithms.problems import PLAIN, assert_same, batch, confident, network, new

STEPS = 6
LEARNER = replace(PLAIN, lr=0.2, ema=0.9)
HEAVY = replace(LEARNER, momentum=0.9)
NESTEROV = replace(HEAVY, nesterov=True, weight_decay=0.01)
# Different in everything that a network could leave behind in a role.
FIRST, SECOND = replace(NESTEROV, warmup=3, schedule="cosine"), replace(HEAVY, lr=0.1, momentum=0.5)
CONSISTENCY = ConsistencyConfig(weight=2.0, ramp=2, temperature=0.7, threshold=0.4)
UDA = UDAConfig(learner=NESTEROV, consistency=CONSISTENCY)
FIXMATCH = FixMatchConfig(learner=NESTEROV, weight=2.0, threshold=0.42, label_smoothing=0.1)
MPL = MPLConfig(teacher=LEARNER, student=NESTEROV, consistency=CONSISTENCY, feedback_ramp=3)
EXACT = replace(MPL, feedback="exact", derivative="forward", feedback_weight=10.0)
ROLES = RolePlayConfig(teacher=FIRST, student=SECOND, consistency=CONSISTENCY, swap_every=2)
SMPL = SMPLConfig(learner=LEARNER, consistency=CONSISTENCY, feedback_weight=3.0, feedback_ramp=2)
BY_STEP = replace(SMPL, feedback="exact", derivative="forward")
METASEMI = MetaSemiConfig(learner=HEAVY, derivative="forward", weight=3.0, ramp=2, mixup=0.5)
CASES: dict[str, AlgorithmConfig] = {
    "uda": UDA,
    "uda split": replace(UDA, bn_batches="split"),
    "uda cosine": replace(UDA, consistency=replace(CONSISTENCY, measure="cosine")),
    "fixmatch": FIXMATCH,
    "fixmatch split": replace(FIXMATCH, bn_batches="split"),
    "fixmatch of all images": replace(FIXMATCH, threshold=0.0),
    "fixmatch of none": replace(FIXMATCH, threshold=1.1),
    "mpl": MPL,
    "mpl off": replace(MPL, feedback="off"),
    "mpl delayed": replace(MPL, student=replace(NESTEROV, delay_steps=2)),
    "mpl strong masked": replace(MPL, pseudo="strong", label_threshold=0.4),
    "mpl split held_out": replace(MPL, bn_batches="split", held_out=0.5),
    "mpl exact": EXACT,
    "mpl exact split masked": replace(EXACT, bn_batches="split", label_threshold=0.4),
    "mpl parity_google": replace(MPL, feedback="parity_google"),
    "mpl_roleplay": ROLES,
    "smpl off": replace(SMPL, feedback="off"),
    "smpl difference": replace(SMPL, learner=HEAVY),
    "smpl difference nesterov": replace(SMPL, learner=NESTEROV),
    "smpl exact": BY_STEP,
    "smpl exact nesterov delayed": replace(BY_STEP, learner=replace(NESTEROV, delay_steps=1)),
    "smpl exact central": replace(BY_STEP, derivative="central"),
    "metasemi": METASEMI,
    "metasemi without mixup": replace(METASEMI, mixup=0.0),
    "metasemi label_rate": replace(METASEMI, label_rate=3.0),
}


@pytest.mark.parametrize(("labeled", "unlabeled"), [(6, 5), (4, 9)])
@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_the_definition(name: str, labeled: int, unlabeled: int) -> None:
    config = CASES[name]
    context = AlgorithmContext(seed=definitions.SEED)
    algorithm = new(config, lambda: confident(network(norm=True)), steps=STEPS, context=context)
    plain = {key: PlainLearner(learner) for key, learner in algorithm.learners.items()}
    # The feedback difference has single precision.
    atol = 1e-7 if getattr(config, "feedback", "") == "difference" else 1e-12
    atol, rates = 1e-5 if "central" in name else atol, []
    for t in range(STEPS):
        data = batch(t, labeled, unlabeled)
        metrics = train_step(algorithm, data, t)
        expected = definitions.step(config, plain, data, t)
        for key, value in expected.items():
            assert metrics[key].item() == pytest.approx(value.item(), rel=2e-6, abs=2e-7), key
        for key, learner in algorithm.learners.items():
            plain[key].end_step(t)
            found = learner.network.state_dict()
            assert_same(found, plain[key].network.state_dict(), atol=atol)
            assert learner.average is not None
            averages = (list(x.parameters()) for x in (learner.average, plain[key].average))
            assert_same(next(averages), next(averages), atol=atol)
        rates.append(metrics.get("mask_rate", torch.tensor(0.5)).item())
    assert min(rates) < 1.0 or "all" in name
    assert max(rates) > 0.0 or "none" in name
