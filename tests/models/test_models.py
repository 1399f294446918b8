"""Networks by name have the published shape, and can be differentiated and compiled as training
does."""

import copy
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_image
from torch import Tensor
from torch.func import functional_call, jvp, vjp

from mpl_fast import models
from mpl_fast.errors import ConfigError
from mpl_fast.models.airbench import whitening_filters
from mpl_fast.models.shake_shake import shake

# One of each kind, small enough for two cores; images of 16 pixels are enough for all.
SMALL = ["wrn_10_1", "shake_shake_8_8", "convlarge", "airbench94"]
DROP_PATH = {"wrn_10_1": 0.3, "shake_shake_8_8": 0.3, "convlarge": 0.0, "airbench94": 0.0}
Weights = dict[str, Tensor]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # kekmodel/MPL-pytorch's WideResNet has 1,467,610 at depth 28, width 2, 10 classes.
        ("wrn_28_2", 1_467_610),
        ("wrn_28_8", 23_354_842),
        ("wrn_28_10", 36_479_194),  # arXiv 1605.07146: 36.5 M
        ("wrn_10_1", 77_850),
        # kuangliu/pytorch-cifar's ResNet18 and ResNet50.
        ("resnet18_cifar", 11_173_962),
        ("resnet50_cifar", 23_520_842),
        # MetaSemi's two networks, counted by running its definitions.
        ("convlarge", 3_121_802),
        # KellerJordan/cifar10-airbench's airbench94, without the bias of its first layer.
        ("airbench94", 1_971_328),
        ("shake_shake_26", 26_193_466),
    ],
)
def test_networks_have_the_published_size(name: str, parameters: int) -> None:
    with torch.device("meta"):
        network = models.build(name, 10)
        assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert models.count_parameters(network) == parameters


def test_whitening_makes_patches_of_a_photograph_equally_large_in_all_directions() -> None:
    """Before, the mean square along one direction is thousands of times that along another."""
    photograph = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1).double()
    pixels = F.avg_pool2d(photograph, 13)  # about as large as CIFAR's
    normalized = (pixels - pixels.mean((1, 2), True)) / pixels.std((1, 2), keepdim=True)
    filters = whitening_filters().double()
    assert torch.equal(filters[:12], -filters[12:])
    patches = F.unfold(normalized[None], 2)[0]
    before, after = (x @ x.T / x.shape[1] for x in (patches, filters[:12].flatten(1) @ patches))
    assert torch.linalg.cond(before) > 10_000 > 100 > torch.linalg.cond(after)


def test_a_cifar_stem_keeps_the_size_of_images() -> None:
    """And all other weights are timm's, in whose order and by whose names they are."""
    network = models.build("resnet18_cifar", 10).eval()
    original = timm.create_model("resnet18", num_classes=10)
    here, there = network.state_dict(), original.state_dict()
    assert [*here] == [*there]
    assert {key for key in here if here[key].shape != there[key].shape} == {"conv1.weight"}
    sizes: list[torch.Size] = []
    for number in range(1, 5):
        layer = network.get_submodule(f"layer{number}")
        layer.register_forward_hook(lambda _, __, out: sizes.append(out.shape[2:]))
    with torch.no_grad():
        network(torch.zeros(1, 3, 32, 32))
    assert sizes == [(32, 32), (16, 16), (8, 8), (4, 4)]
    assert here["conv1.weight"].std() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.05)
    assert models.image_size("resnet18_cifar") == 32


@pytest.mark.parametrize(
    ("name", "size", "first", "middle", "last"),
    [
        ("wrn_10_1", 46, "stem.weight", "blocks.0.norm1.weight", "head.bias"),
        ("shake_shake_8_8", 95, "stem.weight", "blocks.1.second.5.running_var", "head.bias"),
        ("airbench94", 38, "whiten.weight", "stages.2.running_var", "head.weight"),
        ("convlarge", 56, "features.0.0.weight", "features.5.1.bias", "head.bias"),
    ],
)
def test_names_in_checkpoints_stay(
    name: str, size: int, first: str, middle: str, last: str
) -> None:
    names = [*models.build(name, 10).state_dict()]
    assert (len(names), names[0], names[-1]) == (size, first, last)
    assert middle in names


def test_timm_names_work() -> None:
    network = models.build("resnet18", 7, dropout=0.3, norm_momentum=0.05)
    assert network.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 7)
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and all(m.momentum == 0.05 for m in norms)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18"])
def test_a_network_of_fixed_size_is_made_for_the_images(name: str) -> None:
    network = models.build(name, 7, image_size=32).eval()
    assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 7)
    assert models.image_size(name) == 224


@pytest.mark.parametrize("name", SMALL)
def test_noise_is_there_in_training_only(name: str) -> None:
    """Dropout of the pooled features, and a network's own noise."""
    torch.manual_seed(0)
    network, images = models.build(name, 10, dropout=0.5), torch.randn(4, 3, 16, 16)
    noisy = name in ("shake_shake_8_8", "convlarge")
    own = models.build(name, 10).train() if noisy else network.train()
    with torch.no_grad():
        assert not torch.equal(own(images), own(images))
        network.eval()
        assert torch.equal(network(images), network(images))
        network.get_submodule("dropout").train()
        assert not torch.equal(network(images), network(images))


@pytest.mark.parametrize("name", ["resnet51", "resnet50.no_such_weights", "wrn_28_3"])
def test_unknown_name_is_refused_with_names_that_exist(name: str) -> None:
    near = {"wrn_28_3": "wrn_28_2"}.get(name, "resnet50")
    with pytest.raises(ConfigError, match=rf"'{name}' is unknown to timm; names like .*{near}"):
        models.build(name, 10)


