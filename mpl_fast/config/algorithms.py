"""Options of each algorithm, one dataclass for each recipe."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from mpl_fast.config.fields import (
    Fraction,
    FractionBelow1,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
)
from mpl_fast.config.learner import LearnerConfig

Derivative = Literal["auto", "forward", "central"]
NormBatches = Literal["joint", "split"]
LabelKind = Literal["argmax", "sampled", "soft"]
LABELS_NEEDED: dict[str, LabelKind] = {
    "exact": "soft",
    "sampled": "sampled",
    "per_example": "sampled",
}  # by feedback
BY_SGD_STEP = ("exact", "per_example")  # feedbacks that differentiate through a step of plain SGD


def _averaged() -> LearnerConfig:
    return LearnerConfig(ema=0.999)


def ramped(value: float, ramp: int, step: int) -> float:
    """`value`, which grows linearly from 0 over the first `ramp` steps, in step number `step`."""
    return value * min(1.0, (step + 1) / ramp) if ramp else value


@dataclass(frozen=True, kw_only=True)
class ConsistencyConfig:
    """Consistency loss between the weak and the strong view (UDA, arXiv 1904.12848)."""

    weight: NonNegativeFloat = 20.0
    """Weight of the consistency loss after its ramp."""
    ramp: NonNegativeInt = 50_000
    """Steps over which `weight` grows linearly from 0."""
    temperature: PositiveFloat = 0.5
    """Divisor of the weak view's logits; below 1 it sharpens the target."""
    threshold: Fraction = 0.6
    """Smallest value of the largest sharpened probability at which an image counts."""
    measure: Literal["cross_entropy", "cosine"] = "cross_entropy"
    """Distance of the two views' probabilities: cross-entropy, or 1 - cosine similarity."""

    def weight_at(self, step: int) -> float:
        """Weight of the consistency loss in step number `step` (from 0)."""
        return ramped(self.weight, self.ramp, step)


