"""What is particular to each algorithm: one dataclass for each recipe."""

from dataclasses import dataclass, field
from typing import Literal

from mpl_fast.config.learner import LearnerConfig

Derivative = Literal["auto", "forward", "central"]
NormBatches = Literal["joint", "split"]


def _averaged() -> LearnerConfig:
    return LearnerConfig(ema=0.999)


@dataclass(frozen=True, kw_only=True)
class ConsistencyConfig:
    """The strong view must agree with the weak one (UDA, arXiv 1904.12848)."""

    weight: float = 20.0
    """Of the consistency term once the ramp is over."""
    ramp: int = 50_000
    """Steps over which `weight` grows linearly from 0."""
    temperature: float = 0.5
    """Divides the weak view's logits: below 1 sharpens the target."""
    threshold: float = 0.6
    """An image counts if its largest sharpened probability reaches this."""
    measure: Literal["cross_entropy", "cosine"] = "cross_entropy"
    """How the disagreement is measured; cosine: 1 - cos of the two probability vectors."""

    def weight_at(self, step: int) -> float:
        """Weight of step number `step` (from 0)."""
        return ramped(self.weight, self.ramp, step)


def ramped(value: float, ramp: int, step: int) -> float:
    """A weight that grows linearly over its first `ramp` steps."""
    return value * min(1.0, (step + 1) / ramp) if ramp else value


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig:
    """Labeled images only."""

    learner: LearnerConfig = field(default_factory=_averaged)
    label_smoothing: float = 0.1
    """Label smoothing."""
    mixup: float = 0.0
    """Alpha of the Beta distribution that mixes pairs of labeled images (arXiv 1710.09412); 0: no
    mixing."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """A trained network goes on with labeled images only, as the last phase of any recipe."""

    start: str = ""
    """Run directory whose newest checkpoint is the start; of role playing, the network that began
    as the student."""
    learner: LearnerConfig = field(
        default_factory=lambda: LearnerConfig(
            lr=3e-5, warmup=0, max_grad_norm=0.0, weight_decay=0.0, schedule="constant", dropout=0.0
        )
    )
    weights: Literal["average", "network"] = "average"
    """Begin with the moving average of the weights, or with the weights themselves."""
    label_smoothing: float = 0.0
    """Label smoothing."""


@dataclass(frozen=True, kw_only=True)
class UDAConfig:
    """Cross-entropy on labels plus consistency between two views of unlabeled images."""

    learner: LearnerConfig = field(default_factory=_averaged)
    consistency: ConsistencyConfig = field(default_factory=ConsistencyConfig)
    label_smoothing: float = 0.1
    """Label smoothing of the labeled loss."""
    bn_batches: NormBatches = "joint"
    """joint: all views are normalized as one batch, as published. split: weak views by themselves
    and without gradient, which saves their backward pass."""


@dataclass(frozen=True, kw_only=True)
class FixMatchConfig:
    """FixMatch (arXiv 2001.07685): confident hard labels of the weak view, learned on the strong
    one."""

    learner: LearnerConfig = field(default_factory=_averaged)
    weight: float = 1.0
    """Of the loss on unlabeled images."""
    threshold: float = 0.95
    """An image counts if its largest probability reaches this."""
    label_smoothing: float = 0.0
    """Label smoothing of the labeled loss."""
    bn_batches: NormBatches = "joint"
    """joint: all views are normalized as one batch, as published. split: weak views by themselves
    and without gradient, which saves their backward pass."""


@dataclass(frozen=True, kw_only=True)
class MPLConfig:
    """Meta Pseudo Labels (arXiv 2003.10580)."""

    teacher: LearnerConfig = field(default_factory=lambda: LearnerConfig(lr=0.6))
    student: LearnerConfig = field(
        default_factory=lambda: LearnerConfig(delay_steps=20_000, ema=0.999)
    )
    consistency: ConsistencyConfig = field(default_factory=ConsistencyConfig)
    label_smoothing: float = 0.1
    """Label smoothing of the teacher's labeled loss and of the student's pseudo-label loss."""
    pseudo: Literal["weak", "strong"] = "weak"
    """View on which the teacher labels the unlabeled images for the student."""
    labels: Literal["auto", "argmax", "sampled", "soft"] = "auto"
    """Hard labels, drawn ones or the teacher's probabilities. auto: soft for feedback exact,
    sampled for sampled and per_example, else argmax."""
    label_threshold: float = 0.0
    """The student learns only from images of which the teacher is at least so sure; 0: from all."""
    feedback: Literal[
        "off",
        "difference",
        "sampled",
        "per_example",
        "exact",
        "parity_kekmodel",
        "parity_google",
    ] = "difference"
    """How the teacher hears of the student's progress. difference: labeled loss before minus after
    the student's step. sampled: the same for drawn labels, without bias. per_example: a number for
    each drawn label. exact: the derivative for soft labels, without noise. parity_*: what those
    codes do, for comparison."""
    feedback_weight: float = 1.0
    """Of the feedback in the teacher's loss."""
    feedback_ramp: int = 0
    """Steps over which `feedback_weight` grows linearly from 0."""
    baseline: float = 0.0
    """Decay of a moving average that is subtracted from the difference (official code: 0.99); 0: no
    baseline."""
    held_out: float = 0.0
    """Share of each labeled batch that judges the student only, so that the teacher's own loss and
    the feedback do not share it; 0: both have all of it."""
    derivative: Derivative = "auto"
    """Of exact and per_example: forward-mode differentiation, or two more forward passes in float32
    (central difference). auto: the second where a layer has no first."""
    bn_batches: NormBatches = "joint"
    """joint: the teacher normalizes all views as one batch, as published. split: weak views by
    themselves and, unless the feedback needs it, without gradient."""
    teacher_graph: Literal["hold", "recompute"] = "hold"
    """hold: the teacher's activations wait while the student trains. recompute: a second forward
    pass makes them anew, which halves the peak memory."""

    @property
    def label_kind(self) -> str:
        """What `labels` auto stands for."""
        if self.labels != "auto":
            return self.labels
        kinds = {"exact": "soft", "sampled": "sampled", "per_example": "sampled"}
        return kinds.get(self.feedback, "argmax")

    def feedback_weight_at(self, step: int) -> float:
        """Weight of the feedback in step number `step` (from 0)."""
        return ramped(self.feedback_weight, self.feedback_ramp, step)


