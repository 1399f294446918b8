"""The classifier head of a network."""

from typing import Any

from torch import nn


def head_prefixes(network: nn.Module) -> tuple[str, ...]:
    """Prefixes of the keys in `network.state_dict()` that belong to the last layer."""
    classifier: Any = network  # timm's networks and those of this package have this method
    found = classifier.get_classifier()  # one module, or several of a network with several heads
    heads = found if isinstance(found, tuple | list) else [found]
    return tuple(
        f"{name}." for name, module in network.named_modules() if any(module is h for h in heads)
    )
