"""Pretrained weights: from a local file, or those that timm publishes."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mpl_fast.data.class_names import positions, unshared
from mpl_fast.errors import ConfigError
from mpl_fast.first_few import first_few
from mpl_fast.models.head import head_prefixes
from mpl_fast.models.weights_file import AVERAGED, Found, find, reason


def load(network: nn.Module, source: str, classes: Sequence[str]) -> tuple[str, list[int]]:
    """Loads a network from ``FILE``, or from one entry or prefix of a larger file, ``FILE:ENTRY``.

    FILE is a ``.safetensors``, or what ``torch.save`` made of a state dict or of several, such as a
    checkpoint of this package, ``RUN/checkpoints/step_N/state.pt:student``; averaged weights are
    loaded if there are any. The classifier head is not loaded if the file has none, or one of
    another shape or, where it has their names, of other `classes`. Returns a sentence about what
    was loaded and, if the file has the classes in another order, the row of each class. Raises
    `ConfigError` for a file that cannot be read or does not fit otherwise.
    """
    own, prefixes = network.state_dict(), head_prefixes(network)
    found = find(source, own, prefixes)
    head = {key: value for key, value in own.items() if key.startswith(prefixes)}
    about, order = _head(found, head, classes)
    given = {key: value for key, value in found.tensors.items() if key in own}
    network.load_state_dict(own | given | (head if order is None else {}))
    how = [f"its {found.entry}"] if found.entry and not source.endswith(f":{found.entry}") else []
    how += ["which is averaged"] if found.entry in AVERAGED else []
    how += [f"keys below {found.prefix}"] if found.prefix else []
    how += [f"not {first_few(found.left_out, 3)}"] if found.left_out else []
    details = f" ({', '.join(how)})" if how else ""
    return f"begins with the weights of {source}{details}; the last layer {about}", order or []


def _head(
    found: Found, head: Mapping[str, Tensor], classes: Sequence[str]
) -> tuple[str, list[int] | None]:
    """What becomes of a file's head: as text, and the row of each class, None if it is not taken,
    empty if rows stay in their order. `head`: that of the network."""
    given = found.tensors
    if not any(key in given for key in head):
        return "is new: the file has none", None
    if any(key not in given or given[key].shape != value.shape for key, value in head.items()):
        return "is new: the file's has another shape", None
    if found.classes is None:
        return "is taken, classes in its order: the file has no class names", []
    if {*found.classes} != {*classes}:
        return f"is new: the file's has other classes ({unshared(found.classes, classes)})", None
    if [*found.classes] == [*classes]:
        return "is taken", []
    return "is taken, its classes by name: the file has another order", positions(
        classes, found.classes
    )


def from_timm(name: str, options: dict[str, Any]) -> nn.Module:
    """A timm network with its published weights, from timm's cache or the internet.

    `options` are those of ``timm.create_model``. The head is loaded if it has as many classes;
    position embeddings are resampled for another image size. Raises `ConfigError` if there are no
    weights.
    """
    import timm  # late: takes a second

    published: Any = timm.get_pretrained_cfg(name)
    if published is None or not published.has_weights:
        raise ConfigError(f"model.pretrained: timm has no weights for {name!r}; give a local file")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # no line for each retry
    try:
        network: nn.Module = timm.create_model(name, pretrained=True, **options)
    except Exception as error:  # of the hub, the cache or the file, from many libraries
        raise ConfigError(
            f"model.pretrained: timm's weights for {name!r} could not be had "
            f"({reason(error)}); without internet, download model.safetensors from "
            f"https://huggingface.co/timm/{published.architecture}.{published.tag} elsewhere and "
            "give --model.pretrained FILE, or --model.pretrained '' for random weights"
        ) from error
    return network


def about_timm(name: str, classes: int) -> str:
    """A sentence about what `from_timm` loads."""
    import timm  # late: takes a second

    published: Any = timm.get_pretrained_cfg(name)
    there = published.num_classes
    about = "taken, in timm's order" if there == classes else f"new: theirs has {there} classes"
    return f"begins with the weights that timm publishes; the last layer is {about}"
