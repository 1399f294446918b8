"""The step of `feedback: parity_kekmodel` in float64, against MPL-pytorch's steps.

Those are a recorded trajectory (tests/golden/kekmodel_steps.json: weights, batches, everything that
each step logged, and the last weights) and, for other sizes and options, the plain step that the
benchmarks use, `tools/bench/step_reference.py`, which is compared with the recording too.
"""

import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mpl_fast import algorithms
from mpl_fast.algorithms.base import train_step
from mpl_fast.algorithms.parity import Kekmodel
from mpl_fast.batch import Batch
from mpl_fast.config import ConsistencyConfig, LearnerConfig, MPLConfig
from mpl_fast.learner import Learner
from tests.algorithms.problems import assert_same
from tools.bench.step_reference import PlainStep, Settings

Trajectory = dict[str, Any]  # float64: "log", a row for each step, and each network's last state
GOLDEN = Path(__file__).parents[1] / "golden" / "kekmodel_steps.json"
NORM_MOMENTUM = 0.001  # of that code's batch norm
SIGNS = {"kekmodel": 1.0, "correct": -1.0}  # of new - old
NETWORKS = ("teacher", "student", "ema")
NAMES = {  # logged quantity: our metric, and the field of the plain step's values
    "t_loss_l": ("loss/labeled", "labeled"), "t_loss_u": ("loss/consistency", "consistency"),
    "s_loss_l_old": ("loss/student_old", "old"), "s_loss": ("loss/student", "student"),
    "s_loss_l_new": ("loss/student_labeled", "new"), "dot_product": ("feedback", "h"),
    "t_loss_mpl": ("loss/feedback", "feedback"), "t_loss": ("loss/teacher", "teacher"),
}  # fmt: skip
OPTIONS = {  # the plain step's: key of the recording's cfg
    "teacher_lr": "t_lr", "student_lr": "s_lr", "total_steps": "total_steps",
    "momentum": "momentum", "nesterov": "nesterov", "weight_decay": "wd", "label_smoothing": "ls",
    "temperature": "T", "threshold": "thr", "lambda_u": "lam", "uda_steps": "uda_steps",
    "warmup_steps": "warmup", "student_wait_steps": "wait", "ema": "ema", "grad_clip": "clip",
}  # fmt: skip
BASE: dict[str, Any] = {
    "D": 5, "H": 8, "C": 4, "BL": 5, "mu": 2, "steps": 6, "total_steps": 6, "warmup": 2, "wait": 1,
    "t_lr": 0.1, "s_lr": 0.2, "momentum": 0.9, "nesterov": True, "wd": 1e-3, "ls": 0.1, "T": 0.8,
    "thr": 0.35, "lam": 3.0, "uda_steps": 4, "ema": 0.9, "clip": 1e9,
}  # fmt: skip
KNOBS: dict[str, dict[str, Any]] = {
    "plain SGD, no warm-up": {
        "momentum": 0.0, "nesterov": False, "wd": 0.0, "ls": 0.0, "wait": 0, "warmup": 0,
    },
    "heavy ball, clipped": {"nesterov": False, "clip": 0.3},
    "no clip, no average, no ramp": {"clip": 0, "ema": 0, "uda_steps": 0},
    "no image passes the threshold": {"thr": 1.5, "lam": 1e6},
    "wide and long": {
        "D": 11, "H": 16, "C": 7, "BL": 9, "mu": 5, "steps": 20, "total_steps": 30, "wait": 4,
    },
    "beyond the schedule": {"steps": 6, "total_steps": 4},
}  # fmt: skip


class Case(NamedTuple):
    """What a trajectory depends on."""

    cfg: dict[str, Any]
    initial: dict[str, list[Tensor]]  # of teacher and student: fc1 and fc2, weight and bias
    batches: list[Batch]
    norm: bool  # batch norm behind the first layer
    sign: float


