"""How far a replayed run is from the recorded one: relative differences, quantity by quantity."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mpl_fast.experiments.replay_file import Array, Knobs, Row, Run, Weights

FLOOR = 1e-3  # sizes below it count as this one: rounding is absolute there
SHARE = 1e-2  # so do weights below this share of the largest in their tensor


class Difference(NamedTuple):
    """The largest one of a quantity in one place, and the two numbers that differ most."""

    quantity: str
    where: str  # a step, or a weight after the last one
    relative: float
    ours: float
    theirs: float


def differences(
    run: Run, log: Sequence[Row], finals: dict[str, Weights], knobs: Knobs
) -> Iterator[Difference]:
    """Of everything that the file records of a run, in order.

    Relative is |ours - theirs| / max(|theirs|, floor). The floor is FLOOR, but for what is made of
    larger terms that may cancel it is their size: `dot_product` and `t_loss_mpl` the labeled losses
    before and after; `t_loss` its three terms; learning rates and `uda_weight` their peak; a sum of
    weights its largest possible value for the sum of their squares; a weight SHARE of the largest
    in its tensor. Steps, hard labels and counters must be equal: else the difference is infinite.
    """
    for t, (ours, theirs) in enumerate(zip(log, run.log, strict=True)):
        floors = _floors(theirs, knobs)
        for key, value in theirs.items():
            exact = key in ("step", "hard")
            yield _difference(key, f"step {t}", ours[key], value, floors.get(key, FLOOR), exact)
    for network, weights in run.finals.items():
        for key, value in weights.items():
            floor = max(FLOOR, SHARE * float(np.abs(value).max()))
            exact = key.endswith("num_batches_tracked")
            last = finals[network][key]
            where = f"after step {knobs.steps - 1}, {key}"
            yield _difference(f"{network}_final", where, last, value, floor, exact)


def _floors(row: Row, knobs: Knobs) -> dict[str, float | Array]:
    size = {key: float(np.abs(value).max()) for key, value in row.items()}
    judged = max(FLOOR, size["s_loss_l_old"], size["s_loss_l_new"])
    terms = (size["t_loss_l"], size["uda_weight"] * size["t_loss_u"], size["t_loss_mpl"])
    floors: dict[str, float | Array] = {
        "s_lr": knobs.s_lr,
        "t_lr": knobs.t_lr,
        "uda_weight": knobs.lam,
        "dot_product": judged,
        "t_loss_mpl": judged,
        "t_loss": max(FLOOR, *terms),
    }
    weights = knobs.H * (knobs.D + knobs.C + 3) + knobs.C  # at most, with batch norm
    for key, value in row.items():
        if key.endswith("_sum_sumsq"):
            floors[key] = np.array([max(FLOOR, weights**0.5 * abs(value[1]) ** 0.5), FLOOR])
    return floors


def _difference(
    key: str, where: str, ours: Array, theirs: Array, floor: float | Array, exact: bool
) -> Difference:
    with np.errstate(all="ignore"):  # numbers that are too large are infinitely far apart
        gap, scale = np.abs(ours - theirs), np.maximum(np.abs(theirs), floor)
        ratio = np.where(gap == 0, 0.0, gap / (0.0 if exact else scale))
    ratio = np.nan_to_num(ratio, nan=np.inf, posinf=np.inf).reshape(-1)
    at = int(ratio.argmax())
    return Difference(
        key, where, float(ratio[at]), float(ours.reshape(-1)[at]), float(theirs.reshape(-1)[at])
    )


def largest(found: Sequence[Difference]) -> list[Difference]:
    """The largest difference of each quantity, in their order."""
    worst: dict[str, Difference] = {}
    for item in found:
        if item.quantity not in worst or item.relative > worst[item.quantity].relative:
            worst[item.quantity] = item
    return list(worst.values())
