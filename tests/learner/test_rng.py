"""Random numbers do not depend on the number of ranks, and replayed dropout restores the state."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpl_fast.config import RunConfig
from mpl_fast.distributed import DistEnv
from mpl_fast.learner import rng

CPU = torch.device("cpu")


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, world: int) -> None:
    monkeypatch.setattr(rng, "rank", lambda: rank)
    monkeypatch.setattr(rng, "world_size", lambda: world)


def drawn(kind: str, count: int, **at: int) -> Tensor:
    if kind == "uniform":
        return rng.uniform(count, device=CPU, **at)
    return rng.beta(count, 0.75, device=CPU, **at)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("kind", ["uniform", "beta"])
def test_ranks_together_have_what_one_has(
    kind: str, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = drawn(kind, 12, seed=5, step=9)
    together = torch.empty(12)
    for rank in range(world):
        as_rank(monkeypatch, rank, world)
        together[rank::world] = drawn(kind, 12 // world, seed=5, step=9)
    assert torch.equal(together, alone)


@pytest.mark.parametrize("kind", ["uniform", "beta"])
def test_numbers_depend_on_seed_and_step_and_on_nothing_else(kind: str) -> None:
    first = drawn(kind, 50, seed=1, step=2)
    torch.rand(3)
    assert torch.equal(drawn(kind, 50, seed=1, step=2), first)  # as after a resume
    for other in ({"seed": 2, "step": 2}, {"seed": 1, "step": 3}, {"seed": 2, "step": 1}):
        assert not torch.isclose(drawn(kind, 50, **other), first, atol=1e-4).any(), other


def test_streams_of_one_step_are_separate() -> None:
    uniform = rng.uniform(200, seed=1, step=2, device=CPU)
    flat = rng.beta(200, 1.0, seed=1, step=2, device=CPU)  # Beta(1, 1) is uniform as well
    both = torch.stack([uniform.sort().values, flat.sort().values])
    assert (both[0] - both[1]).abs().max() < 0.2
    assert abs(torch.corrcoef(torch.stack([uniform, flat]))[0, 1]) < 0.25


def test_uniforms_are_uniform_below_one() -> None:
    found = torch.cat([rng.uniform(1000, seed=0, step=t, device=CPU) for t in range(100)])
    assert found.dtype == torch.float32
    assert found.min() >= 0.0 and found.max() < 1.0
    assert abs(found.mean() - 0.5) < 4.5 * (1 / 12 / 1e5) ** 0.5
    assert ((found.double().sort().values - torch.arange(1e5) / 1e5).abs() < 0.01).all()


def test_betas_have_their_moments() -> None:
    found = torch.cat([rng.beta(1000, 0.75, seed=0, step=t, device=CPU) for t in range(50)])
    assert found.dtype == torch.float32 and found.min() >= 0.0 and found.max() <= 1.0
    assert found.mean().item() == pytest.approx(0.5, abs=0.008)
    assert found.var().item() == pytest.approx(1 / (4 * (2 * 0.75 + 1)), abs=0.004)


DEVICES = pytest.mark.parametrize(
    "device", [CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)], ids=str
)


@DEVICES
def test_replay_repeats_dropout_and_restores_the_generator(device: torch.device) -> None:
    """After an error, too."""
    layer, ones = nn.Dropout(0.5), torch.ones(4, 50, device=device)
    before = rng.rng_state(device)
    first, second = layer(ones), layer(ones)
    present = rng.rng_state(device)
    with pytest.raises(KeyError), rng.replay_rng(before, device):
        assert torch.equal(layer(ones), first)
        assert torch.equal(layer(ones), second)
        torch.rand(7)
        raise KeyError
    after = rng.rng_state(device)
    assert torch.equal(after.cpu, present.cpu)
    assert present.cuda is None or (
        after.cuda is not None and torch.equal(after.cuda, present.cuda)
    )
    assert not torch.equal(first, second)


@DEVICES
def test_dropout_has_the_mask_of_another_dtype(device: torch.device) -> None:
    """On a GPU the mask of a float32 tensor is another one than that of a 16-bit one."""
    x = torch.rand(64, 130, device=device) + 0.5
    torch.manual_seed(3)
    kept = F.dropout(x.bfloat16(), 0.3) != 0
    torch.manual_seed(3)
    with rng.DropoutMaskDtype(torch.bfloat16):
        y = nn.Dropout(0.3)(x)
    assert y.dtype == torch.float32 and torch.equal(y != 0, kept)
    torch.testing.assert_close(y[kept], x[kept] / 0.7)
    with rng.DropoutMaskDtype(torch.bfloat16):
        assert torch.equal(nn.Dropout(0.3).eval()(x), x)


@pytest.mark.gpu
def test_numbers_on_a_gpu_are_those_on_a_cpu() -> None:
    device = torch.device("cuda")
    uniform = rng.uniform(64, seed=1, step=2, device=device)
    assert torch.equal(uniform.cpu(), rng.uniform(64, seed=1, step=2, device=CPU))


def test_the_largest_seed_seeds_every_rank() -> None:
    rng.seed_run(RunConfig(seed=10**13), DistEnv(99_999, 100_000, CPU))
    assert torch.initial_seed() == (10**13 * 1_000_003 + 100_000) % 2**64


def test_what_a_checkpoint_saves_is_a_function_of_the_seed() -> None:
    found = []
    for _ in range(2):
        random.random()  # nothing that training draws from
        rng.seed_run(RunConfig(seed=5), DistEnv(0, 1, CPU))
        found.append(rng.generator_states())
    one, two = found
    assert all(str(one[name]) == str(two[name]) for name in one)
    assert torch.equal(one["torch"], two["torch"])
