"""Two networks change roles, and each takes all that is its own into the other role."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpl_fast import algorithms
from mpl_fast.algorithms import AlgorithmContext
from mpl_fast.algorithms.base import predict, train_step
from mpl_fast.algorithms.roleplay import RolePlay
from mpl_fast.batch import Batch
from mpl_fast.config import ConsistencyConfig, LearnerConfig, RolePlayConfig
from mpl_fast.config.command_line import parse
from mpl_fast.data.manifest import read_manifest
from mpl_fast.learner import Learner
from mpl_fast.training.build import build_algorithm
from tests.tiny_run import arguments

STEPS, CLASSES = 6, 4
# Unlike in everything that a role could leave behind or take from the other network.
FIRST = LearnerConfig(
    lr=0.2, warmup=3, momentum=0.9, ema=0.9, weight_decay=0, max_grad_norm=0, dropout=0
)
SECOND = replace(FIRST, lr=0.1, warmup=0, momentum=0.5, ema=0.5)
CONFIG = RolePlayConfig(
    teacher=FIRST,
    student=SECOND,
    consistency=ConsistencyConfig(weight=2.0, ramp=0, temperature=0.7, threshold=0.3),
    swap_every=2,
)


def network() -> nn.Module:
    """No batch norm, so that views may be passed one by one."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, CLASSES)
    ).double()


def batch(t: int) -> Batch:
    g = torch.Generator().manual_seed(t)
    labeled, weak = (torch.randn(n, 3, 4, 4, generator=g).double() for n in (6, 9))
    strong = weak + 0.5 * torch.randn(weak.shape, generator=g)
    labels, truth = (torch.randint(CLASSES, (n,), generator=g) for n in (6, 9))
    return Batch(labeled, labels, weak, strong, truth)


def players(config: RolePlayConfig, epoch: int = 1) -> RolePlay:
    torch.manual_seed(0)
    made = algorithms.build(
        config,
        lambda c: Learner(network(), c, steps=STEPS),
        AlgorithmContext(steps_per_epoch=epoch),
    )
    assert isinstance(made, RolePlay)
    return made


class Player:
    """A network with its optimizer and average, in plain PyTorch."""

    def __init__(self, net: nn.Module, config: LearnerConfig) -> None:
        self.net, self.config, self.average = net, config, copy.deepcopy(net)
        self.optimizer = torch.optim.SGD(
            net.parameters(), config.lr, momentum=config.momentum, nesterov=True
        )

    def backward_and_step(self, loss: Tensor, t: int) -> None:
        self.optimizer.param_groups[0]["lr"] = self.config.lr_at(t, STEPS)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    @torch.no_grad()
    def end_step(self, t: int) -> None:
        decay = min(self.config.ema, (1 + t) / (10 + t))
        for kept, mine in zip(self.average.parameters(), self.net.parameters(), strict=True):
            kept.mul_(decay).add_(mine, alpha=1 - decay)


def lesson(teacher: Player, student: Player, data: Batch, t: int) -> None:
    """Meta Pseudo Labels in this step's roles, written out."""
    a, c = CONFIG.label_smoothing, CONFIG.consistency
    z_l, z_w, z_s = (teacher.net(x) for x in (data.labeled, data.weak, data.strong))
    label, target = z_w.argmax(-1), (z_w.detach() / c.temperature).softmax(-1)
    old = F.cross_entropy(student.net(data.labeled), data.labels).detach()
    student.backward_and_step(
        F.cross_entropy(student.net(data.strong), label, label_smoothing=a), t
    )
    h = old - F.cross_entropy(student.net(data.labeled), data.labels).detach()
    mask = (target.amax(-1) >= c.threshold).double()
    consistency = -((target * z_s.log_softmax(-1)).sum(-1) * mask).mean()
    loss = F.cross_entropy(z_l, data.labels, label_smoothing=a) + c.weight * consistency
    teacher.backward_and_step(loss + h * F.cross_entropy(z_s, label), t)
    for player in (teacher, student):
        player.end_step(t)


def test_weights_momentum_average_and_schedule_change_roles_together() -> None:
    """Six steps with two changes equal the same game by hand, where roles are just two names.

    To single precision: h, a difference of losses, is handed on in it.
    """
    game = players(CONFIG)
    first, second = (
        Player(copy.deepcopy(learner.network), learner.config) for learner in game.learners.values()
    )
    for t in range(STEPS):
        train_step(game, batch(t), t)
        teacher, student = (first, second) if t in (0, 1, 4, 5) else (second, first)
        lesson(teacher, student, batch(t), t)
    for learner, player in zip(game.learners.values(), (first, second), strict=True):
        assert learner.average is not None
        for mine, by_hand in ((learner.network, player.net), (learner.average, player.average)):
            torch.testing.assert_close(
                mine.state_dict(), by_hand.state_dict(), rtol=1e-6, atol=1e-7
            )
        for parameter, other in zip(learner.parameters, player.net.parameters(), strict=True):
            torch.testing.assert_close(
                learner.optimizer.state[parameter]["momentum_buffer"],
                player.optimizer.state[other]["momentum_buffer"],
                rtol=1e-6,
                atol=1e-7,
            )


