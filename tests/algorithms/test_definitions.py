"""Steps of the algorithms are those of their definitions, metrics included."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from mpl_fast.algorithms import AlgorithmContext
from mpl_fast.algorithms.base import train_step
from mpl_fast.batch import Batch
from mpl_fast.config import (
    AlgorithmConfig,
    FixMatchConfig,
    MetaSemiConfig,
    NoisyStudentConfig,
    RolePlayConfig,
)
from tests.algorithms import definitions
from tests.algorithms.definitions import PlainLearner
from tests.algorithms.problems import (
    CLASSES,
    CONSISTENCY,
    DELAYED_TRUNK,
    DELAYED_TRUNKS,
    LEARNER,
    MPL,
    SMPL,
    VARIANTS,
    assert_same,
    batch,
    confident,
    network,
    new,
)

STEPS = 6
FIXMATCH = FixMatchConfig(learner=LEARNER)
HEAVY, NESTEROV = replace(LEARNER, nesterov=False), replace(LEARNER, weight_decay=0.05)
# Different in everything that a network could leave behind in a role.
OTHER = replace(LEARNER, lr=0.2, warmup=0, momentum=0.5, nesterov=False, ema=0.5)
UNDEFINED = {
    "supervised", "supervised mixup", "finetune", "mpl sampled", "mpl per_example",
    "mpl parity_kekmodel", "mpl held_out baseline masked", "mpl parity_google baseline",
    "mpl_roleplay",
}  # fmt: skip
CASES: dict[str, AlgorithmConfig] = {
    **{name: config for name, config in VARIANTS.items() if name not in UNDEFINED},
    "noisy_student sharpened": NoisyStudentConfig(
        learner=LEARNER, threshold=0.35, temperature=0.5, weight=3.0
    ),
    "fixmatch split": replace(FIXMATCH, bn_batches="split", threshold=0.42, label_smoothing=0.1),
    "fixmatch of all images": replace(FIXMATCH, threshold=0.0),
    "fixmatch of none": replace(FIXMATCH, threshold=1.1, weight=2.0),
    "fixmatch average soft": replace(
        FIXMATCH, targets="average", labels="soft", temperature=0.5, threshold=0.4
    ),
    "fixmatch aligned": replace(
        FIXMATCH, alignment=True, average_decay=0.6, labels="soft", threshold=0.45
    ),
    "fixmatch adaptive": replace(FIXMATCH, thresholds="adaptive", average_decay=0.8),
    "fixmatch all of it": replace(
        FIXMATCH,
        targets="average",
        alignment=True,
        thresholds="adaptive",
        average_decay=0.7,
    ),
    "mpl exact held_out strong": replace(
        MPL, feedback="exact", held_out=0.5, pseudo="strong", student=HEAVY
    ),
    "mpl exact central": replace(MPL, feedback="exact", derivative="central"),
    "mpl exact delayed trunks": DELAYED_TRUNKS,
    "mpl delayed": replace(MPL, student=replace(LEARNER, delay_steps=2)),
    "mpl strong masked": replace(MPL, pseudo="strong", label_threshold=0.4, feedback_ramp=3),
    "mpl split held_out": replace(MPL, bn_batches="split", held_out=0.5),
    "mpl_roleplay": RolePlayConfig(
        teacher=LEARNER, student=OTHER, consistency=CONSISTENCY, swap_every=2
    ),
    "smpl difference heavy ball": replace(SMPL, learner=HEAVY, feedback_ramp=2),
    "smpl exact delayed": replace(SMPL, feedback="exact", learner=replace(NESTEROV, delay_steps=1)),
    "smpl exact central": replace(SMPL, feedback="exact", derivative="central"),
    "fixmatch delayed trunk": replace(FIXMATCH, learner=DELAYED_TRUNK, threshold=0.3),
    "smpl exact delayed trunk": replace(SMPL, feedback="exact", learner=DELAYED_TRUNK),
    "metasemi delayed trunk": MetaSemiConfig(learner=DELAYED_TRUNK, label_rate=3.0),
    "metasemi mixup label_rate": MetaSemiConfig(
        learner=HEAVY, derivative="forward", mixup=0.5, label_rate=3.0, ramp=2
    ),
}


@pytest.mark.parametrize(
    ("labeled", "unlabeled", "device"),
    [(6, 5, "cpu"), (4, 9, "cpu"), pytest.param(6, 5, "cuda", marks=pytest.mark.gpu)],
)
@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_the_definition(
    name: str, labeled: int, unlabeled: int, device: str
) -> None:
    """On a GPU in float64, too, where losses are not the kernels'; the definition is computed on
    the CPU."""
    config, made = CASES[name], list[nn.Module]()

    def make() -> nn.Module:
        made.append(confident(network(norm=True)))
        return made[-1]

    algorithm = new(
        config,
        make,
        steps=STEPS,
        context=AlgorithmContext(seed=definitions.SEED, classes=CLASSES),
        device=device,
    )
    state = definitions.FixMatchState(CLASSES)
    teacher = copy.deepcopy(made[-1]).cpu()  # where it is fixed, it is made last
    plain = {key: PlainLearner(learner) for key, learner in algorithm.learners.items()}
    # The feedback difference and the averages of alignment have single precision.
    single = getattr(config, "feedback", "") == "difference" or getattr(config, "alignment", False)
    atol, rtol = 1e-7 if single else 1e-12, 2e-6
    if getattr(config, "derivative", "") == "central":
        atol, rtol = 1e-5, 1e-4
    if device == "cuda":  # sums in another order, and of mixup the float32 shares
        atol, rtol = max(atol, 1e-5 if isinstance(config, MetaSemiConfig) else 1e-9), 1e-5
    rates = []
    for t in range(STEPS):
        data = batch(t, labeled, unlabeled)
        metrics = train_step(algorithm, Batch(*(x.to(device) for x in data)), t)
        expected = definitions.step(config, plain, data, t, teacher, state)
        for key, value in expected.items():
            assert metrics[key].tolist() == pytest.approx(value.tolist(), rel=rtol, abs=2e-7), key
        for key, learner in algorithm.learners.items():
            plain[key].end_step(t)
            found = {key: value.cpu() for key, value in learner.network.state_dict().items()}
            assert_same(found, plain[key].network.state_dict(), atol=atol)
            assert learner.average is not None
            average = [parameter.cpu() for parameter in learner.average.parameters()]
            assert_same(average, list(plain[key].average.parameters()), atol=atol)
        rates.append(metrics.get("mask_rate", torch.tensor(0.5)).item())
    assert min(rates) < 1.0 or "all images" in name
    assert max(rates) > 0.0 or "of none" in name
