"""Everything that can be set, as frozen dataclasses: one place for a knob's name, default, unit and
source.

Nothing here imports torch or DALI, so that ``--help`` answers at once. Defaults are those of the
published ImageNet-10 % run (README of google-research/meta_pseudo_labels) unless a comment says
otherwise.
"""

import math
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the images are and how they become views."""

    root: str = ""
    """Folder that `tools/make_rec.py pack` wrote."""
    image_size: int = 224
    """Side of the square views, in pixels."""
    weak: Literal["imagenet", "cifar"] = "imagenet"
    """Weak view: random resized crop, or the image padded by 4 pixels and cropped back."""
    flip: bool = True
    """Mirror at random; switch off where left and right differ in meaning, as in digits."""
    policy: Literal["mpl", "dali"] = "mpl"
    """Strong view: the official code's 15 operations, or DALI's own RandAugment."""
    layers: int = 2
    """RandAugment operations in a row."""
    magnitude: float = 17.0
    """RandAugment strength; 10 is nominal. Policy dali knows 0 to 10 and stops there."""
    translate: float = 100.0
    """Pixels that a translation moves at magnitude 10 (CIFAR: 4)."""
    cutout: int = 40
    """Half side in pixels of the square that the Cutout operation removes at magnitude 10 (CIFAR:
    4)."""
    final_cutout: int = 0
    """Half side in pixels of a square always removed from the strong view, after RandAugment
    (CIFAR: 8)."""
    eval_crop: float = 0.875
    """Share of the shorter side that evaluation keeps (imagenet view only)."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Of the red, green and blue channel, on a scale of 0 to 1."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Of the red, green and blue channel, on a scale of 0 to 1."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where DALI decodes and augments; auto follows the training device."""
    threads: int = 0
    """DALI's CPU threads for each rank; 0 shares the machine's cores among its ranks."""
    prefetch: int = 2
    """Batches that DALI prepares ahead."""
    shuffle_buffer: int = 4096
    """Records the reader shuffles among; packing has shuffled the whole set already."""
    hw_decoder_load: float = 0.65
    """Share of the images that a GPU's JPEG engine decodes, where there is one."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network; teacher and student have the same shape and different weights."""

    name: str = "resnet50"
    """Any timm name, or wrn_28_2, wrn_28_8, wrn_10_1 (wide ResNets for 32-pixel images)."""
    classes: int = 0
    """Width of the last layer; 0 takes the number of classes in the data, another number must equal
    it."""
    norm_momentum: float = 0.0
    """Share of the new batch in batch norm's running statistics; 0 keeps the network's own (wrn
    0.001, timm 0.1)."""


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """How one network is trained: Nesterov SGD, linear warm-up, cosine decay, moving average."""

    lr: float = 0.4
    """Peak learning rate for the whole (global) batch."""
    momentum: float = 0.9
    """Of Nesterov's SGD."""
    weight_decay: float = 1e-4
    """L2 penalty on weight matrices and filters; norms and biases have none."""
    clip: float = 5.0
    """Largest gradient norm; 0 switches clipping off."""
    warmup: int = 5000
    """Steps from learning rate 0 up to `lr`, after `wait`."""
    wait: int = 0
    """Steps at learning rate 0 before the warm-up."""
    ema: float = 0.0
    """Decay of the moving average of weights and statistics, which is what gets evaluated; 0 keeps
    none."""
    dropout: float = 0.1
    """Share of the pooled features that is dropped in training."""

    def lr_at(self, step: int, steps: int) -> float:
        """Learning rate of step number `step` (from 0) in a run of `steps`."""
        after = step - self.wait
        if after < 0:
            return 0.0
        if after < self.warmup:
            return self.lr * (after + 1) / self.warmup
        progress = (after - self.warmup) / max(1, steps - self.wait - self.warmup)
        return self.lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