class Recipe:
    """What other modules ask about an algorithm; a recipe overrides what differs."""

    recipe = ""
    """Its name on the command line."""
    labeled_only = False
    """Whether a step uses no unlabeled images."""

    @property
    def whole_batch(self) -> str | None:
        """The option that rules out microbatches, or None."""
        return None

    @property
    def repeats_draws(self) -> str | None:
        """The option because of which a step draws the same dropout twice, which a CUDA graph
        cannot capture, or None."""
        return None


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig(Recipe):
    """Supervised training on the labeled images."""

    recipe = "supervised"
    labeled_only = True

    learner: LearnerConfig = field(default_factory=_averaged)
    label_smoothing: FractionBelow1 = 0.1
    """Label smoothing."""
    mixup: NonNegativeFloat = 0.0
    """Alpha of mixup's Beta distribution (arXiv 1710.09412); 0: no mixup."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(Recipe):
    """Fine-tuning of a trained network on the labeled images, the last phase of any recipe."""

    recipe = "finetune"
    labeled_only = True

    start: str = ""
    """Run directory whose newest checkpoint is fine-tuned; of mpl_roleplay, the network that
    started as the student."""
    learner: LearnerConfig = field(
        default_factory=lambda: LearnerConfig(
            lr=3e-5, warmup=0, max_grad_norm=0.0, weight_decay=0.0, schedule="constant", dropout=0.0
        )
    )
    weights: Literal["average", "network"] = "average"
    """Start from the moving average of the weights, or from the weights themselves."""
    label_smoothing: FractionBelow1 = 0.0
    """Label smoothing."""

    def problems(self) -> list[str]:
        """Contradictions, each a line that begins with a key of this section."""
        if self.start:
            return []
        return ["start is missing: give --algorithm.start RUN_DIR, whose checkpoint is fine-tuned"]


@dataclass(frozen=True, kw_only=True)
class UDAConfig(Recipe):
    """UDA (arXiv 1904.12848): labeled cross-entropy and a consistency loss."""

    recipe = "uda"

    learner: LearnerConfig = field(default_factory=_averaged)
    consistency: ConsistencyConfig = field(default_factory=ConsistencyConfig)
    label_smoothing: FractionBelow1 = 0.1
    """Label smoothing of the labeled loss."""
    bn_batches: NormBatches = "joint"
    """Images that batch norm normalizes together. joint: all views, as published. split: weak views
    in a pass of their own without gradient, which saves their backward pass."""


@dataclass(frozen=True, kw_only=True)
class FixMatchConfig(Recipe):
    """FixMatch (arXiv 2001.07685): labels of confident weak views train the strong views."""

    recipe = "fixmatch"

    learner: LearnerConfig = field(default_factory=_averaged)
    weight: NonNegativeFloat = 1.0
    """Weight of the loss on unlabeled images."""
    threshold: Fraction = 0.95
    """Smallest value of its largest probability at which an image counts, for thresholds fixed."""
    thresholds: Literal["fixed", "adaptive"] = "fixed"
    """fixed: `threshold`. adaptive: the moving average of the largest probability, lower for
    classes that are predicted less often (FreeMatch, arXiv 2205.07246)."""
    targets: Literal["network", "average"] = "network"
    """Labels of weak views by the network in training mode, as published, or by its moving average
    in evaluation mode (Mean Teacher, arXiv 1703.01780; with FixMatch, arXiv 2101.08482)."""
    labels: Literal["argmax", "soft"] = "argmax"
    """Labels of unlabeled images: the most probable class, as published, or probabilities."""
    temperature: PositiveFloat = 1.0
    """Divisor of the logits for labels soft; below 1 it sharpens them."""
    alignment: bool = False
    """Distribution alignment (ReMixMatch, arXiv 1911.09785): predictions of weak views are
    multiplied by the share of each class among labels over its share among predictions, both moving
    averages, before labels and thresholds are taken from them."""
    average_decay: FractionBelow1 = 0.999
    """Decay, in a step, of the moving averages of thresholds adaptive and of alignment."""
    label_smoothing: FractionBelow1 = 0.0
    """Label smoothing of the labeled loss."""
    bn_batches: NormBatches = "joint"
    """Images that batch norm normalizes together. joint: all views, as published. split: weak views
    in a pass of their own without gradient, which saves their backward pass. For targets
    network."""

    @property
    def whole_batch(self) -> str | None:
        if self.alignment:
            return "alignment"
        return "thresholds adaptive" if self.thresholds == "adaptive" else None

    def problems(self) -> list[str]:
        """Contradictions, each a line that begins with a key of this section."""
        found = []
        if self.targets == "average" and not self.learner.ema:
            found.append("targets average needs a moving average: set learner.ema, such as 0.999")
        if self.temperature != 1 and self.labels == "argmax":
            found.append("temperature is for labels soft: leave it at 1 for argmax")
        return found


@dataclass(frozen=True, kw_only=True)
class NoisyStudentConfig(Recipe):
    """Noisy student (arXiv 1911.04252): a fixed teacher's labels train a student with noise."""

    recipe = "noisy_student"

    teacher: str = ""
    """Run directory whose evaluated network is the teacher (of mpl_roleplay, both networks): of its
    newest checkpoint, which is copied when training starts. Its network and its image size may
    differ from this run's."""
    learner: LearnerConfig = field(default_factory=lambda: LearnerConfig(ema=0.999, dropout=0.5))
    labels: Literal["soft", "argmax"] = "soft"
    """Labels of unlabeled images, from the weak view: the teacher's probabilities, or its most
    probable class."""
    temperature: PositiveFloat = 1.0
    """Divisor of the teacher's logits for labels soft; below 1 it sharpens them."""
    threshold: Fraction = 0.3
    """Smallest value of the teacher's largest probability, at temperature 1, at which an image
    counts."""
    weight: NonNegativeFloat = 1.0
    """Weight of the loss on unlabeled images (official code: unlabeled over labeled images in a
    step, which makes it an average over all images)."""
    label_smoothing: FractionBelow1 = 0.1
    """Label smoothing of the labeled loss, and of labels argmax."""

    def problems(self) -> list[str]:
        """Contradictions, each a line that begins with a key of this section."""
        if self.teacher:
            return []
        return ["teacher is missing: give --algorithm.teacher RUN_DIR, whose network labels images"]


