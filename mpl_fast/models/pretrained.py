"""Pretrained weights: from a local file, or those that timm publishes."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpl_fast.errors import ConfigError
from mpl_fast.models.head import head_prefixes

COUNTER = "num_batches_tracked"  # of batch norms; optional, since nothing reads it
WRAPPED = "module."  # prefix of every key of a saved DistributedDataParallel
SHOWN = 3  # keys in an error message


def load(network: nn.Module, source: str) -> None:
    """Loads a network from ``FILE``, or from one entry of a larger file, ``FILE:ENTRY``.

    FILE is a ``.safetensors`` or a ``torch.save`` of the network's state dict. ENTRY is a key in
    it, or a learner in a checkpoint of this package, ``RUN/checkpoints/step_N/state.pt:student``;
    its averaged weights are loaded if there are any. The classifier head is not loaded if the file
    has none or one of another shape. Raises `ConfigError` for a file that cannot be read or does
    not fit otherwise.
    """
    given, own, head = _read(source), network.state_dict(), head_prefixes(network)
    _check(source, given, own, head)
    heads = [key for key in own if key.startswith(head)]
    if not all(key in given and given[key].shape == own[key].shape for key in heads):
        given = {key: value for key, value in given.items() if not key.startswith(head)}
    network.load_state_dict(own | given)


def from_timm(name: str, options: dict[str, Any]) -> nn.Module:
    """A timm network with its published weights, from timm's cache or the internet.

    `options` are those of ``timm.create_model``. The head is loaded if it has as many classes;
    position embeddings are resampled for another image size. Raises `ConfigError` if there are no
    weights.
    """
    import timm  # late: takes a second

    published = timm.get_pretrained_cfg(name)
    if published is None or not published.has_weights:
        raise ConfigError(f"model.pretrained: timm has no weights for {name!r}; give a local file")
    try:
        network: nn.Module = timm.create_model(name, pretrained=True, **options)
    except Exception as error:  # of the hub, the cache or the file, from many libraries
        raise ConfigError(
            f"model.pretrained: timm's weights for {name!r} could not be had "
            f"({_reason(error)}); without internet, download them elsewhere and give the file"
        ) from error
    return network


def _read(source: str) -> dict[str, Tensor]:
    file, entry = _split(source)
    if not file.is_file():
        raise ConfigError(f"model.pretrained: there is no file {file}; give a file, 'timm' or ''")
    try:
        loaded = _read_file(file)
    except Exception as error:  # these readers can raise anything for a damaged file
        raise ConfigError(
            f"model.pretrained: {file} cannot be read ({_reason(error)}); give a "
            ".safetensors file, or what torch.save made of network.state_dict()"
        ) from error
    tensors: dict[str, Tensor] = _entry(loaded, entry, source) if entry else loaded
    if isinstance(tensors, dict) and isinstance(networks := tensors.get("learners"), dict):
        names = " and ".join(map(str, networks))
        raise ConfigError(
            f"model.pretrained: {source} is a checkpoint of {names}: name one as {file}:ENTRY"
        )
    if not _is_state_dict(tensors):
        names = list(map(str, tensors)) if isinstance(tensors, dict) else type(tensors).__name__
        raise ConfigError(
            f"model.pretrained: {source} is no state dict ({_some(names)}); name one of its "
            f"entries as {file}:ENTRY, or save network.state_dict() alone"
        )
    if all(key.startswith(WRAPPED) for key in tensors):
        return {key.removeprefix(WRAPPED): value for key, value in tensors.items()}
    return tensors


def _split(source: str) -> tuple[Path, str]:
    """File and entry; an existing file whose name has a colon has no entry."""
    file, colon, entry = source.rpartition(":")
    if not colon or Path(source).is_file():
        return Path(source), ""
    return Path(file), entry


def _read_file(file: Path) -> Any:
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file  # comes with timm

        return load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True)


def _entry(loaded: Any, entry: str, source: str) -> Any:
    learners = loaded.get("learners", {}) if isinstance(loaded, dict) else {}
    if entry in learners:
        return learners[entry]["average"] or learners[entry]["network"]
    if isinstance(loaded, dict) and entry in loaded:
        return loaded[entry]
    names = [*learners] or [*loaded] if isinstance(loaded, dict) else []
    raise ConfigError(f"model.pretrained: {source} has no entry {entry!r}, but {_some(names)}")


def _is_state_dict(loaded: Any) -> bool:
    return isinstance(loaded, dict) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in loaded.items()
    )


def _check(
    source: str, given: dict[str, Tensor], own: dict[str, Tensor], head: tuple[str, ...]
) -> None:
    trunk = {key: value for key, value in own.items() if not key.startswith(head)}
    lacks = [key for key in trunk if key not in given and not key.endswith(COUNTER)]
    others = [key for key in given if key not in own and not key.startswith(head)]
    shapes = [
        f"{key} {tuple(given[key].shape)} for {tuple(value.shape)}"
        for key, value in trunk.items()
        if key in given and given[key].shape != value.shape
    ]
    found = [("lacks", lacks), ("has besides", others), ("has in another shape", shapes)]
    wrong = "; ".join(f"{what} {_some(keys)}" for what, keys in found if keys)
    if wrong:
        raise ConfigError(
            f"model.pretrained: {source} does not fit model.name: it {wrong}; give a file of "
            "the same network"
        )


def _some(names: list[str] | str) -> str:
    if isinstance(names, str):
        return names
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _reason(error: Exception) -> str:
    sentence = str(error).strip().partition("\n")[0].partition(". ")[0]
    return f"{type(error).__name__}: {sentence}" if sentence else type(error).__name__
