"""A config beside that of the run that it resumes, or that it begins from."""

from pathlib import Path
from typing import Any

import yaml

from mpl_fast.config import RunConfig
from mpl_fast.config.aliases import current_options
from mpl_fast.config.command_line import as_yaml
from mpl_fast.config.run import CHECKPOINTS
from mpl_fast.errors import ConfigError
from mpl_fast.first_few import first_few
from mpl_fast.training.checkpoint import checkpoints_in
from mpl_fast.training.curves import METRICS, read_rows
from mpl_fast.untrusted import yaml_value

# Options that may change when a run is resumed, since they do not change what its steps compute.
FREE_OPTIONS = {
    "run_dir", "lock", "hang_timeout", "log_every", "stop_at", "eval_every", "eval_epochs",
    "eval_batch", "checkpoint_every", "checkpoint_keep", "checkpoint_best", "patience",
    "algorithm.teacher_graph", "on_spike", "spike_factor", "rollbacks",
    "compile", "cuda_graphs", "grad_sync",
    "data.root", "data.threads", "data.prefetch", "data.hw_decoder_load",
}  # fmt: skip
IMAGE_OPTIONS = ("data.image_size", "data.mean", "data.std")


def check_same_config(file: Path, config: RunConfig) -> None:
    """Raises `ConfigError` if a run directory with checkpoints has another config, or if its
    checkpoints are gone.

    `FREE_OPTIONS` may differ, and a start around the run directory, which moves with it.
    """
    folder = file.parent / CHECKPOINTS["newest"]
    if not checkpoints_in(folder):
        _check_none_lost(file, folder, config)
        return
    if not file.exists():
        return
    if changes := changes_since(file, config):
        shown = first_few(changes, 5)
        raise ConfigError(f"{file.parent} holds another run: {shown}; use another --run-dir")


def changes_since(file: Path, config: RunConfig) -> list[str]:
    """Options in which `config` differs from the config.yaml of a run, as phrases, without
    `FREE_OPTIONS` and a start around the run directory. Raises `ConfigError` if it is damaged."""
    old, new = _old_and_new(file, config)
    start = new.get("algorithm.start")
    around = {"algorithm.start"} if start and Path(start) == Path(config.run_dir).parent else set()
    free = FREE_OPTIONS | around
    keys = [k for k in {**old, **new} if k not in free and old.get(k) != new.get(k)]
    return [f"{k} was {_shown(old, k)} and is {_shown(new, k)}" for k in keys]


def _check_none_lost(file: Path, folder: Path, config: RunConfig) -> None:
    """Raises `ConfigError` if the checkpoints of an earlier run are gone, whose metrics a new one
    would replace. A run that was killed before its first checkpoint begins again."""
    run, metrics = file.parent, file.with_name(METRICS)
    step = max((row["step"] for row in read_rows(metrics)), default=-1) if metrics.exists() else -1
    every = _old_and_new(file, config)[0]["checkpoint_every"] if file.exists() else 0
    if not isinstance(every, int):
        raise ConfigError(
            f"{file} is damaged: its checkpoint_every is {every!r}, which is no number: use "
            "another --run-dir"
        )
    # Before any is complete, a run ends when it is killed during the first save, or when the first
    # two have failed, which it finds when the third is due at the latest.
    lost = step >= 0 and (not folder.is_dir() or 0 < 3 * every < step)
    if (run / "summary.json").exists():
        what = "summary.json"
    elif lost:
        what = f"metrics.jsonl up to step {step}"
    else:
        return
    raise ConfigError(
        f"{run} has the {what} of an earlier run, and {folder} holds no checkpoint of it: put its "
        "checkpoints back to resume it, or use another --run-dir"
    )


def other_images(start: str, config: RunConfig) -> str:
    """A warning if the run in folder `start` was trained on images of another size or
    normalization than the config has, or an empty text."""
    file = Path(start) / "config.yaml"
    if not file.exists():
        return ""
    old, new = _old_and_new(file, config)
    shown = ", ".join(
        f"{key} was {old[key]} and is {new[key]}" for key in IMAGE_OPTIONS if old[key] != new[key]
    )
    return shown and f"{start} was trained on other images: {shown}; give its values if not meant"


def _old_and_new(file: Path, config: RunConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options in the config.yaml of a run and those of `config`, by dotted key.

    An option that did not exist when the run began had the value that is its default now.
    """
    defaults, new = (
        _flat(yaml.safe_load(as_yaml(c)))
        for c in (RunConfig(algorithm=type(config.algorithm)()), config)
    )
    return defaults | current_options(_flat(_tree(file))), new


def _tree(file: Path) -> dict[str, Any]:
    """A run's config.yaml. Raises `ConfigError` if it is damaged."""
    try:
        tree = yaml_value(file)
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if not isinstance(tree, dict) or not tree:
        raise ConfigError(f"{file} is damaged: it holds no keys and values")
    return tree


def _shown(values: dict[str, Any], key: str) -> str:
    return str(values.get(key)) or '""'


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"  # in a damaged file a name may be anything
        leaves |= _flat(value, f"{key}.") if isinstance(value, dict) else {key: value}
    return leaves