@dataclass(frozen=True, kw_only=True)
class MPLConfig(Recipe):
    """Meta Pseudo Labels (arXiv 2003.10580)."""

    recipe = "mpl"

    teacher: LearnerConfig = field(default_factory=lambda: LearnerConfig(lr=0.6))
    student: LearnerConfig = field(
        default_factory=lambda: LearnerConfig(delay_steps=20_000, ema=0.999)
    )
    consistency: ConsistencyConfig = field(default_factory=ConsistencyConfig)
    label_smoothing: FractionBelow1 = 0.1
    """Label smoothing of the teacher's labeled loss and of the student's loss."""
    pseudo: Literal["weak", "strong"] = "weak"
    """View of an unlabeled image from which the teacher predicts its pseudo label."""
    labels: Literal["auto", "argmax", "sampled", "soft"] = "auto"
    """Pseudo labels: the teacher's most probable class, a class sampled from its probabilities, or
    the probabilities. auto: soft for feedback exact, sampled for feedback sampled and per_example,
    else argmax."""
    label_threshold: Fraction = 0.0
    """Smallest value of the teacher's largest probability at which the student learns from an
    image; 0: it learns from all."""
    feedback: Literal[
        "off",
        "difference",
        "sampled",
        "per_example",
        "exact",
        "parity_kekmodel",
        "parity_google",
    ] = "difference"
    """Effect of the student's update on its labeled loss, as the teacher's loss uses it.
    difference: labeled loss before minus after the update. sampled: the same for sampled labels,
    unbiased. per_example: one number for each sampled label. exact: the derivative by the soft
    labels, without sampling noise. parity_kekmodel, parity_google: as those codes compute it, for
    comparison. off: none."""
    feedback_weight: float = 1.0
    """Weight of the feedback term in the teacher's loss."""
    feedback_ramp: NonNegativeInt = 0
    """Steps over which `feedback_weight` grows linearly from 0."""
    baseline: FractionBelow1 = 0.0
    """Decay of a moving average of the feedback that is subtracted from it (official code: 0.99);
    0: none is subtracted. For feedback difference, sampled and parity_google."""
    held_out: FractionBelow1 = 0.0
    """Share of each labeled batch on which only the feedback is computed; the teacher's labeled
    loss uses the rest. 0: both use the whole batch."""
    derivative: Derivative = "auto"
    """Derivative of feedback exact and per_example: forward-mode differentiation, or a central
    difference (two more forward passes in float32). auto: central where a layer has no
    forward-mode derivative."""
    bn_batches: NormBatches = "joint"
    """Images that the teacher's batch norm normalizes together. joint: all views, as published.
    split: weak views in a pass of their own, without gradient unless the feedback needs one."""
    teacher_graph: Literal["hold", "recompute"] = "hold"
    """hold: the teacher's activations stay in memory during the student's update. recompute: a
    second forward pass computes them again, which halves the peak memory."""

    @property
    def whole_batch(self) -> str | None:
        return f"feedback {self.feedback}" if self._parity else None

    @property
    def repeats_draws(self) -> str | None:
        if self.teacher_graph == "recompute":
            return "teacher_graph recompute"
        if self.feedback in BY_SGD_STEP or self._parity:
            return f"feedback {self.feedback}"
        return None

    @property
    def label_kind(self) -> LabelKind:
        """`labels`, with auto resolved."""
        if self.labels != "auto":
            return self.labels
        return LABELS_NEEDED.get(self.feedback, "argmax")

    def feedback_weight_at(self, step: int) -> float:
        """Weight of the feedback in step number `step` (from 0)."""
        return ramped(self.feedback_weight, self.feedback_ramp, step)

    def problems(self) -> list[str]:
        """Contradictions, each a line that begins with a key of this section."""
        found = self._label_problems()
        if self.baseline and self.feedback not in ("difference", "sampled", "parity_google"):
            found.append(f"baseline cannot be subtracted from feedback {self.feedback}: set 0")
        if self.feedback in BY_SGD_STEP:
            found += needs_sgd("student", self.student, self.feedback)
        if self.feedback == "off" and self.held_out:
            found.append("held_out is for the feedback, which is off: set 0")
        return found + (self._parity_problems() if self._parity else [])

    def _label_problems(self) -> list[str]:
        needed, kind = LABELS_NEEDED.get(self.feedback), self.label_kind
        if needed and kind != needed:
            return [f"feedback {self.feedback} needs labels {needed} (or auto), not {self.labels}"]
        if self.feedback == "difference" and kind == "soft":
            return [
                "feedback difference has no gradient for labels soft: take feedback exact, or "
                "labels argmax"
            ]
        if self.feedback == "difference" and kind == "sampled":
            return ["labels sampled need feedback sampled, which uses the view they come from"]
        return []

    def _parity_problems(self) -> list[str]:
        """The reproduced codes have none of these options."""
        changed = {
            "labels": self.labels != "auto",
            "pseudo": self.pseudo != "weak",
            "label_threshold": self.label_threshold != 0,
            "held_out": self.held_out != 0,
            "bn_batches": self.bn_batches != "joint",
            "teacher_graph": self.teacher_graph != "hold",
            "consistency.measure": self.consistency.measure != "cross_entropy",
        }
        return [
            f"{key} cannot be chosen with feedback {self.feedback}"
            for key, chosen in changed.items()
            if chosen
        ]

    @property
    def _parity(self) -> bool:
        return self.feedback in ("parity_kekmodel", "parity_google")


