"""Where a step's time goes: the methods that it calls, each timed with a wait for the device."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any
from unittest import mock

from tools.bench.clock import Work, seconds_of

REMAINDER = "labels, losses and Python"
PHASES = {  # methods of a Learner, then of a PlainStep; none calls another
    "__call__": "forward",
    "forward_batch_stats": "labeled loss",
    "backward": "backward",
    "optimizer_step": "update",
    "begin_step": "ends",
    "end_step": "ends",
    "teacher_forward": "teacher forward and losses",
    "student_forward": "student forward and loss",
    "student_update": "student backward and update",
    "teacher_update": "teacher backward and update",
    "update_average": "average of weights",
    "labeled_loss": "labeled loss",
    "teacher_loss": "feedback's loss",
    "read": "numbers read by the host",
}


def phases(step: Work, owners: Mapping[str, object]) -> dict[str, float]:
    """Seconds of one step by phase, in the order in which they first came; all sum up to the step.

    Waiting at every border removes overlap, so a step takes longer than without.
    """
    found: defaultdict[str, float] = defaultdict(float)
    names = {id(owner): name for name, owner in owners.items()}

    def timed(method: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def wrapped(owner: object, *given: Any, **named: Any) -> Any:
            returned = list[Any]()
            seconds = seconds_of(lambda: returned.append(method(owner, *given, **named)))
            found[phase if phase == "ends" else f"{names[id(owner)]} {phase}".strip()] += seconds
            return returned[0]

        return wrapped

    with ExitStack() as patches:
        for kind in {type(owner) for owner in owners.values()}:
            for name in PHASES.keys() & vars(kind).keys():
                wrapped = timed(vars(kind)[name], PHASES[name])
                patches.enter_context(mock.patch.object(kind, name, wrapped))
        whole = seconds_of(step)
    return {**found, REMAINDER: whole - sum(found.values())}
