"""What the numbers of a run say about it, in sentences that hold the numbers."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from mpl_fast.report.measures import bins, wilson
from mpl_fast.report.predictions import Predictions
from mpl_fast.report.runs import Run

Kind = Literal["limit", "note", "good"]
GAP = 0.10  # accuracy on labeled training images above that on validation images
WIDE = 0.02  # half of a 95 % interval of top-1
LOW_SHARE = 0.5
WRONG_LABELS = 0.10
RISE = 1.0  # points of top-1 in the last quarter
SKIPPED = 0.01
DATA_WAIT = 0.05
MISCALIBRATED = 0.05


@dataclass(frozen=True)
class Finding:
    """One sentence; the first `limit` of a run is its verdict."""

    kind: Kind
    text: str


def percent(share: float, digits: int = 1) -> str:
    """``12.3 %`` of 0.123."""
    return f"{100 * share:.{digits}f} %"


def findings(
    run: Run,
    val: Predictions | None,
    labeled: Predictions | None,
    unlabeled: Predictions | None,
) -> list[Finding]:
    """Limits first, in the order in which they should be removed."""
    found = [
        *_length(run, val),
        *_count(val),
        *_updates(run),
        *_fit(val, labeled),
        *_pseudo_labels(run, unlabeled),
        *_input(run),
        *_calibration(val),
    ]
    order: tuple[Kind, ...] = ("limit", "note", "good")
    found.sort(key=lambda finding: order.index(finding.kind))
    if not any(finding.kind == "limit" for finding in found):
        found.insert(0, Finding("good", "No limit stands out in the numbers of this run."))
    return found


def _length(run: Run, val: Predictions | None) -> list[Finding]:
    done, steps, found = run.steps_done, run.config.steps, list[Finding]()
    if done < steps and run.summary.get("stopped_early"):
        text = f"Ended early by patience, after step {done:,} of {steps:,}."
        found.append(Finding("note", text))
    elif done < steps:
        text = f"Not finished: step {done:,} of {steps:,} ({percent(done / steps, 0)})."
        found.append(Finding("limit", text))
    points = run.curves.get("eval/top1", [])
    if len(points) < 3:
        return found
    last_step, last = points[-1]
    before = [point for point in points if point[0] <= 0.75 * last_step]
    half = 100 * _half(val) if val is not None else 0.0
    if before and last - before[-1][1] > max(RISE, half):
        text = f"Still rising: top-1 gained {last - before[-1][1]:.1f} points from step "
        text += (
            f"{before[-1][0]:,} to step {last_step:,}; a decaying learning rate can do this, too."
        )
        found.append(Finding("note", text))
    best_step, best = max(points, key=lambda point: point[1])
    if best - last > max(0.1, half):
        text = f"The last evaluation ({last:.2f} %) is {best - last:.2f} points below the best "
        text += f"({best:.2f} % at step {best_step:,}); the best was selected on these images."
        found.append(Finding("note", text))
    return found


def _half(val: Predictions) -> float:
    """Half of the 95 % interval of top-1, from 0 to 1."""
    low, high = wilson(val.hits.sum(), len(val.hits))
    return (high - low) / 2


def _count(val: Predictions | None) -> list[Finding]:
    if val is None or (half := _half(val)) <= WIDE:
        return []
    text = f"Few validation images: with {len(val.hits):,}, the 95 % interval of top-1 is "
    return [Finding("note", f"{text}{200 * half:.1f} points wide.")]


def _updates(run: Run) -> list[Finding]:
    found = []
    for name in sorted(run.curves):
        if name.startswith("skipped/") and (share := run.mean(name) or 0.0) > 0:
            text = f"{percent(share, 2)} of the updates of {name.removeprefix('skipped/')} were "
            text += "skipped, because their gradient was not finite."
            found.append(Finding("limit" if share > SKIPPED else "note", text))
    return found


def _fit(val: Predictions | None, labeled: Predictions | None) -> list[Finding]:
    if val is None or labeled is None:
        return []
    train, held_out = float(labeled.hits.mean()), float(val.hits.mean())
    both = f"{percent(train)} of the labeled training images are right and {percent(held_out)} of "
    both += f"the validation images: a gap of {100 * (train - held_out):.1f} points."
    if train - held_out > GAP and train > wilson(val.hits.sum(), len(val.hits))[1]:
        return [Finding("limit", f"Overfits: {both}")]
    if train < 0.9 and held_out < 0.9:
        text = f"Underfits: only {percent(train)} of the labeled training images are right"
        return [Finding("limit", f"{text} (validation: {percent(held_out)}).")]
    if train - held_out > GAP:  # which so few validation images can give by chance
        return [Finding("note", both)]
    return [Finding("good", f"Generalizes: {both}")]


def _pseudo_labels(run: Run, unlabeled: Predictions | None) -> list[Finding]:
    found = []
    share = run.latest("mask_rate")
    if share is not None and run.threshold:
        text = f"{percent(share)} of the unlabeled images reached the threshold of "
        text += f"{run.threshold:g} in the last tenth of the log."
        low = share < LOW_SHARE
        found.append(Finding("limit", f"Low share: only {text}") if low else Finding("good", text))
    if unlabeled is None or not unlabeled.known.any() or not run.threshold:
        return found
    used = (unlabeled.confidence >= run.threshold) & unlabeled.known
    count, wrong = int(used.sum()), int((used & ~unlabeled.hits).sum())
    if used.any() and wilson(wrong, count)[0] > WRONG_LABELS:
        text = f"Wrong pseudo labels: {percent(wrong / count)} of the {count:,} unlabeled images "
        text += f"to which the newest network gives a probability of {run.threshold:g} or more get "
        text += "a wrong label."
        found.append(Finding("limit", text))
    return found


def _input(run: Run) -> list[Finding]:
    wait = run.mean("data_wait")
    if wait is None:
        return []
    text = f"{percent(wait)} of the training time is data wait."
    if wait > DATA_WAIT:
        return [Finding("note", f"Input-bound: {text} --data.threads may help.")]
    return [Finding("good", text)]


def _calibration(val: Predictions | None) -> list[Finding]:
    if val is None:
        return []
    confidence = float(val.confidence.mean())
    gap = confidence - float(np.mean(val.hits))
    low, high = wilson(val.hits.sum(), len(val.hits))
    found = bins(val.confidence, val.hits)
    if abs(gap) < MISCALIBRATED or low <= confidence <= high:
        text = f"Mean confidence is within {100 * abs(gap):.1f} points of the accuracy"
        kind: Kind = "good" if abs(gap) < MISCALIBRATED else "note"
        return [Finding(kind, f"{text} (ECE {percent(found.ece)}).")]
    word = "Overconfident" if gap > 0 else "Underconfident"
    text = f"{word}: mean confidence is {percent(confidence)}, accuracy "
    return [Finding("note", f"{text}{percent(float(val.hits.mean()))} (ECE {percent(found.ece)}).")]
