"""A learner's schedule, decay, average, clipping and state."""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from mpl_fast.config import ConsistencyConfig, LearnerConfig
from mpl_fast.learner import Learner
from tests.algorithms.problems import assert_same, batch, flat, network

IMAGES = batch(1).labeled.float()


def learner(bf16: bool = False, **options: Any) -> Learner:
    torch.manual_seed(0)
    chosen: dict[str, Any] = {
        "lr": 0.1,
        "warmup": 0,
        "dropout": 0.0,
        "max_grad_norm": 0.0,
        **options,
    }
    config = LearnerConfig(**chosen)
    return Learner(network(norm=True).float(), config, steps=10, bf16=bf16)


def train(made: Learner, t: int) -> Tensor:
    made.begin_step(t)
    rate = made.backward_and_step(made(IMAGES + t).square().mean())
    made.end_step(t)
    return rate


def test_learning_rate_is_delayed_warms_up_and_falls_to_zero() -> None:
    config = LearnerConfig(lr=0.8, delay_steps=3, warmup=4)
    rates = [config.lr_at(t, 27) for t in range(28)]
    assert rates[:3] == [0.0, 0.0, 0.0]
    assert rates[3:7] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[7] == pytest.approx(0.8)
    assert rates[17] == pytest.approx(0.4)  # half way of the 20 steps that decay
    assert rates[27] == pytest.approx(0.0, abs=1e-12)
    assert all(a >= b for a, b in itertools.pairwise(rates[6:]))


def test_consistency_weight_ramps() -> None:
    config = ConsistencyConfig(weight=8.0, ramp=4)
    assert [config.weight_at(t) for t in (0, 1, 3, 9)] == [2.0, 4.0, 8.0, 8.0]
    assert ConsistencyConfig(weight=8.0, ramp=0).weight_at(0) == 8.0


def test_norms_and_biases_are_not_decayed() -> None:
    made = learner(weight_decay=0.5)
    decayed = {id(p) for g in made.optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    for name, parameter in made.network.named_parameters():
        assert (id(parameter) in decayed) == (name in ("0.weight", "5.weight")), name


def test_average_is_the_warmed_up_moving_average_of_weights_and_statistics() -> None:
    made = learner(ema=0.9)
    assert made.average is not None
    expected = {k: v.clone() for k, v in made.network.state_dict().items()}
    for t in range(30):
        train(made, t)
        decay = min(0.9, (1 + t) / (10 + t))
        for key, value in made.network.state_dict().items():
            if value.is_floating_point():
                expected[key] = decay * expected[key] + (1 - decay) * value
    for key, value in made.average.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6)
    assert made.average.state_dict()["1.num_batches_tracked"] == 30
    assert not torch.equal(made.average.state_dict()["1.running_mean"], torch.zeros(4))


def test_forward_batch_stats_does_not_touch_the_running_statistics() -> None:
    made = learner()
    made.begin_step(0)
    before = copy.deepcopy(dict(made.network.state_dict()))
    logits = made.forward_batch_stats(IMAGES)
    assert made.network.training and not logits.requires_grad
    assert_same(dict(made.network.state_dict()), before)
    together = made(IMAGES[:2], IMAGES[2:])  # views are one pass, in training mode
    torch.testing.assert_close(logits, together)
    updated = made.network.state_dict()["1.running_mean"]
    assert not torch.equal(updated, before["1.running_mean"])
    evaluated = made.infer_average(IMAGES)  # of the weights themselves, since none are averaged
    assert made.network.training
    torch.testing.assert_close(evaluated, made.network.eval()(IMAGES))


def test_clipping_bounds_the_step() -> None:
    """The first Nesterov step is lr * 1.9 * gradient, whose norm is the clip."""
    made = learner(max_grad_norm=0.01, lr=1.0, weight_decay=0.0)
    made.begin_step(0)
    before = flat(made.parameters)
    made.backward_and_step(1000 * made(IMAGES).square().sum())
    distance = (flat(made.parameters) - before).norm().item()
    assert distance == pytest.approx(1.9 * 0.01, rel=1e-3)


def test_finite_includes_the_statistics() -> None:
    made = learner()
    assert made.finite()
    made.network.state_dict()["1.running_var"][0] = float("nan")
    assert not made.finite()


def test_the_state_is_restored() -> None:
    first, second = learner(ema=0.9), learner(ema=0.9)
    for t in range(3):
        train(first, t)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for made in (first, second):
        train(made, 3)
    assert first.average is not None
    assert_same(second.state_dict(), first.state_dict())


def test_bf16_forward_keeps_fp32_weights_in_channels_last_memory() -> None:
    made = learner(bf16=True)
    assert made(IMAGES).dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in made.parameters)
    assert made.parameters[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("count", [1, 3])
def test_backward_divides_by_the_number_of_microbatches(count: int) -> None:
    """A scalar loss, logits with a gradient, and a constant, which has no effect."""
    made, plain = learner(), learner()
    logits = made(IMAGES)
    grad_logits = torch.linspace(-1, 1, logits.numel()).view_as(logits)
    made.backward(logits.square().mean(), (logits, grad_logits), IMAGES.sum(), microbatches=count)
    expected = plain(IMAGES)
    ((expected.square().mean() + (expected * grad_logits).sum()) / count).backward()
    found = [p.grad for p in made.parameters]
    assert_same(found, [p.grad for p in plain.parameters], rtol=1e-5, atol=1e-6)


def test_a_frozen_learner_keeps_its_weights_and_momentum() -> None:
    made = learner()
    made.begin_step(0)
    made.freeze()
    before = flat(made.parameters)
    rate = made.backward_and_step(made(IMAGES).square().mean())
    assert made.frozen and made.lr == rate == 0.0
    assert torch.equal(flat(made.parameters), before)
    assert not any(s["momentum_buffer"].any() for s in made.optimizer.state.values())
    train(made, 1)
    assert not made.frozen and not torch.equal(flat(made.parameters), before)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_delayed_trunk_begins_as_if_the_run_began(optimizer: str) -> None:
    """Its weights, momentum and step counters stay as they were; in a resumed run, too."""
    options: dict[str, Any] = {"optimizer": optimizer, "delay_steps": 1, "trunk_delay_steps": 2}
    made, other = learner(**options), learner(**options)
    trunk, last = made.parameters[:-2], made.parameters[-2:]
    before = copy.deepcopy([trunk, last])
    mean = made.network.state_dict()["1.running_mean"].clone()
    for t in range(3):
        train(made, t)
    assert_same(trunk, before[0])
    assert all(not x.any() for p in trunk for x in made.optimizer.state[p].values())
    assert not torch.equal(last[0], before[1][0])
    assert not torch.equal(made.network.state_dict()["1.running_mean"], mean)
    other.load_state_dict(copy.deepcopy(made.state_dict()))
    for one in (made, other):
        train(one, 3)
    assert not torch.equal(trunk[0], before[0][0])
    assert_same(other.state_dict(), made.state_dict())
    steps = [made.optimizer.state[p].get("step", torch.ones(())) for p in trunk]
    assert all(step == 1 for step in steps)
