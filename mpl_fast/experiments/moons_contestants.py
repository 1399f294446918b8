"""The contestants on two moons: labels only, MPL with each feedback, and SMPL."""

from dataclasses import dataclass
from typing import Literal

from mpl_fast.experiments.moons_data import Setting

Pseudo = Literal["argmax", "sampled", "soft"]
Feedback = Literal["off", "difference", "per_example", "exact"]


@dataclass(frozen=True, kw_only=True)
class Labeled:
    """Trains one network on labels alone: the six, or the truth of every unlabeled batch."""

    truth: bool = False
    stop: int | None = None
    """Ends after this many steps, if the others take more; else it is not reported."""


@dataclass(frozen=True, kw_only=True)
class MPL:
    """Meta Pseudo Labels (arXiv 2003.10580); the teacher's own loss is that of the labels."""

    feedback: Feedback
    pseudo: Pseudo
    weight: float = 1.0
    """Of the feedback in the teacher's loss; -1 is the sign `new - old`."""
    held_out: bool = False
    """The last label of each class is kept from the teacher and alone judges the student."""


@dataclass(frozen=True, kw_only=True)
class SMPL:
    """Self Meta Pseudo Labels, Algorithm 1: one network is its own teacher."""

    feedback: Feedback
    pseudo: Pseudo


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A row of the table."""

    title: str
    recipe: Labeled | MPL | SMPL
    against: str | None = None
    """The contestant that it is compared with, run by run."""
    settings: tuple[Setting, ...] = ("3/3", "5/1")


CONTESTANTS = {
    "all_labels": Contestant(title="all labels known", recipe=Labeled(truth=True)),
    "labeled": Contestant(title="labeled only", recipe=Labeled()),
    "labeled_100": Contestant(
        title="labeled only, 100 steps", recipe=Labeled(stop=100), against="labeled"
    ),
    "mpl_off": Contestant(
        title="MPL, no feedback", recipe=MPL(feedback="off", pseudo="argmax"), against="labeled"
    ),
    "mpl_difference": Contestant(
        title="MPL, difference (old - new)",
        recipe=MPL(feedback="difference", pseudo="argmax"),
        against="mpl_off",
    ),
    "mpl_kekmodel": Contestant(
        title="MPL, wrong sign (new - old)",
        recipe=MPL(feedback="difference", pseudo="argmax", weight=-1.0),
        against="mpl_off",
    ),
    "mpl_off_sampled": Contestant(
        title="MPL, sampled labels, no feedback",
        recipe=MPL(feedback="off", pseudo="sampled"),
        against="labeled",
    ),
    "mpl_sampled": Contestant(
        title="MPL, sampled (old - new)",
        recipe=MPL(feedback="difference", pseudo="sampled"),
        against="mpl_off_sampled",
    ),
    "mpl_per_example": Contestant(
        title="MPL, per example",
        recipe=MPL(feedback="per_example", pseudo="sampled"),
        against="mpl_off_sampled",
    ),
    "mpl_off_soft": Contestant(
        title="MPL, soft labels, no feedback",
        recipe=MPL(feedback="off", pseudo="soft"),
        against="labeled",
    ),
    "mpl_exact": Contestant(
        title="MPL, exact",
        recipe=MPL(feedback="exact", pseudo="soft"),
        against="mpl_off_soft",
    ),
    "mpl_exact_x10": Contestant(
        title="MPL, exact, weight 10",
        recipe=MPL(feedback="exact", pseudo="soft", weight=10.0),
        against="mpl_off_soft",
    ),
    "mpl_exact_wrong": Contestant(
        title="MPL, exact, wrong sign",
        recipe=MPL(feedback="exact", pseudo="soft", weight=-1.0),
        against="mpl_off_soft",
    ),
    # With one label of a class there is none to hold out.
    "mpl_off_held_out": Contestant(
        title="MPL, 4 labels, no feedback",
        recipe=MPL(feedback="off", pseudo="soft", held_out=True),
        against="mpl_off_soft",
        settings=("3/3",),
    ),
    "mpl_exact_held_out": Contestant(
        title="MPL, 4 labels, exact on 2 held out",
        recipe=MPL(feedback="exact", pseudo="soft", held_out=True),
        against="mpl_off_held_out",
        settings=("3/3",),
    ),
    "smpl_off": Contestant(
        title="SMPL, no feedback", recipe=SMPL(feedback="off", pseudo="argmax"), against="labeled"
    ),
    "smpl_difference": Contestant(
        title="SMPL, difference (old - new)",
        recipe=SMPL(feedback="difference", pseudo="argmax"),
        against="smpl_off",
    ),
    # On points there is no augmentation, so a network that learns its own soft labels stands
    # still: without feedback this is `labeled` to the last bit.
    "smpl_exact": Contestant(
        title="SMPL, exact", recipe=SMPL(feedback="exact", pseudo="soft"), against="labeled"
    ),
}