class MLP(nn.Module):
    """The recorded network: two layers, LeakyReLU, and perhaps batch norm."""

    def __init__(self, initial: list[Tensor], norm: bool, momentum: float = NORM_MOMENTUM) -> None:
        super().__init__()
        (hidden, features), classes = initial[0].shape, len(initial[2])
        self.fc1 = nn.Linear(features, hidden)
        self.bn1 = nn.BatchNorm1d(hidden, momentum=momentum) if norm else None
        self.fc2 = nn.Linear(hidden, classes)
        self.double()
        with torch.no_grad():
            for layer, (weight, bias) in ((self.fc1, initial[:2]), (self.fc2, initial[2:])):
                layer.weight.copy_(weight)
                layer.bias.copy_(bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        if self.bn1 is not None:
            hidden = self.bn1(hidden)
        logits: Tensor = self.fc2(nn.functional.leaky_relu(hidden, 0.1))
        return logits


# --- three sources of a trajectory ---


def recorded() -> dict[str, tuple[Case, Trajectory]]:
    """The runs of the file."""
    content = json.loads(GOLDEN.read_text())
    cfg, data = content["cfg"], content["data"]
    initial = {name: [_float64(v) for v in data[name]] for name in ("teacher", "student")}
    batches = [
        _batch(_float64(b["xl"]), torch.tensor(b["y"]), _float64(b["xw"]), _float64(b["xs"]))
        for b in data["batches"]
    ]
    runs = {}
    for name, run in content["runs"].items():
        norm, sign = "bn=True" in name, SIGNS[name.partition("sign=")[2]]
        finals = {network: _row(run[f"{network}_final"]) for network in NETWORKS}
        trajectory = {"log": [_row(row) for row in run["log"]], **finals}
        runs[name] = Case(cfg, initial, batches, norm, sign), trajectory
    return runs


def drawn(seed: int = 0, **changed: Any) -> Iterator[Case]:
    """Random weights and batches, with and without batch norm, with either sign."""
    cfg = {**BASE, **changed}
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    D, H, C, L, U = cfg["D"], cfg["H"], cfg["C"], cfg["BL"], cfg["BL"] * cfg["mu"]
    initial = {
        name: [0.8 * draw(H, D), 0.3 * draw(H), 0.8 * draw(C, H), 0.3 * draw(C)]
        for name in ("teacher", "student")
    }
    batches = []
    for _ in range(cfg["steps"]):
        weak, labels = draw(U, D), torch.randint(C, (L,), generator=g)
        batches.append(_batch(draw(L, D), labels, weak, weak + 0.5 * draw(U, D)))
    for norm, sign in itertools.product((False, True), SIGNS.values()):
        yield Case(cfg, initial, batches, norm, sign)


def ours(case: Case, norm_momentum: float = NORM_MOMENTUM) -> Trajectory:
    """By `mpl_fast.algorithms`."""
    cfg, starts = case.cfg, iter([case.initial["teacher"], case.initial["student"]])

    def new_learner(config: LearnerConfig) -> Learner:
        network = MLP(next(starts), case.norm, norm_momentum)
        return Learner(network, config, steps=cfg["total_steps"])

    made = algorithms.build(_config(cfg, case.sign), new_learner)
    assert isinstance(made, Kekmodel) and made.student.average is not None
    squares: dict[str, list[Tensor]] = {}
    for name, learner in made.learners.items():
        for parameter in learner.parameters:
            parameter.register_post_accumulate_grad_hook(
                lambda p, name=name: squares.setdefault(name, []).append(p.grad.square().sum())
            )

    def step(batch: Batch, t: int) -> dict[str, Any]:
        squares.clear()
        metrics = train_step(made, batch, t)
        return {
            "s_lr": made.student.lr,
            "t_lr": made.teacher.lr,
            "uda_weight": made.config.consistency.weight_at(t),
            "mask": round(float(metrics["mask_rate"]) * len(batch.weak)) / len(batch.weak),
            "hard": made.student_labels,
            "s_grad_norm": torch.stack(squares["student"]).sum().sqrt(),
            "t_grad_norm": torch.stack(squares["teacher"]).sum().sqrt(),
            **{logged: metrics[name] for logged, (name, _) in NAMES.items()},
        }

    average = made.student.average
    return _play(case, (made.teacher.network, made.student.network, average), step)


def plain(case: Case) -> Trajectory:
    """By the plain step of the benchmarks."""
    options = Settings(**{name: case.cfg[key] for name, key in OPTIONS.items()})
    teacher, student = (MLP(case.initial[name], case.norm) for name in NETWORKS[:2])
    made = PlainStep(teacher, student, options._replace(feedback_sign=case.sign))

    def step(batch: Batch, t: int) -> dict[str, Any]:
        t_lr, s_lr = made.learning_rates()
        weight, values = made.consistency_weight(), made.update(batch)
        return {
            "s_lr": s_lr,
            "t_lr": t_lr,
            "uda_weight": weight,
            "mask": values.mask,
            "hard": values.labels,
            "s_grad_norm": values.student_norm,
            "t_grad_norm": values.teacher_norm,
            **{logged: getattr(values, name) for logged, (_, name) in NAMES.items()},
        }

    return _play(case, (made.teacher, made.student, made.average), step)


def _play(
    case: Case, networks: Sequence[nn.Module], step: Callable[[Batch, int], dict[str, Any]]
) -> Trajectory:
    log, named = [], dict(zip(NETWORKS, networks, strict=True))
    for t, batch in enumerate(case.batches):
        row = {"step": t, **step(batch, t)}
        for name, network in named.items():
            flat = nn.utils.parameters_to_vector(network.parameters()).detach()
            row[f"{name}_sum_sumsq"] = torch.stack([flat.sum(), flat.square().sum()])
        log.append(_row(row))
    finals = {name: _row(network.state_dict()) for name, network in named.items()}
    return {"log": log, **finals}


def _config(cfg: dict[str, Any], sign: float) -> MPLConfig:
    def learner(lr: float, delay: int, ema: float) -> LearnerConfig:
        return LearnerConfig(
            lr=lr,
            momentum=cfg["momentum"],
            nesterov=cfg["nesterov"] and cfg["momentum"] > 0,  # without momentum the same step
            weight_decay=cfg["wd"],
            max_grad_norm=cfg["clip"],
            warmup=cfg["warmup"],
            delay_steps=delay,
            ema=ema,
            conventions="kekmodel",
        )

    return MPLConfig(
        teacher=learner(cfg["t_lr"], 0, 0.0),
        # In that code 0 is an average that equals the network, in ours none.
        student=learner(cfg["s_lr"], cfg["wait"], cfg["ema"] or sys.float_info.min),
        consistency=ConsistencyConfig(
            weight=cfg["lam"], ramp=cfg["uda_steps"], temperature=cfg["T"], threshold=cfg["thr"]
        ),
        label_smoothing=cfg["ls"],
        feedback="parity_kekmodel",
        feedback_weight=sign,
    )


def _row(values: Mapping[str, Any]) -> dict[str, Tensor]:
    return {key: _float64(value) for key, value in values.items()}


def _float64(value: Any) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64).detach()