@dataclass(frozen=True, kw_only=True)
class ConsistencyConfig:
    """Unsupervised data augmentation (arXiv 1904.12848): the strong view must agree with the weak
    one."""

    weight: float = 20.0
    """Of the consistency term once the ramp is over."""
    ramp: int = 50_000
    """Steps over which `weight` grows linearly from 0."""
    temperature: float = 0.5
    """Divides the weak view's logits: below 1 sharpens the target."""
    threshold: float = 0.6
    """An image counts if its largest sharpened probability reaches this."""

    def weight_at(self, step: int) -> float:
        """Weight of step number `step` (from 0)."""
        return self.weight * min(1.0, (step + 1) / self.ramp) if self.ramp else self.weight


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig:
    """Labeled images only."""

    learner: LearnerConfig = field(default_factory=lambda: LearnerConfig(ema=0.999))
    smoothing: float = 0.1
    """Label smoothing."""


@dataclass(frozen=True, kw_only=True)
class UDAConfig:
    """Cross-entropy on labels plus consistency between two views of unlabeled images."""

    learner: LearnerConfig = field(default_factory=lambda: LearnerConfig(ema=0.999))
    consistency: ConsistencyConfig = field(default_factory=ConsistencyConfig)
    smoothing: float = 0.1
    """Label smoothing of the labeled loss."""


@dataclass(frozen=True, kw_only=True)
class MPLConfig:
    """Meta Pseudo Labels (arXiv 2003.10580)."""

    teacher: LearnerConfig = field(default_factory=lambda: LearnerConfig(lr=0.6))
    student: LearnerConfig = field(default_factory=lambda: LearnerConfig(wait=20_000, ema=0.999))
    consistency: ConsistencyConfig = field(default_factory=ConsistencyConfig)
    smoothing: float = 0.1
    """Label smoothing of the teacher's labeled loss and of the student's pseudo-label loss."""
    pseudo: Literal["weak", "strong"] = "weak"
    """View on which the teacher picks the label (arg-max) that the student learns and the feedback
    judges."""
    feedback: Literal["difference", "off"] = "difference"
    """difference: labeled loss before minus after the student's step, averaged over ranks. off: no
    feedback."""


AlgorithmConfig = SupervisedConfig | UDAConfig | MPLConfig
RECIPES: dict[str, type[AlgorithmConfig]] = {
    "supervised": SupervisedConfig,
    "uda": UDAConfig,
    "mpl": MPLConfig,
}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run."""

    run_dir: str = ""
    """Folder of the run: config, metrics, checkpoints. The same command with the same folder
    resumes."""
    recipe: Literal["supervised", "uda", "mpl"] = "mpl"
    """Algorithm; decides which --algorithm.* options there are."""
    steps: int = 700_000
    """Training steps in all."""
    labeled_batch: int = 1024
    """Labeled images in a step, over all ranks."""
    unlabeled_batch: int = 15_360
    """Unlabeled images in a step, over all ranks; supervised ignores it."""
    seed: int = 0
    """Of initial weights, data order, augmentation and dropout."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto takes CUDA if there is a GPU."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the forward pass; weights and losses are float32 always. auto: bf16 on CUDA, fp32 on the
    CPU."""
    compile: Literal["off", "default", "max-autotune"] = "off"
    """torch.compile the networks."""
    deterministic: bool = False
    """Bitwise repeatable, at some cost in speed."""
    eval_every: int = 5000
    """Steps between evaluations (0: only at the end)."""
    eval_batch: int = 1024
    """Images in an evaluation batch, over all ranks."""
    log_every: int = 50
    """Steps that one row of metrics averages."""
    checkpoint_every: int = 1000
    """Steps between checkpoints (0: only at the end)."""
    checkpoint_keep: int = 2
    """Newest checkpoints to keep."""
    stop_at: int = 0
    """Save and pause after this step, to be resumed by the same command without it (0: run to the
    end)."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    algorithm: AlgorithmConfig = field(default_factory=MPLConfig)


