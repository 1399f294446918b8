"""Networks by name: those of timm, and those of the semi-supervised CIFAR literature."""

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpl_fast.errors import ConfigError
from mpl_fast.models import pretrained as weights
from mpl_fast.models.conv_large import ConvLarge
from mpl_fast.models.frozen import freeze
from mpl_fast.models.shake_shake import ShakeShake
from mpl_fast.models.sync_norm import synchronized
from mpl_fast.models.wide_resnet import WideResNet

__all__ = [
    "OWN",
    "build",
    "count_parameters",
    "image_size",
    "size_option",
    "synchronized",
    "with_class_order",
]

WIDE = {"wrn_28_2": (28, 2), "wrn_28_8": (28, 8), "wrn_10_1": (10, 1)}  # depth, widening factor
SHAKE = {  # depth, channels of each branch in the first stage
    "shake_shake_26": (26, 96),
    "shake_shake_26_32": (26, 32),
    "shake_shake_8_8": (8, 8),
}
OWN = [*WIDE, *SHAKE, "convlarge"]


def build(
    name: str,
    classes: int,
    dropout: float = 0.0,
    norm_momentum: float = 0.0,
    *,
    image_size: int | None = None,
    pretrained: str = "",
    class_names: Sequence[str] = (),
    notes: list[str] | None = None,
    frozen: bool = False,
) -> nn.Module:
    """A network from ``(N, 3, H, W)`` images to ``(N, classes)`` logits.

    `dropout` applies to the pooled features; `norm_momentum` above 0 replaces the momentum of batch
    norms. `image_size`, in pixels, counts for timm's networks of a fixed size; None: timm's own.
    `pretrained` is empty for random weights, ``timm`` for those that timm publishes, or a file
    (`pretrained.load`), whose head is put into the order of `class_names`; a sentence about what
    was loaded is appended to `notes`. With `frozen` only the classifier head is trained
    (`frozen.freeze`). Raises `ConfigError` for an unknown name, and for weights that cannot be
    loaded or do not fit.
    """
    if name in OWN:
        network = _own(name, classes, dropout, pretrained)
    else:
        network = _timm(name, classes, dropout, image_size, pretrained)
    notes = [] if notes is None else notes
    if pretrained == "timm":
        notes.append(weights.about_timm(name, classes))
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


def _own(name: str, classes: int, dropout: float, pretrained: str) -> nn.Module:
    if pretrained == "timm":
        raise ConfigError(f"model.pretrained: timm has no network {name!r}; give a local file")
    if name in WIDE:
        return WideResNet(*WIDE[name], classes, dropout)
    if name in SHAKE:
        return ShakeShake(*SHAKE[name], classes, dropout)
    return ConvLarge(classes, dropout)


def _timm(
    name: str, classes: int, dropout: float, image_size: int | None, pretrained: str
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
    options |= size_option(name, image_size)
    if pretrained == "timm":
        return weights.from_timm(name, options)
    network: nn.Module = timm.create_model(name, **options)
    return network


def size_option(name: str, image_size: int | None) -> dict[str, int]:
    """What `timm.create_model` needs to build a network for images of this size: ``img_size`` for
    those of a fixed size, nothing for others, which refuse the argument."""
    import timm  # late: takes a second

    published = timm.get_pretrained_cfg(name)
    fixed = image_size and published and published.fixed_input_size
    return {"img_size": image_size} if image_size and fixed else {}


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
