"""Where a step's time goes: the methods that it calls, each timed with a wait for the device."""

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from unittest import mock

from tools.bench.clock import Work, seconds_of, wait_for_gpu

REMAINDER = "labels, losses and Python"
PHASES = {  # methods of a Learner, then of a PlainStep
    "__call__": "forward",
    "forward_no_grad": "forward without gradient",
    "forward_batch_stats": "labeled loss",
    "infer": "labeled loss",
    "labeled_gradient": "labeled gradient",
    "jvp": "derivative",
    "backward_and_step": "backward and update",
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

    Waiting at every border removes overlap, so a step takes longer than without. A method that
    another one calls counts to that one.
    """
    found: defaultdict[str, float] = defaultdict(float)
    with _timed(owners, found):
        whole = seconds_of(step)
    return {**found, REMAINDER: whole - sum(found.values())}


@contextmanager
def _timed(owners: Mapping[str, object], found: defaultdict[str, float]) -> Iterator[None]:
    names = {id(owner): name for name, owner in owners.items()}
    inside = False

    def wrapped(method: Callable[..., object], phase: str) -> Callable[..., object]:
        @functools.wraps(method)
        def timed(owner: object, *given: object, **named: object) -> object:
            nonlocal inside
            if inside or id(owner) not in names:
                return method(owner, *given, **named)
            inside = True
            wait_for_gpu()
            began = time.perf_counter()
            try:
                return method(owner, *given, **named)
            finally:
                wait_for_gpu()
                key = phase if phase == "ends" else f"{names[id(owner)]} {phase}".strip()
                found[key] += time.perf_counter() - began
                inside = False

        return timed

    with ExitStack() as stack:
        for kind in {type(owner) for owner in owners.values()}:
            for name, phase in PHASES.items():
                method = vars(kind).get(name)
                if method is not None:
                    stack.enter_context(mock.patch.object(kind, name, wrapped(method, phase)))
        yield