def _batch(labeled: Tensor, labels: Tensor, weak: Tensor, strong: Tensor) -> Batch:
    return Batch(labeled, labels, weak, strong, torch.zeros(len(weak), dtype=torch.int64))


# --- the tests ---

RUNS = recorded()
same = partial(assert_same, atol=1e-14)


@pytest.mark.parametrize(("play", "limit"), [(ours, 1e-13), (plain, 1e-12)])
@pytest.mark.parametrize("name", RUNS)
def test_recorded_runs_are_replayed_to_rounding(
    name: str, play: Callable[[Case], Trajectory], limit: float
) -> None:
    case, expected = RUNS[name]
    assert len(expected["log"]) == 8 and len(expected["log"][0]) == 19
    same(play(case), expected, rtol=limit)


@pytest.mark.parametrize("name", KNOBS)
def test_other_sizes_and_options_agree_with_the_plain_step(name: str) -> None:
    for case in drawn(**KNOBS[name]):
        expected = plain(case)
        same(ours(case), expected, rtol=1e-11)
        if "clipped" in name:
            norms = [row[key] for row in expected["log"] for key in ("s_grad_norm", "t_grad_norm")]
            assert min(norms) > case.cfg["clip"]


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    number=st.integers(0, 3),  # with or without batch norm, with either sign
    changed=st.fixed_dictionaries(
        {
            "D": st.integers(1, 6),
            "H": st.integers(2, 9),
            "C": st.integers(2, 5),
            "BL": st.integers(3, 6),
            "mu": st.integers(1, 4),
            "warmup": st.integers(0, 4),
            "wait": st.integers(0, 4),
            "momentum": st.sampled_from([0.5, 0.9]),
            "nesterov": st.booleans(),
            "wd": st.sampled_from([0.0, 0.01]),
            "ls": st.sampled_from([0.0, 0.2]),
            "T": st.sampled_from([0.3, 1.0, 2.0]),
            "thr": st.sampled_from([0.0, 0.5, 0.9]),
            "clip": st.sampled_from([0.0, 0.1, 1.0, 1e9]),
            "ema": st.sampled_from([0.0, 0.5, 0.995]),
        }
    ),
)
@pytest.mark.slow
def test_any_options_agree_with_the_plain_step(
    seed: int, number: int, changed: dict[str, Any]
) -> None:
    case = list(drawn(seed, steps=4, **changed))[number]
    assert_same(ours(case), plain(case), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    ("sign", "momentum", "key"),
    [(-1.0, NORM_MOMENTUM, "log.0.dot_product"), (1.0, 0.1, "teacher.bn1.running_mean")],
)
def test_another_sign_or_norm_momentum_is_found(sign: float, momentum: float, key: str) -> None:
    case, expected = RUNS["bn=True,sign=kekmodel"]
    with pytest.raises(AssertionError, match=rf"^\.{key} differs"):
        same(ours(case._replace(sign=sign), momentum), expected, rtol=1e-10)
