"""Which part of a network is the classifier head: what transfer learning leaves out."""

from typing import Any

from torch import nn


def head_prefixes(network: nn.Module) -> tuple[str, ...]:
    """Beginnings of the names in `network.state_dict()` that belong to its last layer."""
    unknown: Any = network  # of timm's classes or of ours: they share this method
    found = unknown.get_classifier()  # one module, or several of a network with several heads
    heads = found if isinstance(found, tuple | list) else [found]
    return tuple(
        f"{name}." for name, module in network.named_modules() if any(module is h for h in heads)
    )