def test_shake_mixes_by_one_draw_forward_and_another_backward() -> None:
    """The coefficients that come out are uniform in [0, 1), one for each image, independent."""
    torch.manual_seed(1)
    images = 4000
    first, second = torch.randn(2, images, 2, 3, 1, dtype=torch.float64)
    first.requires_grad_(), second.requires_grad_()
    mixed = shake(first, second)
    alphas = (mixed - second) / (first - second)  # (images, 2, 3, 1)
    to_first, to_second = torch.autograd.grad(mixed.sum(), (first, second))
    alpha, beta = alphas[:, 0, 0, 0].detach(), to_first[:, 0, 0, 0]
    assert (alphas - alpha[:, None, None, None]).abs().max() < 1e-8
    assert torch.equal(to_first, beta[:, None, None, None].expand_as(to_first))
    assert (to_first + to_second - 1).abs().max() < 1e-12
    for draw in (alpha, beta):  # standard errors: mean 0.0046, variance 0.0012
        assert 0 <= draw.min() < 0.01 and 0.99 < draw.max() < 1
        assert abs(draw.mean() - 1 / 2) < 0.02 and abs(draw.var() - 1 / 12) < 0.005
    assert abs(torch.corrcoef(torch.stack((alpha, beta)))[0, 1]) < 0.06


def test_shake_repeats_from_the_same_random_state() -> None:
    """Value and gradient both, so that a resumed or recomputed step is the same step."""
    network, images = models.build("shake_shake_8_8", 10), torch.randn(4, 3, 16, 16)

    def gradients() -> list[Tensor]:
        torch.manual_seed(3)
        replica = copy.deepcopy(network).train()
        return [*torch.autograd.grad(replica(images).square().sum(), [*replica.parameters()])]

    one, other = gradients(), gradients()
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def problem(name: str, *, training: bool) -> tuple[Callable[[Weights], Tensor], Weights, Weights]:
    """Logits in float64 as a function of the weights, with the same noise at each call; weights
    and a direction."""
    torch.manual_seed(5)
    network = models.build(name, 10, dropout=0.2, drop_path=DROP_PATH[name])
    network = network.double().train(training)
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    weights = {key: p.detach() for key, p in network.named_parameters()}
    direction = {key: torch.randn_like(p) / p.numel() ** 0.5 for key, p in weights.items()}

    def logits(given: Weights) -> Tensor:
        torch.manual_seed(11)
        statistics = {key: b.clone() for key, b in network.named_buffers()}
        out: Tensor = functional_call(network, {**given, **statistics}, (images,))
        return out

    return logits, weights, direction


@pytest.mark.parametrize(
    ("name", "training"),
    # Not shake-shake in training, where values are of another mix than derivatives, nor airbench94,
    # where the maximum of a window of noise is often two equal values, of which one is derived.
    [("wrn_10_1", True), ("convlarge", True), ("shake_shake_8_8", False)],
)
def test_forward_derivatives_are_those_of_finite_differences(name: str, training: bool) -> None:
    logits, weights, direction = problem(name, training=training)
    value, slope = jvp(logits, (weights,), (direction,))[:2]
    step = 1e-7
    ahead, behind = (
        logits({key: w + moved * direction[key] for key, w in weights.items()})
        for moved in (step, -step)
    )
    assert torch.equal(value, logits(weights))
    assert ((ahead - behind) / (2 * step) - slope).norm() < 1e-4 * slope.norm()


@pytest.mark.parametrize("name", SMALL)
def test_forward_derivatives_are_the_transpose_of_backward_ones(name: str) -> None:
    """In training, with the same noise: which exact feedback depends on, for shake-shake too."""
    logits, weights, direction = problem(name, training=True)
    value, slope = jvp(logits, (weights,), (direction,))[:2]
    cotangent = torch.randn_like(value)
    (pulled,) = vjp(logits, weights)[1](cotangent)
    along = sum((pulled[key] * direction[key]).sum() for key in weights)
    assert torch.allclose((slope * cotangent).sum(), torch.as_tensor(along), rtol=1e-10)


@pytest.mark.parametrize("name", ["convlarge", "airbench94", "shake_shake_8_8"])
def test_training_is_one_compiled_graph(name: str) -> None:
    """`fullgraph` raises at a graph break; values and random numbers are eager's."""
    network = models.build(name, 10, drop_path=DROP_PATH[name]).train()
    images = torch.randn(4, 3, 16, 16)
    replica = copy.deepcopy(network)
    replica.compile(fullgraph=True, backend="aot_eager")
    results = []
    for each in (network, replica):
        torch.manual_seed(2)
        logits = each(images)
        loss = logits.square().sum()
        trained = [p for p in each.parameters() if p.requires_grad]
        results.append([logits, *torch.autograd.grad(loss, trained)])
    for wanted, got in zip(*results, strict=True):
        assert (got - wanted).norm() <= 1e-4 * wanted.norm() + 1e-4


@pytest.mark.slow
def test_a_shake_is_eagers_in_generated_code() -> None:
    """With `fallback_random`, as networks are compiled; a whole network takes minutes."""
    compiled = torch.compile(shake, fullgraph=True)
    first, second = torch.randn(2, 4, 2, 3, 3).requires_grad_().unbind()
    results = []
    with torch._inductor.config.patch(fallback_random=True):
        for function in (shake, compiled):
            torch.manual_seed(2)
            mixed = function(first, second)
            results.append([mixed, *torch.autograd.grad(mixed.square().sum(), (first, second))])
    for wanted, got in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)
