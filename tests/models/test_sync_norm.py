"""Batch norm over all ranks: together they compute what one rank does with all images.

Under torchrun this file takes the passes of a rank, and saves what they gave.
"""

import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.autograd import gradcheck

from mpl_fast import distributed, models
from mpl_fast.learner.batch_norm import batch_statistics
from mpl_fast.learner.jvp import WeightDerivative
from mpl_fast.models.sync_norm import SyncNorm, synchronized
from tests.algorithms.problems import assert_same, relative_error
from tests.tiny_run import launch

Found = dict[str, Any]
CHANNELS = 4


def around(*layers: nn.Module) -> nn.Module:
    """A network of some layers that begin with four channels of 6 x 6 pixels, and end so."""
    return nn.Sequential(nn.Conv2d(3, CHANNELS, 3), *layers, nn.Flatten(), nn.Linear(144, 5))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: around(nn.BatchNorm2d(CHANNELS), nn.Tanh()),
    "not affine": lambda: around(nn.BatchNorm2d(CHANNELS, affine=False), nn.Tanh()),
    "no statistics": lambda: around(nn.BatchNorm2d(CHANNELS, track_running_stats=False)),
    "rows": lambda: around(nn.Flatten(), nn.BatchNorm1d(144, eps=0.1)),
    "timm": lambda: around(BatchNormAct2d(CHANNELS, momentum=0.3, act_layer=nn.SiLU)),
    "wide resnet": lambda: models.build("wrn_10_1", 5),
}
COMPILED = "timm"


def images() -> Tensor:
    """(12, 3, 8, 8): each is larger than the one before, so that the ranks' differ."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(12, 3, 8, 8, generator=generator, dtype=torch.float64)
    return normal * torch.arange(1.0, 13.0, dtype=torch.float64).view(12, 1, 1, 1)


def new(name: str) -> nn.Module:
    torch.manual_seed(1)
    return NETWORKS[name]().double().train()


def passes(network: nn.Module, x: Tensor, *, compiled: bool = False) -> Found:
    """What two passes of a network and the derivative of a third give."""
    forward = torch.compile(network, fullgraph=True) if compiled else network
    forward(x + 1.0)
    x = x.clone().requires_grad_()
    logits = forward(x)
    logits.sin().sum().backward()
    weights = [p.detach() for p in network.parameters()]
    with batch_statistics(network):
        derivative = WeightDerivative(network, "forward")
        change = derivative.jvp(weights, [w.cos() for w in weights], x.detach())
        alone = network.eval()(x).detach()
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    return {
        "logits": logits.detach(),
        "gradient of the images": x.grad,
        "change": change,
        "gradients": [distributed.sum_over_ranks(g) for g in gradients],
        "state": network.state_dict(),
        "alone": alone,
    }


def precisions(x: Tensor) -> Found:
    """Passes in float32 and bfloat16 whose channels are far from zero."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        norm = synchronized(nn.Sequential(nn.BatchNorm2d(3)))
        given = x.to(dtype).to(memory_format=torch.channels_last).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = norm(given)
        y.float().sin().sum().backward()
        assert given.grad is not None
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert given.grad.is_contiguous(memory_format=torch.channels_last)
        found[str(dtype)] = [y.detach(), given.grad, norm.state_dict()]
    return found


def main(out: str) -> None:
    """Writes OUT.RANK."""
    rank = distributed.init("cpu").rank
    x = images()[rank :: distributed.world_size()]
    found: Found = {}
    for name in NETWORKS:
        network = synchronized(new(name))
        with (
            mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduced,
            mock.patch.object(
                dist, "all_gather_into_tensor", wraps=dist.all_gather_into_tensor
            ) as gathered,
        ):
            found[name] = passes(network, x)
        of_weights = len(found[name]["gradients"])
        found[name]["exchanges"] = [gathered.call_count, reduced.call_count - of_weights]
    if distributed.world_size() == 2:
        found["compiled"] = passes(synchronized(new(COMPILED)), x, compiled=True)
    found["precisions"] = precisions(x + 1000.0)
    torch.save(found, f"{out}.{rank}")
    distributed.shutdown()


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    """What `main` saved, by rank."""
    out = tmp_path_factory.mktemp("ranks") / "found"
    done = launch("tests.models.test_sync_norm", str(out), ranks=request.param)
    assert done.returncode == 0, done.stderr
    return [torch.load(f"{out}.{r}", weights_only=True) for r in range(request.param)]


def together(ranks: list[Found], key: str) -> Tensor:
    """The rows of all ranks in the order of `images`."""
    return torch.stack([found[key] for found in ranks], 1).flatten(0, 1)


