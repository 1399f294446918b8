"""Networks by name: those of timm, and those of the semi-supervised CIFAR literature."""

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpl_fast.errors import ConfigError
from mpl_fast.models import pretrained as weights
from mpl_fast.models.airbench import Airbench
from mpl_fast.models.conv_large import ConvLarge
from mpl_fast.models.frozen import freeze
from mpl_fast.models.shake_shake import ShakeShake
from mpl_fast.models.sync_norm import synchronized
from mpl_fast.models.wide_resnet import WideResNet

__all__ = [
    "build",
    "count_parameters",
    "image_size",
    "in_timm",
    "initial_statistics_share",
    "size_option",
    "synchronized",
    "with_class_order",
]

WIDE = {  # depth, widening factor
    "wrn_28_2": (28, 2),
    "wrn_28_8": (28, 8),
    "wrn_28_10": (28, 10),
    "wrn_10_1": (10, 1),
}
SHAKE = {  # depth, channels of each branch in the first stage
    "shake_shake_26": (26, 96),
    "shake_shake_26_32": (26, 32),
    "shake_shake_8_8": (8, 8),
}
CIFAR = {"resnet18_cifar": "resnet18", "resnet50_cifar": "resnet50"}  # timm's name
PLAIN: dict[str, Callable[[int, float], nn.Module]] = {
    "airbench94": Airbench,
    "convlarge": ConvLarge,
}
OWN = [*WIDE, *SHAKE, *PLAIN, *CIFAR]


def build(
    name: str,
    classes: int,
    dropout: float = 0.0,
    norm_momentum: float = 0.0,
    *,
    drop_path: float = 0.0,
    image_size: int | None = None,
    pretrained: str = "",
    class_names: Sequence[str] = (),
    notes: list[str] | None = None,
    frozen: bool = False,
) -> nn.Module:
    """A network from ``(N, 3, H, W)`` images to ``(N, classes)`` logits.

    `dropout` applies to the pooled features; `drop_path` is the last residual block's rate of
    stochastic depth; `norm_momentum` above 0 replaces the momentum of batch norms. `image_size`, in
    pixels, counts for timm's networks of a fixed size; None: timm's own.
    `pretrained` is empty for random weights, ``timm`` for those that timm publishes, or a file
    (`pretrained.load`), whose head is put into the order of `class_names`; a sentence about what
    was loaded is appended to `notes`. With `frozen` only the classifier head is trained
    (`frozen.freeze`). Raises `ConfigError` for an unknown name, for a `drop_path` above 0 of a
    network without residual branches, and for weights that cannot be loaded or do not fit.
    """
    if name in OWN and name not in CIFAR:
        network = _own(name, classes, dropout, drop_path, pretrained)
    else:
        original = CIFAR.get(name, name)
        network = _timm(original, classes, dropout, drop_path, image_size, pretrained)
        if name in CIFAR:
            _keep_size(network)
    notes = [] if notes is None else notes
    if pretrained == "timm":
        new = "; the first convolution is new" if name in CIFAR else ""
        notes.append(weights.about_timm(CIFAR.get(name, name), classes) + new)
    elif pretrained:
        note, order = weights.load(network, pretrained, class_names)
        notes.append(note)
        if order:
            network.load_state_dict(with_class_order(network.state_dict(), name, order))
    if norm_momentum:
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = norm_momentum
    if frozen:
        freeze(network)
    return network


def _own(name: str, classes: int, dropout: float, drop_path: float, pretrained: str) -> nn.Module:
    if pretrained == "timm":
        raise ConfigError(f"model.pretrained: timm has no network {name!r}; give a local file")
    if name in WIDE:
        return WideResNet(*WIDE[name], classes, dropout, drop_path)
    if name in SHAKE:
        return ShakeShake(*SHAKE[name], classes, dropout, drop_path)
    if drop_path:
        raise _no_drop_path(name)
    return PLAIN[name](classes, dropout)


def _no_drop_path(name: str) -> ConfigError:
    return ConfigError(
        f"algorithm.*.drop_path must be 0 for model.name {name}, which has no stochastic depth"
    )


def _timm(
    name: str,
    classes: int,
    dropout: float,
    drop_path: float,
    image_size: int | None,
    pretrained: str,
) -> nn.Module:
    import timm  # late: takes a second

    architecture, dot, _ = name.partition(".")  # resnet50.a1_in1k: the weights' tag after the dot
    tagged = timm.list_models(architecture, include_tags=True) if dot else []
    if not timm.is_model(name) or (dot and name not in tagged):
        names = [*OWN, *timm.list_models(), *tagged]
        near = difflib.get_close_matches(name, names, n=4) or OWN
        raise ConfigError(
            f"model.name {name!r} is unknown to timm; names like {', '.join(near)} exist"
        )
    options: dict[str, Any] = {"num_classes": classes, "drop_rate": dropout}
    if drop_path:
        options["drop_path_rate"] = drop_path
    options |= size_option(name, image_size)
    try:
        if pretrained == "timm":
            return weights.from_timm(name, options)
        network: nn.Module = timm.create_model(name, **options)
    except TypeError as error:
        if "drop_path_rate" not in str(error):
            raise
        raise _no_drop_path(name) from error
    return network


def in_timm(name: str) -> bool:
    """Whether `timm.create_model` builds this network; else only `build` does."""
    return name not in OWN and name not in CIFAR


def size_option(name: str, image_size: int | None) -> dict[str, int]:
    """What `timm.create_model` needs to build a network for images of this size: ``img_size`` for
    those of a fixed size, nothing for others, which refuse the argument."""
    import timm  # late: takes a second

    published = timm.get_pretrained_cfg(name)
    fixed = image_size and published and published.fixed_input_size
    return {"img_size": image_size} if image_size and fixed else {}


def _keep_size(network: Any) -> None:
    """Replaces the first layers of timm's ResNet, which reduce the resolution to a quarter, by a
    3x3 convolution of stride 1, as usual for images of 32 pixels."""
    network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")  # as timm's
    network.maxpool = nn.Identity()


def image_size(name: str) -> int:
    """Pixels of a side of the images that a network was made for."""
    if name in OWN:
        return 32
    import timm  # late: takes a second

    published = timm.get_pretrained_cfg(name)
    return int(published.input_size[-1]) if published else 224


def with_class_order(
    weights: Mapping[str, Tensor], name: str, order: Sequence[int]
) -> dict[str, Tensor]:
    """The weights of network `name` with class i of the result being class ``order[i]`` of these.

    Tensors with a row for each class are those that would be larger with more classes; which
    layers a head has besides differs between networks.
    """
    with torch.device("meta"):
        here, wider = (build(name, len(order) + more).state_dict() for more in (0, 1))
    rows = {key for key, value in here.items() if value.shape != wider[key].shape}
    return {key: value[[*order]] if key in rows else value for key, value in weights.items()}


def count_parameters(network: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(math.prod(p.shape) for p in network.parameters() if p.requires_grad)


def initial_statistics_share(network: nn.Module, steps: int) -> tuple[float, float]:
    """The momentum of the slowest batch norm, and the share that its running statistics still have
    of their initial values (mean 0, variance 1) after as many steps; (0, 0) without batch norms."""
    norms = [one for one in network.modules() if isinstance(one, nn.modules.batchnorm._BatchNorm)]
    momenta = [one.momentum for one in norms if one.track_running_stats and one.momentum]
    slowest = min(momenta, default=0.0)
    return slowest, (1.0 - slowest) ** steps if slowest else 0.0
