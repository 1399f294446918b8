"""Networks by name have the published shape."""

import pytest
import torch

from mpl_fast import models
from mpl_fast.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "parameters"),
    # kekmodel/MPL-pytorch's WideResNet has 1,467,610 parameters at depth 28, width 2, 10 classes.
    [("wrn_28_2", 1_467_610), ("wrn_28_8", 23_354_842), ("wrn_10_1", 77_850)],
)
def test_wide_resnets_have_the_published_size(name: str, parameters: int) -> None:
    network = models.build(name, 10)
    assert models.count_parameters(network) == parameters
    assert network.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_timm_names_work() -> None:
    network = models.build("resnet18", 7, dropout=0.3, norm_momentum=0.05)
    assert network.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 7)
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and all(m.momentum == 0.05 for m in norms)


def test_dropout_is_on_the_features() -> None:
    torch.manual_seed(0)
    network = models.build("wrn_10_1", 10, dropout=0.5)
    network.train()
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        for m in network.modules():
            if isinstance(m, torch.nn.BatchNorm2d):
                m.eval()
        assert not torch.equal(network(images), network(images))
        network.eval()
        assert torch.equal(network(images), network(images))


def test_unknown_name_is_told_with_names_that_exist() -> None:
    with pytest.raises(ConfigError, match=r"'resnet51' is unknown to timm; names like .*resnet50"):
        models.build("resnet51", 10)
