"""Batch norm with its ReLU in forward-mode differentiation, compared with PyTorch's own rules."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from mpl_fast.errors import ConfigError
from mpl_fast.kernels import reference
from mpl_fast.learner.batch_norm import batch_statistics
from mpl_fast.learner.jvp import FunctionalNetwork, WeightDerivative
from mpl_fast.models import build
from mpl_fast.models.frozen import freeze
from tests.algorithms.problems import relative_error

ALONE, RELU = 1.0, 0.0  # slopes below 0


@pytest.fixture
def slopes(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Of each use of our rule."""
    rule, found = reference.batch_norm_jvp, list[float]()

    def noted(*arguments: Any) -> Any:
        found.append(arguments[-1])
        return rule(*arguments)

    monkeypatch.setattr(reference, "batch_norm_jvp", noted)
    return found


def weights_and_direction(network: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    weights = [p.detach() for p in network.parameters() if p.requires_grad]
    return weights, [torch.randn_like(w) / w.numel() ** 0.5 for w in weights]


def by_pytorch(network: nn.Module, images: Tensor) -> Tensor:
    """The derivative of `both` without our rule."""
    function = FunctionalNetwork(network)
    with forward_ad.dual_level():
        pairs = zip(*weights_and_direction(network), strict=True)
        dual = [forward_ad.make_dual(*pair) for pair in pairs]
        tangent: Tensor = forward_ad.unpack_dual(function.at(dual, images)).tangent
    return tangent


def both(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """The derivative along the same random direction with our rule and without."""
    torch.manual_seed(1)
    ours = WeightDerivative(network, "forward").jvp(*weights_and_direction(network), images)
    torch.manual_seed(1)
    return ours, by_pytorch(network, images)


def images(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("wrn_10_1", {0.1: 7}),
        ("convlarge", {0.1: 9}),
        ("shake_shake_8_8", {ALONE: 9, RELU: 6}),
        ("resnet10t", {ALONE: 7, RELU: 7}),  # norms before a sum have no ReLU
        ("efficientnet_b0", {ALONE: 49}),  # SiLU
        ("airbench94", {ALONE: 6}),  # GELU, and no trained scale
    ],
)
def test_a_networks_derivative_is_pytorchs(
    name: str, expected: dict[float, int], training: bool, slopes: list[float]
) -> None:
    torch.manual_seed(0)
    network = build(name, 10).to(torch.float64, memory_format=torch.channels_last).train(training)  # type: ignore[call-overload]
    with batch_statistics(network) if training else torch.no_grad():
        found, wanted = both(network, images())
    assert relative_error(found, wanted) < 1e-9
    assert {slope: slopes.count(slope) for slope in slopes} == expected


def test_in_float32() -> None:
    torch.manual_seed(0)
    network = build("wrn_10_1", 10).train()
    with batch_statistics(network):
        found, wanted = both(network, images(torch.float32))
    assert found.dtype == torch.float32 and relative_error(found, wanted) < 1e-4


class After(nn.Module):
    """A convolution, a batch norm, and what is done with its output; every kind of use."""

    def __init__(self, use: Callable[[Tensor], Tensor], **options: Any) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, **options)
        self.use = use
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.use(self.norm(self.first(x)))
        return y


def _before_and_after(y: Tensor) -> Tensor:
    return F.relu(y) + y


def _after_and_before(y: Tensor) -> Tensor:
    return y * F.leaky_relu(y)


def _in_place(y: Tensor) -> Tensor:
    F.relu(y, inplace=True)
    return y * 2.0


def _in_place_by_method(y: Tensor) -> Tensor:
    y.relu_()
    return y * 2.0


def _in_place_after_use(y: Tensor) -> Tensor:
    z = y * 3.0
    F.leaky_relu(y, 0.2, inplace=True)
    return y + z


@pytest.mark.parametrize(
    ("use", "expected"),
    [
        (lambda y: y, [ALONE]),
        (F.relu, [RELU]),
        (F.leaky_relu, [0.01]),
        (lambda y: F.leaky_relu(negative_slope=0.3, input=y), [0.3]),
        (F.silu, [ALONE]),
        (torch.relu, [ALONE]),
        (lambda y: torch.cat([y, y], 1), [ALONE]),
        (lambda y: y.flatten(1)[:, : y.shape[1]], [ALONE]),
        (lambda y: F.batch_norm(y, None, None, training=True), [ALONE, ALONE]),
        (_before_and_after, [RELU, ALONE]),
        (_after_and_before, [0.01, ALONE]),
        (_in_place, [RELU]),
        (_in_place_by_method, [ALONE]),
        (_in_place_after_use, [ALONE]),
    ],
)
def test_every_use_of_the_output(
    use: Callable[[Tensor], Tensor], expected: list[float], slopes: list[float]
) -> None:
    torch.manual_seed(0)
    network = After(use)
    with batch_statistics(network):
        found, wanted = both(network, images())
    assert relative_error(found, wanted) < 1e-9
    assert slopes == expected


def test_without_weights(slopes: list[float]) -> None:
    network = After(F.relu, affine=False)
    with batch_statistics(network):
        found, wanted = both(network, images())
    assert relative_error(found, wanted) < 1e-9 and slopes == [RELU]


def test_of_images(slopes: list[float]) -> None:
    """Which have no tangent, but weights and biases of the norm have."""
    network: nn.Module = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()).double()
    with batch_statistics(network):
        found, wanted = both(network, images())
    assert relative_error(found, wanted) < 1e-9 and slopes == [RELU]


def test_norms_of_a_frozen_trunk_are_constants(slopes: list[float]) -> None:
    network: Any = After(F.relu)
    network.fc = nn.Linear(4, 2).double()
    network.get_classifier = lambda: network.fc
    network.use = lambda y: network.fc(F.relu(y).mean((2, 3)))
    freeze(network)
    found, wanted = both(network, images())
    assert torch.equal(found, wanted) and slopes == []


def test_running_statistics_that_a_pass_updates(slopes: list[float]) -> None:
    """Are updated by PyTorch, once."""
    network = After(F.relu)
    found = WeightDerivative(network, "forward").jvp(*weights_and_direction(network), images())
    assert found.shape == (4, 4, 14, 14) and slopes == []
    expected = 0.1 * network.first(images()).mean((0, 2, 3))
    assert network.norm.running_mean is not None
    torch.testing.assert_close(network.norm.running_mean, expected)


def test_a_function_of_autograds_that_takes_the_output_has_no_forward_mode() -> None:
    """It gets the output as it is, without a derivative, which must not be taken for 0."""

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def jvp(ctx: Any, *changes: Tensor) -> Tensor:
            return changes[0] * 2

    with pytest.raises(ConfigError, match=r"no forward-mode .*output of a batch norm"):
        both(After(Doubled.apply).eval(), images())


def test_a_norm_inside_a_function_of_autograds_is_pytorchs(slopes: list[float]) -> None:
    class Norm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return F.batch_norm(x, x.new_zeros(4), x.new_ones(4), eps=1e-12)

        @staticmethod
        def jvp(ctx: Any, *changes: Tensor) -> Tensor:
            return changes[0]

    found, wanted = both(After(lambda y: Norm.apply(y + 0.0)).eval(), images())
    assert relative_error(found, wanted) < 1e-9 and slopes == [ALONE]
