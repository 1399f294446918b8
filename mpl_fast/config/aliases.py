"""Every name that changed and is still read: options, their values, checkpoint keys, metrics.

Old names are accepted in YAML files, on the command line and in the files of a run directory;
nothing writes them. A name is added here when it changes, and nowhere else.
"""

from collections.abc import Mapping
from typing import TypeVar

Item = TypeVar("Item")

_LEARNER = {"clip": "max_grad_norm", "wait": "delay_steps"}
OPTION_NAMES: dict[str, str] = {
    "gradients": "grad_sync",
    "data.weak": "data.crop",
    "data.layers": "data.num_ops",
    "algorithm.smoothing": "algorithm.label_smoothing",
    "algorithm.student_wait": "algorithm.student_delay_steps",
    **{
        f"algorithm.{network}.{old}": f"algorithm.{network}.{new}"
        for network in ("learner", "teacher", "student")
        for old, new in _LEARNER.items()
    },
}
"""Old dotted key of an option: its present key."""

OPTION_VALUES: dict[str, dict[str, str]] = {
    "data.crop": {"imagenet": "random_resized", "cifar": "pad_crop"},
    "grad_sync": {"flat": "allreduce"},
}
"""Present dotted key of an option: old value, present value."""

CHECKPOINT_KEYS: dict[str, str] = {"voters": "eval_ensemble", "seconds": "train_seconds"}
"""Of state.pt, the file of a checkpoint that all ranks share."""

METRIC_NAMES: dict[str, str] = {"h": "feedback", "seconds": "train_seconds"}
"""Of metrics.jsonl and summary.json."""


def renamed(items: Mapping[str, Item], names: Mapping[str, str]) -> dict[str, Item]:
    """The items in their order, each old name of `names` replaced by its present one."""
    return {names.get(name, name): item for name, item in items.items()}


def current_options(options: Mapping[str, Item]) -> dict[str, Item | str]:
    """Options under their present dotted keys and with their present values."""
    return {
        key: OPTION_VALUES.get(key, {}).get(str(value), value)
        for key, value in renamed(options, OPTION_NAMES).items()
    }


def changes(options: Mapping[str, object]) -> list[str]:
    """One phrase for each old name and old value among options, such as ``wait is now
    delay_steps``; one for a name that several sections have."""
    found = []
    for key, value in options.items():
        present = OPTION_NAMES.get(key, key)
        if key in OPTION_NAMES:
            found.append(f"{_leaf(key)} is now {_leaf(present)}")
        if (new := OPTION_VALUES.get(present, {}).get(str(value))) is not None:
            found.append(f"{_leaf(present)} {value} is now {new}")
    return list(dict.fromkeys(found))


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]
