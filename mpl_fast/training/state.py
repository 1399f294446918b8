"""What a checkpoint holds that all ranks share: the networks and the classes of a run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mpl_fast.algorithms.base import Algorithm
from mpl_fast.data.class_names import first_difference
from mpl_fast.data.manifest import Manifest
from mpl_fast.errors import CheckpointError
from mpl_fast.training.saving import State


def state_of(algorithm: Algorithm) -> State:
    """What a checkpoint holds of an algorithm."""
    learners, ensemble = algorithm.learners, algorithm.eval_ensemble.learners
    return {
        "learners": {name: learner.state_dict() for name, learner in learners.items()},
        "eval_ensemble": [name for name, learner in learners.items() if learner in ensemble],
        "algorithm": dict(algorithm.state),
    }


@contextmanager
def of_this_program(checkpoint: Path) -> Iterator[None]:
    """Turns what values of another program raise as they are restored into a `CheckpointError`."""
    try:
        yield
    except (KeyError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise CheckpointError(
            f"{checkpoint} is not of this program ({reason}): use one that this program wrote"
        ) from None


def restore(algorithm: Algorithm, shared: State, checkpoint: Path) -> None:
    """Loads a checkpoint's shared state into an algorithm. Raises `CheckpointError` if it is of
    another network or recipe."""
    try:
        for name, learner in algorithm.learners.items():
            learner.load_state_dict(shared["learners"][name])
        for name, value in algorithm.state.items():
            value.copy_(shared["algorithm"][name])
    except (KeyError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, KeyError) and error.args == ("algorithm",):
            names = ", ".join(algorithm.state)
            raise CheckpointError(
                f"{checkpoint} is older than this program and lacks the {names} of its "
                "algorithm: start again in another --run-dir"
            ) from None
        reason = " ".join(str(error).split())[:120]
        raise CheckpointError(f"{checkpoint} is of another network or recipe: {reason}") from None


def evaluated(shared: State, *, average: bool = True) -> dict[str, tuple[str, State]]:
    """The networks that a run evaluates, by learner: "average" or "network", and its state dict.

    Without `average`, networks themselves in place of their averages. Raises `CheckpointError` for
    the state of another program.
    """
    found = {}
    try:
        for name in shared.get("eval_ensemble", [*shared["learners"]][-1:]):
            state = shared["learners"][name]
            kind = "average" if average and state["average"] is not None else "network"
            if not isinstance(state[kind], dict):
                raise TypeError(f"{kind} of {name} is no state dict")
            found[name] = kind, state[kind]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"state.pt is not of this program: no networks ({error})") from None
    return found


def no_class_names(checkpoint: Path) -> str:
    """A warning about a checkpoint of an older version."""
    return f"{checkpoint} was written before class names were stored: labels are taken as they are"


def check_same_classes(shared: State, manifest: Manifest, checkpoint: Path) -> None:
    """Raises `CheckpointError` if data to resume with have other classes, or another order."""
    trained = shared.get("classes")
    if trained is not None and trained != [*manifest.classes]:
        raise CheckpointError(
            f"{checkpoint} was trained on other classes than {manifest.root} has: "
            f"{first_difference(trained, manifest.classes)}; resume with the data of before, or "
            "use another --run-dir"
        )
