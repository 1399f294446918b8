"""Small problems for tests: batches, networks, a config of each variant, comparisons of states."""

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor, nn

from mpl_fast import algorithms
from mpl_fast.algorithms import Algorithm, AlgorithmContext
from mpl_fast.algorithms.mpl import MetaPseudoLabels
from mpl_fast.batch import Batch
from mpl_fast.config import (
    AlgorithmConfig,
    ConsistencyConfig,
    FinetuneConfig,
    FixMatchConfig,
    LearnerConfig,
    MetaSemiConfig,
    MPLConfig,
    NoisyStudentConfig,
    RolePlayConfig,
    SMPLConfig,
    SupervisedConfig,
    UDAConfig,
)
from mpl_fast.config.run import Graphs
from mpl_fast.learner import Learner
from mpl_fast.learner.compilation import Mode

CLASSES = 4
# Plain SGD: a step is the rate times the gradient.
PLAIN = LearnerConfig(
    lr=1.0,
    momentum=0.0,
    nesterov=False,
    weight_decay=0.0,
    max_grad_norm=0.0,
    warmup=0,
    schedule="constant",
    dropout=0.0,
)
STUDENT = replace(PLAIN, lr=0.2)
NESTEROV = replace(STUDENT, momentum=0.9, nesterov=True, weight_decay=0.01)
FEEDBACKS: list[Any] = list(get_args(get_type_hints(MPLConfig)["feedback"]))

LEARNER = LearnerConfig(lr=0.1, warmup=2, ema=0.9, dropout=0.0, max_grad_norm=1.0)
CONSISTENCY = ConsistencyConfig(weight=2.0, ramp=3, temperature=0.7, threshold=0.5)
MPL = MPLConfig(teacher=LEARNER, student=LEARNER, consistency=CONSISTENCY)
SMPL = SMPLConfig(learner=LEARNER, consistency=CONSISTENCY)
UDA = UDAConfig(learner=LEARNER, consistency=CONSISTENCY)
# The first word of a name is the recipe.
VARIANTS: dict[str, AlgorithmConfig] = {
    "supervised": SupervisedConfig(learner=LEARNER),
    "supervised mixup": SupervisedConfig(learner=LEARNER, mixup=1.0),
    "finetune": FinetuneConfig(learner=LEARNER, label_smoothing=0.1),
    "uda": UDA,
    "uda cosine": replace(UDA, consistency=replace(CONSISTENCY, measure="cosine")),
    "uda split": replace(UDA, bn_batches="split"),
    "fixmatch": FixMatchConfig(learner=LEARNER, threshold=0.3),
    "fixmatch adaptive": FixMatchConfig(
        learner=LEARNER, targets="average", alignment=True, thresholds="adaptive", labels="soft"
    ),
    "noisy_student": NoisyStudentConfig(learner=LEARNER, threshold=0.4),
    "noisy_student argmax": NoisyStudentConfig(learner=LEARNER, labels="argmax", threshold=0.4),
    **{f"mpl {feedback}": replace(MPL, feedback=feedback) for feedback in FEEDBACKS},
    "mpl held_out baseline masked": replace(MPL, baseline=0.9, held_out=0.5, label_threshold=0.3),
    "mpl exact masked": replace(MPL, feedback="exact", label_threshold=0.3, feedback_weight=10.0),
    "mpl exact split recompute": replace(
        MPL, feedback="exact", bn_batches="split", teacher_graph="recompute", label_threshold=0.3
    ),
    "mpl parity_google baseline": replace(MPL, feedback="parity_google", baseline=0.9),
    "mpl_roleplay": RolePlayConfig(
        teacher=LEARNER,
        student=LEARNER,
        consistency=CONSISTENCY,
        swap_every=3,
        student_delay_steps=1,
    ),
    **{f"smpl {f}": replace(SMPL, feedback=f) for f in ("off", "difference", "exact")},
    "metasemi": MetaSemiConfig(learner=LEARNER),
    "metasemi plain": MetaSemiConfig(learner=LEARNER, mixup=0.0, derivative="forward"),
}
# For networks with a classifier.
DELAYED_TRUNK = replace(LEARNER, warmup=0, delay_steps=1, trunk_delay_steps=2)
DELAYED_TRUNKS = replace(MPL, feedback="exact", teacher=DELAYED_TRUNK, student=DELAYED_TRUNK)


