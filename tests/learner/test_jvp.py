"""Directional derivatives in weight space, which do not change the network."""

import copy
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpl_fast.config import LearnerConfig
from mpl_fast.errors import ConfigError
from mpl_fast.learner import Learner, rng
from mpl_fast.learner.batch_norm import batch_statistics
from mpl_fast.learner.jvp import WeightDerivative, log_softmax_jvp
from mpl_fast.models.frozen import freeze
from tests.algorithms.problems import batch, network, relative_error

CPU = torch.device("cpu")
IMAGES = batch().weak
Method = Literal["auto", "forward", "central"]


class Old(torch.autograd.Function):
    """tanh, as a layer from before forward-mode differentiation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        grad_x: Tensor = grads[0] * (1 - x.tanh() ** 2)
        return grad_x


class OldTanh(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = Old.apply(x)
        return found


def learner(net: nn.Module | None = None, **options: Any) -> Learner:
    torch.manual_seed(0)
    net = net or network(norm=True, dropout=0.5)
    made = Learner(net, LearnerConfig(lr=0.1, warmup=0), steps=10, **options)
    made.begin_step(0)
    return made


def direction(made: Learner) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [
        torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype) for p in made.parameters
    ]


def by_differences(
    function: Callable[[list[Tensor]], Tensor], at: list[Tensor], v: list[Tensor]
) -> Tensor:
    """Fourth order, each time with the same random numbers."""
    state, step, value = rng.rng_state(CPU), 3e-4, torch.zeros(())
    for factor, share in ((1, 8), (-1, -8), (2, -1), (-2, 1)):
        with rng.replay_rng(state, CPU), torch.no_grad():
            moved = [w + factor * step * d for w, d in zip(at, v, strict=True)]
            value = value + share * function(moved)
    return value / (12 * step)


def called_at(made: Learner, images: Tensor, training: bool) -> Callable[[list[Tensor]], Tensor]:
    """A copy of the network, called at other weights."""
    twin = copy.deepcopy(made.network).train(training)
    names = [name for name, p in twin.named_parameters() if p.requires_grad]
    return lambda weights: torch.func.functional_call(
        twin, dict(zip(names, weights, strict=True)), (images,)
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method, tolerance", [("forward", 1e-8), ("central", 1e-3)])
def test_the_derivative_is_that_of_a_forward_pass_and_changes_nothing(
    method: Method, tolerance: float, training: bool
) -> None:
    made = learner()
    made(IMAGES)  # so that running statistics are not those of this batch
    v, weights = direction(made), made.weights()
    state = rng.rng_state(CPU)
    expected = by_differences(called_at(made, IMAGES, training), weights, v)
    held = made.network.state_dict()
    before = copy.deepcopy(dict(held))
    present = torch.get_rng_state()
    with rng.replay_rng(state, CPU):
        found = made.jvp(weights, v, IMAGES, method, training=training)
    assert found.dtype == torch.float64 and relative_error(found, expected) < tolerance
    assert torch.equal(torch.get_rng_state(), present)
    assert held["1.num_batches_tracked"] == 1 and made.network.training
    for key, value in made.network.state_dict().items():
        assert value.data_ptr() == held[key].data_ptr() and torch.equal(value, before[key]), key
    assert all(p.grad is None for p in made.parameters)
    other = made.jvp(weights, v, IMAGES, method, training=not training)
    assert relative_error(other, expected) > 0.01


def test_weights_need_not_be_those_of_the_network() -> None:
    made = learner(network())
    before, v = made.weights(), direction(made)
    there = made.jvp(before, v, IMAGES, "forward")
    with torch.no_grad():
        torch._foreach_add_(made.parameters, 1.0)
    assert torch.equal(made.jvp(before, v, IMAGES, "forward"), there)
    assert relative_error(made.jvp(made.weights(), v, IMAGES, "forward"), there) > 0.01


def test_epsilon_is_a_length_in_weight_space() -> None:
    """Whatever the length of the direction, and 0 where there is none."""
    made = learner(network())
    weights, v = made.weights(), direction(made)
    short = made.jvp(weights, [d * 1e-6 for d in v], IMAGES, "central")
    torch.testing.assert_close(short * 1e6, made.jvp(weights, v, IMAGES, "central"))
    assert not made.jvp(weights, [0 * d for d in v], IMAGES, "central").any()


def test_log_softmax_jvp() -> None:
    g = torch.Generator().manual_seed(0)
    logits, change = torch.randn(2, 4, 5, generator=g, dtype=torch.float64)
    expected = torch.func.jvp(lambda z: z.log_softmax(-1), (logits,), (change,))[1]
    torch.testing.assert_close(log_softmax_jvp(logits, change), expected)
    lifted = log_softmax_jvp(logits.bfloat16(), change.float())
    assert lifted.dtype == torch.float32


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_statistics(affine: bool, training: bool) -> None:
    """Until an error, too."""
    norm = nn.BatchNorm1d(3, affine=affine).train(training)
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)) + 5.0
    before = copy.deepcopy(dict(norm.state_dict()))
    assert set(before) >= {"running_mean", "running_var", "num_batches_tracked"}
    with pytest.raises(KeyError), batch_statistics(norm):
        found = norm(x)
        raise KeyError
    expected = F.batch_norm(x, None, None, norm.weight, norm.bias, training=True)
    assert torch.equal(found, expected)
    assert norm.state_dict().keys() == before.keys()
    for key, value in norm.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("how", ["requires_grad", "freeze"])
def test_frozen_norms_keep_their_statistics(how: str) -> None:
    made: Any = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
    made.fc = nn.Linear(64, 4)
    made.get_classifier = lambda: made.fc
    made.double().train()
    made(IMAGES)
    if how == "freeze":
        freeze(made)
    else:
        made[1].requires_grad_(False)
        made.eval()
    expected = copy.deepcopy(made).eval()(IMAGES)
    with batch_statistics(made):
        assert torch.equal(made(IMAGES), expected)


@pytest.mark.parametrize("method", ["forward", "central"])
def test_derivatives_of_bfloat16_learners_are_float32(method: Method) -> None:
    half, full = learner(network(norm=True).float(), bf16=True), learner(network(norm=True).float())
    images, v = IMAGES.float(), direction(full)
    assert half(images).dtype == torch.bfloat16
    found, expected = (x.jvp(full.weights(), v, images, method) for x in (half, full))
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    sixteen = half.jvp(full.weights(), v, images.bfloat16(), method)
    assert sixteen.dtype == torch.float32 and relative_error(sixteen, expected) < 0.1


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("allowed", [(True, True), (False, True), (False, False)])
def test_central_differences_are_taken_without_tf32(
    allowed: tuple[bool, bool], fails: bool
) -> None:
    """In both passes; the settings of products and convolutions are then as before."""
    matmul, cudnn, seen = torch.backends.cuda.matmul, torch.backends.cudnn, list[list[bool]]()
    present = matmul.allow_tf32, cudnn.allow_tf32

    class Noted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append([matmul.allow_tf32, cudnn.allow_tf32])
            if fails:
                raise KeyError
            return x

    made = learner(network().insert(0, Noted()))
    matmul.allow_tf32, cudnn.allow_tf32 = allowed
    try:
        with pytest.raises(KeyError) if fails else nullcontext():
            made.jvp(made.weights(), direction(made), IMAGES, "central")
        assert (matmul.allow_tf32, cudnn.allow_tf32) == allowed
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = present
    assert seen == [[False, False]] * (1 if fails else 2)


def test_a_layer_without_forward_mode() -> None:
    """auto warns once and takes differences, forward is an error."""
    old = network(dropout=0.5)
    old.insert(4, OldTanh())  # after dropout: when it fails, the generator has moved
    made = learner(old)
    weights, v, state = made.weights(), direction(made), rng.rng_state(CPU)
    with pytest.warns(UserWarning, match="no forward-mode differentiation.*jvp"):
        found = made.jvp(weights, v, IMAGES)
    with rng.replay_rng(state, CPU):
        assert torch.equal(made.jvp(weights, v, IMAGES, "central"), found)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.jvp(weights, v, IMAGES)
    with pytest.raises(ConfigError, match=r"derivative forward: .* take central or auto"):
        made.jvp(weights, v, IMAGES, "forward")


def test_an_operation_that_ends_the_tangent_is_noticed() -> None:
    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).detach()  # type: ignore[no-any-return]

    derivative = WeightDerivative(Rounded(), "forward")
    weights = [p.detach() for p in derivative.function.network.parameters()]
    with pytest.raises(ConfigError, match="no tangent"):
        derivative.jvp(weights, weights, IMAGES)


def test_other_errors_of_a_layer_are_raised() -> None:
    made = learner(network())
    with pytest.raises(RuntimeError, match="channels"):
        made.jvp(made.weights(), direction(made), IMAGES[:, :2], "auto")
    assert made._derivative.method == "auto"
