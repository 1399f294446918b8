"""Files of weights: reads them without executing anything, and finds what fits a network.

Training codes save more than the state dict of a network: several of them with an optimizer and
options beside, and keys with the name of what contained the network as a prefix.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mpl_fast.errors import ConfigError
from mpl_fast.first_few import first_few

COUNTER = "num_batches_tracked"  # of batch norms; optional, since nothing reads it
# In keys whose shape depends on the size of the images; of timm's networks.
POSITIONS = re.compile("pos_emb|rel_pos|relative_pos|attention_biases|patch_pos")
AVERAGED = ("state_dict_ema", "model_ema")  # entries that are taken first, as timm does


class Ignored:
    """Replaces an object in a pickle that is not needed: nothing of its own class is called."""

    def __new__(cls, *_: object) -> "Ignored":
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        """Drops the state of the object."""


BESIDE_WEIGHTS: list[Any] = [  # by the names that they have in pickles
    (Ignored, "argparse.Namespace"),
    (Ignored, "pathlib.PosixPath"),
    (Ignored, "pathlib._local.PosixPath"),
    (Ignored, "numpy.dtype"),
    (Ignored, "numpy.core.multiarray.scalar"),
    (Ignored, "numpy._core.multiarray.scalar"),
]


# Key, tensors and class names of a state dict in a file.
Entry = tuple[str, Mapping[str, Tensor], Sequence[str] | None]


class Found(NamedTuple):
    """One state dict of a file."""

    entry: str  # "": the file has no other
    prefix: str  # removed from its keys
    tensors: dict[str, Tensor]
    left_out: list[str]  # keys without the prefix
    classes: Sequence[str] | None  # by label, in a checkpoint of this package

    @property
    def path(self) -> str:
        """Entry and prefix as ``FILE:ENTRY`` names them."""
        return ".".join(filter(None, (self.entry, self.prefix[:-1])))


class Misfit(NamedTuple):
    """How a state dict differs from that of a network, whose last layer does not count."""

    lacks: list[str]
    others: list[str]
    shapes: list[str]
    kinds: list[str]

    @property
    def only_positions(self) -> bool:
        """Whether it is of the same network for images of another size."""
        others = self.lacks or self.others or self.kinds
        return not others and all(POSITIONS.search(text) for text in self.shapes)

    def __str__(self) -> str:
        texts = "lacks", "has besides", "has in another shape", "has not as dense real numbers"
        found = zip(texts, self, strict=True)
        return "; ".join(f"{what} {first_few(keys, 3)}" for what, keys in found if keys)


def find(source: str, own: Mapping[str, Tensor], head: tuple[str, ...]) -> Found:
    """The state dict in a file that fits the network with the state dict `own`.

    `source` is ``FILE``, or ``FILE:ENTRY`` with an entry or prefix in it; `head` has the prefixes
    of the network's last layer. Raises `ConfigError` if none fits, or several fit.
    """
    file, entry = _split(source)
    found = [
        Found(name, prefix, *_below(prefix, tensors), classes)
        for name, tensors, classes in _state_dicts(_load(file), file)
        for prefix in _prefixes(tensors, own)
    ]
    if entry:
        found = _named(found, entry, source)
    misfits = [_misfit(one.tensors, own, head) for one in found]
    whole = [i for i, misfit in enumerate(misfits) if not misfit.lacks and not misfit.shapes]
    whole = [i for i in whole if found[i].entry in AVERAGED] or whole
    if len(whole) > 1:
        names = " and ".join(found[i].path or "no prefix" for i in whole)
        raise ConfigError(
            f"model.pretrained: {source} has the weights of {names}: name one as {file}:ENTRY"
        )
    nearest = whole[0] if whole else min(range(len(found)), key=lambda i: len(misfits[i].lacks))
    if wrong := str(misfits[nearest]):
        option, advice = "model.name", "give a file of the same network"
        if misfits[nearest].only_positions:
            option, advice = "data.image_size", "the file is for images of another size: set that"
        raise ConfigError(
            f"model.pretrained: {source} does not fit {option}: {found[nearest].entry or 'it'} "
            f"{wrong}; {advice}"
        )
    return found[nearest]


def _named(found: Sequence[Found], entry: str, source: str) -> list[Found]:
    """Those of an entry, or else of a prefix in one, or else of a prefix."""
    named = [one for one in found if one.entry == entry]
    named = named or [one for one in found if one.path == entry]
    named = named or [one for one in found if one.prefix == f"{entry}."]
    if not named:
        names = first_few(dict.fromkeys(one.entry for one in found if one.entry), 3)
        but = f", but {names}" if names else ": it is one state dict"
        raise ConfigError(f"model.pretrained: {source} has no entry {entry!r}{but}")
    return named


def _split(source: str) -> tuple[Path, str]:
    """File and entry; both may have colons."""
    parts = source.split(":")
    for length in range(len(parts), 0, -1):
        if (file := Path(":".join(parts[:length]))).is_file():
            return file, ":".join(parts[length:])
    raise ConfigError(f"model.pretrained: there is no file {source}; give a file, 'timm' or ''")


def _load(file: Path) -> Any:
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file  # comes with timm

            return load_file(file)
        with torch.serialization.safe_globals(BESIDE_WEIGHTS):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # these readers can raise anything for a damaged file
        if called := re.search(r"\bGLOBAL (\S+)", str(error)):
            raise ConfigError(
                f"model.pretrained: {file} needs {called[1]}, and nothing but tensors is taken "
                "from a pickle: if you trust it, load it yourself and save network.state_dict()"
            ) from error
        raise ConfigError(
            f"model.pretrained: {file} cannot be read ({reason(error)}); give a "
            ".safetensors file, or what torch.save made of network.state_dict()"
        ) from error


def _state_dicts(loaded: Any, file: Path) -> list[Entry]:
    if _is_state_dict(loaded):
        return [("", loaded, None)]
    entries: dict[Any, Any] = loaded if isinstance(loaded, dict) else {}
    classes = None
    if _are_learners(learners := entries.get("learners", {})):
        classes = entries.get("classes")
        entries = {k: v["average"] or v["network"] for k, v in learners.items()}
    found: list[Entry] = [(str(k), v, classes) for k, v in entries.items() if _is_state_dict(v)]
    if not found:
        names = (
            first_few(map(str, loaded), 3) if isinstance(loaded, dict) else type(loaded).__name__
        )
        raise ConfigError(
            f"model.pretrained: {file} has no state dict ({names}); save network.state_dict() alone"
        )
    return found


def _are_learners(entry: Any) -> bool:
    """Whether these are the networks in a checkpoint of this package."""
    return (
        isinstance(entry, dict)
        and len(entry) > 0
        and all(isinstance(one, dict) and "average" in one for one in entry.values())
    )


def _is_state_dict(loaded: Any) -> bool:
    return (
        isinstance(loaded, dict)
        and len(loaded) > 0
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in loaded.items())
    )


def _prefixes(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Prefixes of keys that end with one of a network's keys, and none."""
    found = {"": None}
    for key in given:
        parts = key.split(".")
        for length in range(1, len(parts)):
            if ".".join(parts[length:]) in own:
                found[".".join(parts[:length]) + "."] = None
    return [*found]


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors below a prefix without it, and the keys of the others."""
    inside = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    return inside, [key for key in tensors if not key.startswith(prefix)]


def _misfit(
    given: Mapping[str, Tensor], own: Mapping[str, Tensor], head: tuple[str, ...]
) -> Misfit:
    trunk = {key: value for key, value in own.items() if not key.startswith(head)}
    return Misfit(
        [key for key in trunk if key not in given and not key.endswith(COUNTER)],
        [key for key in given if key not in own and not key.startswith(head)],
        [
            f"{key} {tuple(given[key].shape)} for {tuple(value.shape)}"
            for key, value in trunk.items()
            if key in given and given[key].shape != value.shape
        ],
        [key for key, value in own.items() if value.is_floating_point() and not _real(given, key)],
    )


def _real(given: Mapping[str, Tensor], key: str) -> bool:
    """Whether a tensor, if it is there, can be copied into a weight: none that is quantized,
    sparse, complex, of integers, or without values (of the meta device)."""
    return key not in given or (
        given[key].is_floating_point()
        and given[key].layout is torch.strided
        and not given[key].is_meta
    )


def reason(error: Exception) -> str:
    """The kind of an error and its first sentence."""
    sentence = str(error).strip().partition("\n")[0].partition(". ")[0]
    return f"{type(error).__name__}: {sentence}" if sentence else type(error).__name__
