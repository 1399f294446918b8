"""Stochastic depth is its definition, ours as timm's, and derivatives repeat its draws."""

from collections.abc import Callable

import pytest
import torch
from timm.layers.drop import DropPath as TimmDropPath
from torch import Tensor, nn

from mpl_fast import algorithms, models
from mpl_fast.algorithms import AlgorithmContext
from mpl_fast.algorithms.base import train_step
from mpl_fast.config import LearnerConfig, MetaSemiConfig, ModelConfig, MPLConfig, RunConfig
from mpl_fast.config.algorithms import AlgorithmConfig, SMPLConfig
from mpl_fast.errors import ConfigError
from mpl_fast.learner import Learner
from mpl_fast.models.drop_path import DropPath
from mpl_fast.training.trial import check_training
from tests.algorithms.problems import batch, relative_error

RATE, IMAGES = 0.3, 4000
OURS, TIMMS = DropPath(RATE), TimmDropPath(RATE)
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def dropped(layer: Callable[[Tensor], Tensor], branch: Tensor) -> Tensor:
    """Which images a layer leaves out, (N,) bool; all values of the others are divided."""
    torch.manual_seed(3)
    out = layer(branch)
    left_out = (out == 0).flatten(1).all(1)
    kept = out[~left_out].double(), branch[~left_out].double() / (1 - RATE)
    assert relative_error(*kept) < 2 * torch.finfo(branch.dtype).eps
    return left_out


@DEVICES
@pytest.mark.parametrize("layer", [OURS, TIMMS], ids=["ours", "timm's"])
def test_a_branch_is_left_out_image_by_image_and_its_mean_stays(
    layer: nn.Module, device: str
) -> None:
    """And the images are the same in 16 bits, as the derivative in 32 bits of a step needs."""
    branch = torch.rand(IMAGES, 2, 3, 1, device=device) + 0.5
    left_out = dropped(layer, branch)
    error = (RATE * (1 - RATE) / IMAGES) ** 0.5
    assert abs(left_out.float().mean() - RATE) < 4 * error
    pairs = (left_out[::2] & left_out[1::2]).float().mean()  # independent
    assert abs(pairs - RATE**2) < 4 * (RATE**2 / IMAGES * 2) ** 0.5
    assert torch.equal(dropped(layer, branch.bfloat16()), left_out)
    assert torch.equal(layer.eval()(branch), branch)
    layer.train()


@pytest.mark.parametrize("name", ["wrn_10_1", "shake_shake_8_8", "resnet18_cifar"])
def test_rates_rise_linearly_from_block_to_block(name: str) -> None:
    network = models.build(name, 10, drop_path=0.2)
    rates = [m.rate for m in network.modules() if isinstance(m, DropPath)]
    if not rates:  # timm's first block has no layer
        rates = [0.0] + [m.drop_prob for m in network.modules() if isinstance(m, TimmDropPath)]
    assert rates == pytest.approx([0.2 * i / (len(rates) - 1) for i in range(len(rates))])
    plain = models.build(name, 10).state_dict()
    assert network.state_dict().keys() == plain.keys()


@pytest.mark.parametrize("name", ["wrn_10_1", "shake_shake_8_8"])
def test_a_block_without_its_branch_is_its_shortcut(name: str) -> None:
    network = models.build(name, 10, drop_path=0.999).train()
    ran: list[tuple[Tensor, Tensor]] = []
    last = [*network.get_submodule("blocks").children()][-1]
    last.get_submodule("shortcut").register_forward_hook(lambda _, __, out: ran.append((out, out)))
    last.register_forward_hook(lambda _, __, out: ran.append((ran.pop()[0], out)))
    network(torch.randn(64, 3, 16, 16))
    ((shortcut, out),) = ran
    assert (shortcut == out).flatten(1).all(1).sum() >= 60


@pytest.mark.parametrize("name", ["convlarge", "vgg11", "hrnet_w18"])
def test_a_network_without_residual_branches_is_one_line(name: str) -> None:
    student = LearnerConfig(drop_path=0.1)
    config = RunConfig(model=ModelConfig(name=name), algorithm=MPLConfig(student=student))
    message = rf"^algorithm\.\*\.drop_path must be 0 for model\.name {name}, which has no stoch"
    with pytest.raises(ConfigError, match=message):
        check_training(config, 10, 1)


LEARNER = LearnerConfig(lr=0.1, warmup=0, max_grad_norm=0.0, nesterov=False, drop_path=0.5)
REPEATS: dict[str, tuple[AlgorithmConfig, int, list[int]]] = {
    # Microbatches, and the first training pass that leaves out the images of each.
    "exact": (MPLConfig(student=LEARNER, feedback="exact"), 2, [0, 1, 0, 1]),
    "central": (MPLConfig(student=LEARNER, feedback="exact", derivative="central"), 1, [0, 0, 0]),
    "per_example": (MPLConfig(student=LEARNER, feedback="per_example"), 1, [0, 0]),
    "smpl": (SMPLConfig(learner=LEARNER, feedback="exact"), 1, [0, 1, 1, 3]),
    "metasemi": (MetaSemiConfig(learner=LEARNER), 1, [0, 1]),  # its derivative leaves out none
}


@pytest.mark.parametrize("name", REPEATS)
def test_a_derivative_leaves_out_the_images_of_the_pass(name: str) -> None:
    config, microbatches, expected = REPEATS[name]

    def learner(chosen: LearnerConfig) -> Learner:
        network = models.build("wrn_10_1", 5, drop_path=chosen.drop_path).double()
        return Learner(network, chosen, steps=8)

    torch.manual_seed(0)
    made = algorithms.build(config, learner, AlgorithmContext(seed=1, microbatches=microbatches))
    trained = made.learners.get("student") or made.learners["learner"]
    passes: list[list[bool]] = []

    def note(layer: nn.Module, _: object, out: Tensor) -> None:
        if layer.training:
            passes.append((out.detach() == 0).flatten(1).all(1).tolist())

    last = [m for m in trained.network.modules() if isinstance(m, DropPath)][-1]
    last.register_forward_hook(note)
    train_step(made, batch(0, 8, 12, shape=(3, 8, 8)), 0)
    assert [passes.index(one) for one in passes] == expected


@pytest.mark.slow
@pytest.mark.parametrize("layer", [OURS, TIMMS], ids=["ours", "timm's"])
def test_generated_code_leaves_out_the_same_images(layer: nn.Module) -> None:
    """With `fallback_random`, as networks are compiled."""
    branch = torch.rand(50, 2, 3, 1) + 0.5
    with torch._inductor.config.patch(fallback_random=True):
        compiled = torch.compile(layer.train(), fullgraph=True)
        assert torch.equal(dropped(compiled, branch), dropped(layer, branch))