@pytest.mark.slow
def test_ranks_compute_what_one_does(ranks: list[Found]) -> None:
    """Logits, gradients, running statistics and the derivative along a direction, to 1e-10."""
    of = {name: name for name in NETWORKS}
    if len(ranks) == 2:
        of["compiled"] = COMPILED
    for name, network in of.items():
        expected, found = passes(new(network), images()), [rank[name] for rank in ranks]
        for key in ("logits", "gradient of the images", "change"):
            whole, where = together(found, key), f"{name} {key}"
            assert_same(whole, expected[key], where, rtol=1e-10, atol=1e-10)
        for rank in found:
            for key in ("gradients", "state"):
                where = f"{name} {key}"
                assert_same(rank[key], expected[key], where, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_a_pass_is_one_exchange_a_layer_and_one_back(ranks: list[Found]) -> None:
    """Of three forward passes, and of one backward and one forward-mode derivative."""
    for name in NETWORKS:
        layers = sum(isinstance(m, SyncNorm) for m in synchronized(new(name)).modules())
        assert layers == (7 if name == "wide resnet" else 1)
        for rank in ranks:
            assert rank[name]["exchanges"] == [3 * layers, 2 * layers], name


@pytest.mark.slow
def test_in_evaluation_mode_a_rank_is_alone(ranks: list[Found]) -> None:
    """Inside `batch_statistics`, too."""
    for name in NETWORKS:
        for rank, found in enumerate(ranks):
            network = new(name)
            with batch_statistics(network):
                alone = network(images()[rank :: len(ranks)])
            assert_same(found[name]["alone"], alone.detach(), name, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_statistics_are_float32_and_about_the_mean(ranks: list[Found]) -> None:
    """The mean is a hundred times the deviation, and in bfloat16 the rounded images' are exact."""
    for dtype, error in ((torch.float32, 1e-4), (torch.bfloat16, 1e-2)):
        found = [rank["precisions"][str(dtype)] for rank in ranks]
        x = (images() + 1000.0).to(dtype).double().requires_grad_()
        norm = nn.BatchNorm2d(3).double()
        y = norm(x)
        y.sin().sum().backward()
        assert x.grad is not None
        for i, expected in enumerate((y.detach(), x.grad)):
            value = torch.stack([rank[i] for rank in found], 1).flatten(0, 1)
            assert value.dtype == dtype
            assert relative_error(value.double(), expected) < error
        for _, _, state in found:
            for key in ("running_mean", "running_var"):
                assert state[f"0.{key}"].dtype == torch.float32
                wanted = norm.get_buffer(key).float()
                torch.testing.assert_close(state[f"0.{key}"], wanted, rtol=1e-5, atol=0.0)


def test_gradients_and_derivatives_of_one_rank() -> None:
    norm = SyncNorm(nn.BatchNorm2d(3)).double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 2, 2, generator=generator, dtype=torch.float64)
    weight, bias = torch.randn(2, 3, generator=generator, dtype=torch.float64)

    def normalize(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        named = {"weight": weight, "bias": bias}
        with batch_statistics(norm):
            y: Tensor = torch.func.functional_call(norm, named, (x,))
        return y

    inputs = tuple(t.requires_grad_() for t in (x, weight.clone(), bias.clone()))
    torch.testing.assert_close(
        normalize(*inputs), F.batch_norm(x, None, None, weight, bias, training=True)
    )
    assert gradcheck(normalize, inputs, check_forward_ad=True)
    squares = normalize(*inputs).square().sum()
    gradient = torch.autograd.grad(squares, x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):  # it would lack the exchange
        gradient.sum().backward()


def test_states_are_those_of_the_replaced_norms() -> None:
    """Parameters are the same objects, and timm's activations are still there."""
    torch.manual_seed(0)
    network, images = models.build("efficientnet_b0", 5), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        network(images)  # or all statistics would be 0 and 1
        wanted = network.eval()(images)
    before, parameters = network.state_dict(), [*network.parameters()]
    changed = synchronized(network).eval()
    with torch.no_grad():
        assert torch.equal(changed(images), wanted)
    assert sum(isinstance(m, SyncNorm) for m in changed.modules()) == 49
    assert not any(isinstance(m, nn.BatchNorm2d) for m in changed.modules())
    assert_same(dict(changed.state_dict()), dict(before))
    assert all(a is b for a, b in zip(changed.parameters(), parameters, strict=True))


if __name__ == "__main__":
    main(sys.argv[1])
