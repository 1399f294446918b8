"""Runs the project's own parity step on a recorded trajectory, and logs what the file logs."""

import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mpl_fast import algorithms, losses
from mpl_fast.algorithms.base import Metrics, train_step
from mpl_fast.algorithms.parity import Kekmodel
from mpl_fast.batch import Batch
from mpl_fast.config import ConsistencyConfig, LearnerConfig, MPLConfig
from mpl_fast.experiments.replay_file import INITIAL, Knobs, Row, Run, Trajectory, Weights
from mpl_fast.learner import Learner

COPY = sys.float_info.min  # an average's decay that keeps nothing: what 0 means in these files


class MLP(nn.Module):
    """The recorded network: two layers, LeakyReLU, and perhaps batch norm; float64."""

    def __init__(self, knobs: Knobs, norm: bool, norm_momentum: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(knobs.D, knobs.H)
        self.bn1 = nn.BatchNorm1d(knobs.H, momentum=norm_momentum) if norm else None
        self.fc2 = nn.Linear(knobs.H, knobs.C)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, C)`` of rows ``(N, D)``."""
        hidden = self.fc1(x)
        if self.bn1 is not None:
            hidden = self.bn1(hidden)
        logits: Tensor = self.fc2(nn.functional.leaky_relu(hidden, 0.1))
        return logits


class GradientNorm:
    """The norm of a learner's gradient as its backward pass leaves it, before any clipping."""

    def __init__(self, learner: Learner) -> None:
        self._squares: list[Tensor] = []
        for parameter in learner.parameters:
            parameter.register_post_accumulate_grad_hook(self._add)

    def _add(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._squares.append(parameter.grad.square().sum())

    def take(self) -> Tensor:
        """The norm since the last call."""
        norm = torch.stack(self._squares).sum().sqrt()
        self._squares = []
        return norm


def config(knobs: Knobs, sign: float) -> MPLConfig:
    """The project's config of a recorded run; `sign` is that of new - old."""
    average = knobs.ema or COPY
    return MPLConfig(
        teacher=_learner(knobs, lr=knobs.t_lr, wait=0, ema=0.0),
        student=_learner(knobs, lr=knobs.s_lr, wait=knobs.wait, ema=average),
        consistency=ConsistencyConfig(
            weight=knobs.lam, ramp=knobs.uda_steps, temperature=knobs.T, threshold=knobs.thr
        ),
        label_smoothing=knobs.ls,
        feedback="parity_kekmodel",
        feedback_weight=sign,
    )


def _learner(knobs: Knobs, *, lr: float, wait: int, ema: float) -> LearnerConfig:
    return LearnerConfig(
        lr=lr,
        momentum=knobs.momentum,
        nesterov=knobs.nesterov and knobs.momentum > 0,  # nothing to look ahead along
        weight_decay=knobs.wd,
        max_grad_norm=knobs.clip,
        warmup=knobs.warmup,
        delay_steps=wait,
        ema=ema,
        dropout=0.0,
        conventions="kekmodel",
    )


def play(
    trajectory: Trajectory, run: Run, norm_momentum: float
) -> tuple[list[Row], dict[str, Weights]]:
    """What the file holds of a run, computed anew: rows of the log, and last weights."""
    knobs = trajectory.knobs

    def new_learner(chosen: LearnerConfig) -> Learner:
        return Learner(MLP(knobs, run.norm, norm_momentum), chosen, steps=knobs.total_steps)

    algorithm = algorithms.build(config(knobs, run.sign), new_learner)
    assert isinstance(algorithm, Kekmodel)
    for name, learner in algorithm.learners.items():
        _start(learner, trajectory.initial[name])
    norms = [GradientNorm(algorithm.teacher), GradientNorm(algorithm.student)]
    log = []
    with losses.use("reference"):  # no kernel computes in float64
        for t in range(knobs.steps):
            metrics = train_step(algorithm, _batch(trajectory.batches[t]), t)
            log.append(_row(algorithm, metrics, t, knobs, [norm.take() for norm in norms]))
    return log, {name: _weights(network) for name, network in _networks(algorithm).items()}


def _start(learner: Learner, initial: Weights) -> None:
    """The average begins where the network does; batch norm begins as torch makes it."""
    values = {name: torch.from_numpy(initial[name]) for name in INITIAL}
    for network in filter(None, (learner.network, learner.average)):
        network.load_state_dict({**network.state_dict(), **values})


def _batch(views: Row) -> Batch:
    xl, y, xw, xs = (torch.from_numpy(views[name]) for name in ("xl", "y", "xw", "xs"))
    return Batch(xl, y.long(), xw, xs, torch.zeros(len(xw), dtype=torch.int64))


def _row(
    algorithm: Kekmodel, metrics: Metrics, t: int, knobs: Knobs, norms: Sequence[Tensor]
) -> Row:
    h = metrics["h"]
    row: dict[str, Tensor | float] = {
        "step": t,
        "s_lr": algorithm.student.lr,
        "t_lr": algorithm.teacher.lr,
        "uda_weight": algorithm.config.consistency.weight_at(t),
        "mask": _share(float(metrics["mask_rate"]), knobs.unlabeled),
        "hard": algorithm.taught,
        "t_loss_l": metrics["loss/labeled"],
        "t_loss_u": metrics["loss/consistency"],
        "s_loss_l_old": metrics["loss/student_old"],
        "s_loss": metrics["loss/student"],
        "s_grad_norm": norms[1],
        "s_loss_l_new": metrics["loss/student_labeled"],
        "dot_product": h,
        "t_loss_mpl": metrics["loss/feedback"],
        "t_loss": metrics["loss/teacher"],
        "t_grad_norm": norms[0],
    }
    for name, network in _networks(algorithm).items():
        flat = nn.utils.parameters_to_vector(network.parameters()).detach()
        row[f"{name}_sum_sumsq"] = torch.stack([flat.sum(), flat.square().sum()])
    return {key: torch.as_tensor(v, dtype=torch.float64).numpy() for key, v in row.items()}


def _share(rate: float, rows: int) -> float:
    """A share of rows in float64, of which the statistic is the float32."""
    count = round(rate * rows)
    return count / rows if abs(rate * rows - count) < 1e-3 else rate


def _networks(algorithm: Kekmodel) -> dict[str, nn.Module]:
    average = algorithm.student.average
    assert average is not None
    student, teacher = algorithm.student.network, algorithm.teacher.network
    return {"teacher": teacher, "student": student, "ema": average}


def _weights(network: nn.Module) -> Weights:
    return {key: value.double().numpy() for key, value in network.state_dict().items()}
