"""The variants that the two-moons study compares: labels only, MPL with each feedback, SMPL."""

from dataclasses import dataclass
from typing import Any, Literal

from tools.studies.two_moons.data import Setting


@dataclass(frozen=True)
class Variant:
    """A row of the table."""

    title: str
    recipe: Literal["supervised", "mpl", "smpl"]
    options: dict[str, Any]
    """Of the recipe's config; those that all variants share are in `training.algorithm`."""
    baseline: str | None = None
    """The variant that it is compared with, run by run."""
    settings: tuple[Setting, ...] = ("3/3", "5/1")
    all_labels: bool = False
    """Trains on the true classes of the unlabeled batches."""
    stop: int | None = None
    """Number of steps, if fewer than the others take; not reported if not."""


def _labeled(title: str, baseline: str | None = None, **kind: Any) -> Variant:
    return Variant(title, "supervised", {}, baseline, **kind)


def _mpl(title: str, baseline: str, feedback: str, **options: Any) -> Variant:
    # With one label of a class there is none to hold out.
    settings: tuple[Setting, ...] = ("3/3",) if "held_out" in options else ("3/3", "5/1")
    return Variant(f"MPL, {title}", "mpl", {"feedback": feedback, **options}, baseline, settings)


def _smpl(title: str, baseline: str, feedback: str) -> Variant:
    return Variant(f"SMPL, {title}", "smpl", {"feedback": feedback}, baseline)


_HELD_OUT = 1 / 3  # two of six labels, one of each class

VARIANTS = {
    "all_labels": _labeled("all labels known", all_labels=True),
    "labeled": _labeled("labeled only"),
    "labeled_100": _labeled("labeled only, 100 steps", "labeled", stop=100),
    "mpl_off": _mpl("no feedback", "labeled", "off"),
    "mpl_difference": _mpl("difference (old - new)", "mpl_off", "difference"),
    "mpl_kekmodel": _mpl("wrong sign (new - old)", "mpl_off", "difference", feedback_weight=-1.0),
    "mpl_off_sampled": _mpl("sampled labels, no feedback", "labeled", "off", labels="sampled"),
    "mpl_sampled": _mpl("sampled (old - new)", "mpl_off_sampled", "sampled"),
    "mpl_per_example": _mpl("per example", "mpl_off_sampled", "per_example"),
    "mpl_off_soft": _mpl("soft labels, no feedback", "labeled", "off", labels="soft"),
    "mpl_exact": _mpl("exact", "mpl_off_soft", "exact"),
    "mpl_exact_x10": _mpl("exact, weight 10", "mpl_off_soft", "exact", feedback_weight=10.0),
    "mpl_exact_wrong": _mpl("exact, wrong sign", "mpl_off_soft", "exact", feedback_weight=-1.0),
    "mpl_off_held_out": _mpl(
        "4 labels, no feedback", "mpl_off_soft", "off", labels="soft", held_out=_HELD_OUT
    ),
    "mpl_exact_held_out": _mpl(
        "4 labels, exact on 2 held out", "mpl_off_held_out", "exact", held_out=_HELD_OUT
    ),
    "smpl_off": _smpl("no feedback", "labeled", "off"),
    "smpl_difference": _smpl("difference (old - new)", "smpl_off", "difference"),
    # Without augmentation a network does not move by its own soft labels: without feedback this
    # would be `labeled`.
    "smpl_exact": _smpl("exact", "labeled", "exact"),
}


def with_baselines(names: list[str]) -> list[str]:
    """The variants and all that they are compared with, in the table's order."""
    wanted = set(names)
    while more := {VARIANTS[n].baseline for n in wanted} - wanted - {None}:
        wanted |= {name for name in more if name}
    return [name for name in VARIANTS if name in wanted]