def test_roles_follow_from_the_step() -> None:
    game = players(replace(CONFIG, swap_every=3))
    first, second = game.learners.values()
    assert [game.roles(t)[0] is first for t in range(9)] == [True] * 3 + [False] * 3 + [True] * 3
    assert all({*game.roles(t)} == {first, second} for t in range(9))


def test_a_period_of_0_is_an_epoch_of_the_unlabeled_images(tiny_rec: Path, tmp_path: Path) -> None:
    options = arguments(tmp_path / "run", tiny_rec, recipe="mpl_roleplay")
    config = parse([*options, "--algorithm.swap-every", "0", "--unlabeled-batch", "7"])
    manifest = read_manifest(str(tiny_rec))
    game = build_algorithm(config, manifest, 10, torch.device("cpu"))
    assert isinstance(game, RolePlay)
    assert manifest.splits["unlabeled"].records == 60
    assert game.period == 9  # 60 / 7, and a step more that is begun


def moved(before: dict[str, Tensor], learner: Learner) -> bool:
    now = learner.network.state_dict()
    return any(not torch.equal(now[key], value) for key, value in before.items())


def test_whoever_is_the_student_rests_while_students_wait() -> None:
    game = players(replace(CONFIG, student_delay_steps=3))
    seen = []
    for t in range(5):
        before = [copy.deepcopy(x.network.state_dict()) for x in game.learners.values()]
        metrics = train_step(game, batch(t), t)
        pairs = zip(before, game.learners.values(), strict=True)
        seen.append([*(moved(old, learner) for old, learner in pairs), bool(metrics["h"] != 0)])
    # first moves, second moves, feedback: roles change before steps 2 and 4
    assert seen == [
        [True, False, False],
        [True, False, False],
        [False, True, False],
        [True, True, True],
        [True, True, True],
    ]


def test_a_rest_leaves_no_momentum_behind() -> None:
    """After a rest as student, the first step as teacher is that of a network never trained."""
    game = players(replace(CONFIG, student_delay_steps=2))
    for t in range(2):
        train_step(game, batch(t), t)
    gathered = game.learners["second"].optimizer.state.values()
    assert gathered and not any(state["momentum_buffer"].any() for state in gathered)
    assert game.learners["first"].optimizer.state
    train_step(game, batch(2), 2)
    assert game.learners["second"].optimizer.state


def test_each_student_has_a_moving_average_of_its_own() -> None:
    game = players(replace(CONFIG, baseline=0.5))
    assert set(game.state) == {"baseline/first", "baseline/second"}
    for t in range(2):
        train_step(game, batch(t), t)
    assert game.state["baseline/second"] != 0 and game.state["baseline/first"] == 0
    kept = game.state["baseline/second"].clone()
    train_step(game, batch(2), 2)
    assert game.state["baseline/first"] != 0 and game.state["baseline/second"] == kept


@pytest.mark.parametrize("mean_of", ["probability", "logits"])
def test_both_networks_averages_are_evaluated_together(
    mean_of: Literal["probability", "logits"],
) -> None:
    game = players(replace(CONFIG, ensemble=mean_of))
    for t in range(3):
        train_step(game, batch(t), t)
    images = batch(9).weak
    averages = [learner.average for learner in game.learners.values()]
    with torch.no_grad():
        one, two = (average(images).float() for average in averages if average is not None)
    by_probability = (one.softmax(-1) + two.softmax(-1)) / 2
    by_logits = ((one + two) / 2).softmax(-1)
    assert not torch.allclose(by_probability, by_logits, atol=1e-4)
    expected = by_probability if mean_of == "probability" else by_logits
    torch.testing.assert_close(predict(game, images), expected)


def test_resumed_in_the_middle_of_a_period_equals_no_stop() -> None:
    straight = players(CONFIG)
    saved = {}
    for t in range(STEPS):
        if t == 3:  # the second network has been the teacher for one step
            saved = {k: copy.deepcopy(v.state_dict()) for k, v in straight.learners.items()}
        train_step(straight, batch(t), t)
    resumed = players(CONFIG)
    for name, learner in resumed.learners.items():
        learner.load_state_dict(saved[name])
    for t in range(3, STEPS):
        train_step(resumed, batch(t), t)
    for name, learner in resumed.learners.items():
        expected = straight.learners[name].state_dict()
        for part in ("network", "average"):
            for key, value in learner.state_dict()[part].items():
                assert torch.equal(value, expected[part][key]), f"{name}.{part}.{key}"