@dataclass(frozen=True, kw_only=True)
class RolePlayConfig(MPLConfig):
    """Meta Pseudo Labels whose two networks change roles (saarst/TransferMPL).

    `teacher` and `student` say how the networks are trained that begin in these roles; each keeps
    its optimizer, learning rate and average when the roles change.
    """

    teacher: LearnerConfig = field(default_factory=_averaged)
    student: LearnerConfig = field(default_factory=_averaged)
    student_delay_steps: int = 0
    """Steps in which the network in the student's role rests."""
    swap_every: int = 0
    """Steps between changes; 0: an epoch of the unlabeled images."""
    ensemble: Literal["probability", "logits"] = "probability"
    """What is averaged over the two networks in evaluation."""


@dataclass(frozen=True, kw_only=True)
class SMPLConfig:
    """Self Meta Pseudo Labels (arXiv 2212.13420): one network teaches itself in two updates."""

    learner: LearnerConfig = field(default_factory=_averaged)
    consistency: ConsistencyConfig = field(default_factory=ConsistencyConfig)
    label_smoothing: float = 0.1
    """Label smoothing of the labeled and of the pseudo-label loss."""
    feedback: Literal["off", "difference", "exact"] = "difference"
    """What the second update hears of the first: labeled loss before minus after it; or the
    derivative by soft labels."""
    feedback_weight: float = 1.0
    """Of the feedback in the second update's loss."""
    feedback_ramp: int = 0
    """Steps over which `feedback_weight` grows linearly from 0."""
    derivative: Derivative = "auto"
    """Of exact: forward-mode differentiation, or two more forward passes (central difference)."""

    def feedback_weight_at(self, step: int) -> float:
        """Weight of the feedback in step number `step` (from 0)."""
        return ramped(self.feedback_weight, self.feedback_ramp, step)


@dataclass(frozen=True, kw_only=True)
class MetaSemiConfig:
    """MetaSemi (Sakura03/SemiMeta): soft labels corrected by the meta-gradient, then learned."""

    learner: LearnerConfig = field(
        default_factory=lambda: LearnerConfig(lr=0.1, max_grad_norm=0.0, nesterov=False, warmup=0)
    )
    weight: float = 1.0
    """Of the squared difference between the unlabeled images' probabilities and their labels."""
    ramp: int = 0
    """Steps over which `weight` grows linearly from 0."""
    mixup: float = 1.0
    """Alpha of the Beta distribution that mixes labeled with unlabeled images; 0: no mixing."""
    derivative: Derivative = "central"
    """central: two more forward passes, as published; forward: forward-mode differentiation. auto:
    forward, or central where a layer has none."""
    epsilon: float = 0.01
    """Length of the step in weight space of the central difference."""
    label_rate: float = 0.0
    """Rate of the labels' correction; 0: the learning rate, as published."""
