"""What a run has trained: its newest or best checkpoint, and the networks in it."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import nn

from mpl_fast import models
from mpl_fast.config import FinetuneConfig
from mpl_fast.config.run import CHECKPOINTS, WhichCheckpoint
from mpl_fast.data.class_names import positions, unshared
from mpl_fast.distributed import all_gather_object
from mpl_fast.errors import CheckpointError, ConfigError
from mpl_fast.learner import Learner
from mpl_fast.training.checkpoint import ATTEMPTS, newest, read_shared, replaced, step_of
from mpl_fast.training.saving import State
from mpl_fast.training.state import evaluated, no_class_names


def find_checkpoint(
    run: str | Path, which: WhichCheckpoint = "newest", option: str = ""
) -> tuple[Path, list[str]]:
    """A run's newest or best undamaged checkpoint, and a warning for each that was passed over.

    `option` names the run in errors. A collective. Raises `CheckpointError` if there is none.
    """
    folder, of = Path(run) / CHECKPOINTS[which], option and f"{option}: "
    if not Path(run).is_dir():
        raise ConfigError(f"{of}there is no folder {run}")
    checkpoint, damage = newest(folder)
    if checkpoint is None:
        why = "; ".join(damage) or "nothing has been saved there"
        advice = "give the run directory of a run that has trained"
        if which == "best":
            advice = "train with --checkpoint-best true, or use newest"
        raise CheckpointError(f"{of}{folder} holds no usable checkpoint ({why}): {advice}")
    return checkpoint, [f"{warning}; using {checkpoint.name}" for warning in damage]


def read_checkpoint(
    run: str | Path, which: WhichCheckpoint = "newest", option: str = ""
) -> tuple[Path, State, list[str]]:
    """What `find_checkpoint` finds and `read_shared` reads, and warnings.

    If a run that still trains removes the checkpoint meanwhile, the next one is taken. A
    collective.
    """
    for _ in range(ATTEMPTS):
        checkpoint, warnings = find_checkpoint(run, which, option)
        shared = None
        try:
            shared = read_shared(checkpoint)
        except CheckpointError:
            if checkpoint.exists():
                raise
        if all(all_gather_object(shared is not None)):
            assert shared is not None
            return checkpoint, shared, warnings
    raise replaced(Path(run) / CHECKPOINTS[which])


class Trained(NamedTuple):
    """The networks that a run evaluates, as its newest checkpoint has them."""

    option: str
    """Which names the run."""
    model: str
    """The model.name that the networks should be of."""
    checkpoint: Path
    weights: dict[str, tuple[str, State]]
    """By learner: "average" or "network", and its state dict."""
    about: str
    """How classes were mapped, as the end of a message."""
    warnings: list[str]
    """Of damaged checkpoints passed over, and if one has no class names."""


def read_trained(
    option: str, run: str, model: str, classes: Sequence[str], *, average: bool = True
) -> Trained:
    """The networks that the run in a folder evaluates, their heads in the order of `classes`.

    Without `average`, networks themselves in place of their averages. A collective. Raises
    `CheckpointError` if there is no checkpoint or it is of other classes.
    """
    checkpoint, shared, warnings = read_checkpoint(run, option=option)
    trained, about = shared.get("classes"), ""
    found = evaluated(shared, average=average)
    if trained is None:
        warnings.append(no_class_names(checkpoint))
    elif {*trained} != {*classes}:
        raise CheckpointError(
            f"{option}: {checkpoint} is of other classes than this data "
            f"({unshared(trained, classes)}); for a new last layer, use another recipe with "
            f"--model.pretrained {checkpoint}/state.pt:{[*found][-1]}"
        )
    elif trained != [*classes]:
        order = positions(classes, trained)
        about = "; its classes are in another order and were mapped by name"
        for name, (kind, weights) in found.items():
            found[name] = kind, models.with_class_order(weights, model, order)
    return Trained(option, model, checkpoint, found, about, warnings)


def load_trained(trained: Trained, name: str, network: nn.Module) -> None:
    """Loads the weights of one learner. Raises `CheckpointError` if they are of another network."""
    try:
        network.load_state_dict(trained.weights[name][1])
    except RuntimeError as error:
        reason = " ".join(str(error).partition(":")[2].split())[:120]
        raise CheckpointError(
            f"{trained.option}: {trained.checkpoint} is of another network or number of classes "
            f"than model.name {trained.model} for this data ({reason}): see "
            f"{trained.checkpoint.parents[1]}/config.yaml"
        ) from None


def load_start(
    config: FinetuneConfig, learner: Learner, model: str, classes: Sequence[str]
) -> tuple[str, list[str]]:
    """Loads the weights and statistics that fine-tuning starts from into a learner.

    They are those of the network that the run `config.start` evaluates, the last if there are two,
    its head in the order of `classes`. `model` is this run's model.name. Returns a message, and
    warnings. Raises `CheckpointError` if there is no checkpoint or it does not fit.
    """
    average = config.weights == "average"
    found = read_trained("algorithm.start", config.start, model, classes, average=average)
    name = [*found.weights][-1]
    for network in filter(None, (learner.network, learner.average)):
        load_trained(found, name, network)
    step, kind = step_of(found.checkpoint), found.weights[name][0]
    message = f"begins with the {kind} of {name} after step {step}, {found.checkpoint}"
    return message + found.about, found.warnings