@dataclass(frozen=True, kw_only=True)
class RolePlayConfig(MPLConfig):
    """Meta Pseudo Labels with two networks that swap roles (saarst/TransferMPL).

    `teacher` and `student` train the networks that start in these roles; each network keeps its
    optimizer, learning rate and moving average when the roles are swapped.
    """

    recipe = "mpl_roleplay"

    teacher: LearnerConfig = field(default_factory=_averaged)
    student: LearnerConfig = field(default_factory=_averaged)
    student_delay_steps: NonNegativeInt = 0
    """First steps of the run in which the network in the student's role is not updated."""
    swap_every: NonNegativeInt = 0
    """Steps between swaps of the roles; 0: one epoch of the unlabeled images."""
    ensemble: Literal["probability", "logits"] = "probability"
    """Average the two networks' probabilities, or their logits, in evaluation."""

    def problems(self) -> list[str]:
        """Contradictions, each a line that begins with a key of this section."""
        if self._parity:
            return [f"feedback {self.feedback} is for recipe mpl, which does not swap roles"]
        found = MPLConfig.problems(self)
        if self.feedback in BY_SGD_STEP:
            found += needs_sgd("teacher", self.teacher, self.feedback)
        return found


@dataclass(frozen=True, kw_only=True)
class SMPLConfig(Recipe):
    """Self Meta Pseudo Labels (arXiv 2212.13420): one network, two updates in a step."""

    recipe = "smpl"
    whole_batch = "recipe smpl"

    learner: LearnerConfig = field(default_factory=_averaged)
    consistency: ConsistencyConfig = field(default_factory=ConsistencyConfig)
    label_smoothing: FractionBelow1 = 0.1
    """Label smoothing of the labeled and of the pseudo-label loss."""
    feedback: Literal["off", "difference", "exact"] = "difference"
    """Effect of the first update on the labeled loss, as the second update's loss uses it.
    difference: labeled loss before minus after the first update. exact: the derivative by the soft
    labels. off: none."""
    feedback_weight: float = 1.0
    """Weight of the feedback term in the second update's loss."""
    feedback_ramp: NonNegativeInt = 0
    """Steps over which `feedback_weight` grows linearly from 0."""
    derivative: Derivative = "auto"
    """Derivative of feedback exact: forward-mode differentiation, or a central difference (two more
    forward passes). auto: central where a layer has no forward-mode derivative."""

    @property
    def repeats_draws(self) -> str | None:
        return "feedback exact" if self.feedback == "exact" else None

    def feedback_weight_at(self, step: int) -> float:
        """Weight of the feedback in step number `step` (from 0)."""
        return ramped(self.feedback_weight, self.feedback_ramp, step)

    def problems(self) -> list[str]:
        """Contradictions, each a line that begins with a key of this section."""
        exact = self.feedback == "exact"
        return needs_sgd("learner", self.learner, self.feedback) if exact else []


@dataclass(frozen=True, kw_only=True)
class MetaSemiConfig(Recipe):
    """MetaSemi (Sakura03/SemiMeta): soft labels, corrected by the meta-gradient, as targets."""

    recipe = "metasemi"
    whole_batch = "recipe metasemi"
    repeats_draws = "recipe metasemi"

    learner: LearnerConfig = field(
        default_factory=lambda: LearnerConfig(lr=0.1, max_grad_norm=0.0, nesterov=False, warmup=0)
    )
    weight: NonNegativeFloat = 1.0
    """Weight of the squared difference between the unlabeled images' probabilities and labels."""
    ramp: NonNegativeInt = 0
    """Steps over which `weight` grows linearly from 0."""
    mixup: NonNegativeFloat = 1.0
    """Alpha of the Beta distribution that mixes labeled with unlabeled images; 0: no mixing."""
    derivative: Derivative = "central"
    """Derivative of the labels' correction: a central difference (two more forward passes), as
    published, or forward-mode differentiation. auto: forward, or central where a layer has no
    forward-mode derivative."""
    epsilon: PositiveFloat = 0.01
    """Length of the central difference's step in weight space."""
    label_rate: NonNegativeFloat = 0.0
    """Step size of the labels' correction; 0: the learning rate, as published."""


AlgorithmConfig = (
    SupervisedConfig
    | FinetuneConfig
    | UDAConfig
    | FixMatchConfig
    | NoisyStudentConfig
    | MPLConfig
    | RolePlayConfig
    | SMPLConfig
    | MetaSemiConfig
)
RECIPES: dict[str, type[AlgorithmConfig]] = {
    kind.recipe: kind for kind in get_args(AlgorithmConfig)
}


def needs_sgd(network: str, config: LearnerConfig, feedback: str) -> list[str]:
    """The problem of a network whose update the feedback differentiates through, if it has one."""
    if config.optimizer == "sgd":
        return []
    reason = f"feedback {feedback}, which is derived for plain SGD"
    return [f"{network}.optimizer must be sgd for {reason}"]