def batch(
    seed: int = 0,
    labeled: int = 6,
    unlabeled: int = 5,
    shape: tuple[int, ...] = (3, 6, 6),
    *,
    classes: int = CLASSES,
) -> Batch:
    """Normal float64 images; the strong views are the weak ones with noise."""
    g = torch.Generator().manual_seed(seed)
    images = torch.randn(labeled + unlabeled, *shape, generator=g, dtype=torch.float64)
    labels = torch.randint(classes, (labeled + unlabeled,), generator=g)
    weak = images[labeled:]
    strong = weak + 0.3 * torch.randn(weak.shape, generator=g, dtype=torch.float64)
    truth = labels[labeled:].clone()
    truth[::3] = -1  # a third of the unlabeled images has no label
    return Batch(images[:labeled], labels[:labeled], weak, strong, truth)


def as_dtype(data: Batch, dtype: torch.dtype) -> Batch:
    """The batch with images of another type."""
    labeled, weak, strong = (x.to(dtype) for x in (data.labeled, data.weak, data.strong))
    return data._replace(labeled=labeled, weak=weak, strong=strong)


class Network(nn.Sequential):
    """Layers, of which the last is the classifier."""

    def get_classifier(self) -> nn.Module:
        return self[-1]


def network(norm: bool = False, dropout: float = 0.0) -> nn.Sequential:
    """A smooth convolutional float64 network, for which central differences are precise.

    `norm`: with batch norm, as module "1".
    """
    layers: list[nn.Module] = [nn.Conv2d(3, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(2)]
    if norm:
        layers.insert(1, nn.BatchNorm2d(4))
    if dropout:
        layers.append(nn.Dropout(dropout))
    return Network(*layers, nn.Flatten(), nn.Linear(16, CLASSES)).double()


def confident(made: nn.Sequential) -> nn.Sequential:
    """The network with larger weights, whose probabilities are less uniform."""
    norm = isinstance(made[1], nn.BatchNorm2d)
    for name, parameter in made.named_parameters():
        # Of filters before batch norm as well: short ones make a central difference's step long.
        if name == f"{len(made) - 1}.weight" or (norm and name == "0.weight"):
            parameter.data.mul_(4.0)
    return made


def new(
    config: AlgorithmConfig,
    make: Callable[[], nn.Module] = network,
    *,
    steps: int = 100,
    compiled: Mode = "off",
    graphs: Graphs = "off",
    context: AlgorithmContext | None = None,
    device: str = "cpu",
) -> Algorithm:
    """An algorithm whose networks `make` returns, with the same weights at every call of `new`."""
    torch.manual_seed(0)

    def learner(chosen: LearnerConfig) -> Learner:
        options: dict[str, Any] = {"compiled": compiled, "graphs": graphs, "device": device}
        return Learner(make(), chosen, steps=steps, **options)

    return algorithms.build(config, learner, context or AlgorithmContext(seed=3, classes=CLASSES))


def mpl_config(feedback: Any, student: LearnerConfig = STUDENT, **options: Any) -> MPLConfig:
    """MPL whose teacher steps by plain SGD of rate 1."""
    consistency = ConsistencyConfig(weight=0.5, ramp=0, temperature=1.0, threshold=0.0)
    fixed = {"teacher": PLAIN, "student": student, "consistency": consistency}
    return MPLConfig(**{"label_smoothing": 0.0, **fixed, "feedback": feedback, **options})


def mpl(
    config: MPLConfig, norm: bool = False, dropout: float = 0.0, compiled: Mode = "off"
) -> MetaPseudoLabels:
    """MPL with confident networks."""
    made = new(config, lambda: confident(network(norm, dropout)), compiled=compiled)
    assert isinstance(made, MetaPseudoLabels)
    return made


def state(algorithm: Algorithm) -> dict[str, Any]:
    """A copy of everything that training changes."""
    learners = {name: learner.state_dict() for name, learner in algorithm.learners.items()}
    return copy.deepcopy({**learners, "algorithm": dict(algorithm.state)})


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All elements of some tensors in one vector."""
    return torch.cat([t.detach().flatten() for t in tensors])


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The distance of two tensors over the norm of the expected one."""
    return float((found - expected).norm() / expected.norm())


def assert_same(
    found: Any,
    expected: Any,
    where: str = "",
    *,
    rtol: float = 0.0,
    atol: float = 0.0,
    ignore: Collection[str] = (),
) -> None:
    """Nested states are equal, or close; keys that contain a word of `ignore` are not compared."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            if not any(word in str(key) for word in ignore):
                assert_same(
                    found[key], value, f"{where}.{key}", rtol=rtol, atol=atol, ignore=ignore
                )
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{where}.{i}", rtol=rtol, atol=atol, ignore=ignore)
    elif isinstance(expected, Tensor):
        torch.testing.assert_close(
            found, expected, rtol=rtol, atol=atol, msg=lambda m: f"{where} differs: {m}"
        )
    else:
        assert found == expected, where