def problems(config: RunConfig) -> list[str]:
    """What is wrong with the values, one line each, the key's name first; types are checked
    already."""
    found = [
        f"{key} must be {rule}, not {value}"
        for key, value, rule, fine in _ranges(config)
        if not fine
    ]
    if not config.run_dir:
        found.append("run_dir is missing: give --run-dir FOLDER")
    if not config.data.root:
        found.append("data.root is missing: give --data.root FOLDER, as tools/make_rec.py wrote it")
    return found


def _ranges(config: RunConfig) -> list[tuple[str, float, str, bool]]:
    """Key, value, the rule in words, and whether the value keeps it."""
    least = {"steps": 1, "labeled_batch": 1, "eval_batch": 1, "log_every": 1, "checkpoint_keep": 2}
    at_zero = ("eval_every", "checkpoint_every", "stop_at", "seed")
    rows: list[tuple[str, float, str, bool]] = []
    for key in (*least, *at_zero):
        value, low = getattr(config, key), least.get(key, 0)
        rows.append((key, value, f"at least {low}", value >= low))
    unlabeled = config.unlabeled_batch
    enough = unlabeled >= 1 or config.recipe == "supervised"
    rows.append(("unlabeled_batch", unlabeled, f"at least 1 for recipe {config.recipe}", enough))
    momentum = config.model.norm_momentum
    rows.append(("model.norm_momentum", momentum, "in [0, 1]", 0 <= momentum <= 1))
    rows.append(("model.classes", config.model.classes, "at least 0", config.model.classes >= 0))
    return rows + _data_ranges(config.data) + _algorithm_ranges(config.algorithm)


def _data_ranges(data: DataConfig) -> list[tuple[str, float, str, bool]]:
    least = {"image_size": 8, "layers": 0, "magnitude": 0, "cutout": 0, "final_cutout": 0}
    least |= {"threads": 0, "prefetch": 1, "shuffle_buffer": 1}
    rows: list[tuple[str, float, str, bool]] = [
        (f"data.{key}", getattr(data, key), f"at least {low}", getattr(data, key) >= low)
        for key, low in least.items()
    ]
    rows.append(("data.eval_crop", data.eval_crop, "in (0, 1]", 0 < data.eval_crop <= 1))
    load = data.hw_decoder_load
    rows.append(("data.hw_decoder_load", load, "in [0, 1]", 0 <= load <= 1))
    rows += [("data.std", value, "above 0", value > 0) for value in data.std]
    return rows


def _algorithm_ranges(algorithm: AlgorithmConfig) -> list[tuple[str, float, str, bool]]:
    a = algorithm
    rows = [("algorithm.smoothing", a.smoothing, "in [0, 1)", 0 <= a.smoothing < 1)]
    if not isinstance(a, SupervisedConfig):
        c, at = a.consistency, "algorithm.consistency"
        rows.append((f"{at}.temperature", c.temperature, "above 0", c.temperature > 0))
        rows += [
            (f"{at}.{k}", getattr(c, k), "at least 0", getattr(c, k) >= 0)
            for k in ("weight", "ramp")
        ]
        rows.append((f"{at}.threshold", c.threshold, "at least 0", c.threshold >= 0))
    names = ("teacher", "student") if isinstance(a, MPLConfig) else ("learner",)
    for name in names:
        learner: LearnerConfig = getattr(a, name)
        for key in ("lr", "weight_decay", "clip", "warmup", "wait"):
            value = getattr(learner, key)
            rows.append((f"algorithm.{name}.{key}", value, "at least 0", value >= 0))
        for key in ("momentum", "ema", "dropout"):
            value = getattr(learner, key)
            rows.append((f"algorithm.{name}.{key}", value, "in [0, 1)", 0 <= value < 1))
        if learner.momentum == 0:
            rows.append((f"algorithm.{name}.momentum", 0, "above 0 (Nesterov)", False))
    return rows
