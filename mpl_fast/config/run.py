"""One training run: data, network, algorithm, length, devices, evaluation and checkpoints."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from mpl_fast.config.algorithms import AlgorithmConfig, FinetuneConfig, MPLConfig
from mpl_fast.config.fields import (
    POSITIVE,
    Fraction,
    FractionAbove0,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    at_least,
    at_most,
    sections,
)
from mpl_fast.config.learner import LearnerConfig

WhichCheckpoint = Literal["newest", "best"]
CHECKPOINTS: dict[WhichCheckpoint, str] = {  # folders in a run directory
    "newest": "checkpoints",
    "best": "checkpoints_best",
}
GradientSync = Literal["allreduce", "ddp"]
Graphs = Literal["off", "model", "step"]
Policy = Literal["mpl", "mpl_branched", "dali"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Records, their two views, and the input pipeline."""

    root: str = ""
    """Folder that `tools/make_rec.py pack` wrote."""
    image_size: Annotated[int, at_least(8)] = 224
    """Side of the square views, in pixels."""
    crop: Literal["random_resized", "pad_crop"] = "random_resized"
    """Crop of both views: random resized crop, or padding by 4 pixels and a random crop."""
    strong_crop: Literal["shared", "own"] = "shared"
    """shared: the strong view has the weak view's crop, as in FixMatch's code for ImageNet. own:
    each view has a crop of its own, as in FixMatch's code for CIFAR, EMAN, CoMatch and SimMatch.
    With crop random_resized, own decodes the whole image, shared only the cropped part, which is
    cheaper."""
    labeled_view: Literal["weak", "strong"] = "weak"
    """View of the labeled images, in every recipe, also where they give MPL's feedback. weak: crop
    and flip. strong: RandAugment and final cutout too, which pays in long runs with few labels."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """Filter of resizing: bicubic as published, or bilinear, which is half the work on a CPU."""
    antialias: bool = True
    """Where resizing shrinks, average over all pixels under the filter, as Pillow and timm do;
    false: interpolate between the nearest ones, as the published code does (TensorFlow's default),
    which costs less on a CPU."""
    use_fast_idct: bool = False
    """Decode JPEG with libjpeg-turbo's faster, less accurate inverse DCT where DALI decodes on a
    CPU."""
    flip: bool = True
    """Random horizontal flip; switch it off where mirroring changes the class, as in digits."""
    policy: Policy = "mpl"
    """RandAugment of the strong view. mpl: the operations of the official code. mpl_branched:
    the same in a slower implementation, as a reference. dali: NVIDIA DALI's own."""
    num_ops: NonNegativeInt = 2
    """RandAugment operations applied one after the other."""
    magnitude: NonNegativeFloat = 17.0
    """RandAugment magnitude; 10 is nominal. Policy dali has levels 0 to 10 and takes 10 above."""
    translate: float = 100.0
    """Pixels of a translation at magnitude 10 (CIFAR: 4)."""
    cutout: NonNegativeInt = 40
    """Half the side, in pixels, of the Cutout operation's square at magnitude 10 (CIFAR: 4)."""
    final_cutout: NonNegativeInt = 0
    """Half the side, in pixels, of a square always cut out of the strong view after RandAugment
    (CIFAR: 8); 0: none."""
    eval_crop: FractionAbove0 = 0.875
    """Share of the shorter side that evaluation's center crop keeps (crop random_resized only)."""
    mean: Annotated[tuple[float, float, float], at_least(0)] = (0.485, 0.456, 0.406)
    """Mean of the red, green and blue channel, on a scale of 0 to 1."""
    std: Annotated[tuple[float, float, float], POSITIVE] = (0.229, 0.224, 0.225)
    """Standard deviation of the red, green and blue channel, on a scale of 0 to 1."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Device on which DALI decodes and augments. auto: the training device."""
    threads: Annotated[int, at_least(0), at_most(1024)] = 0
    """DALI's CPU threads on each rank; 0: the machine's cores divided by its ranks."""
    prefetch: PositiveInt = 2
    """Batches that DALI prepares ahead."""
    shuffle_buffer: PositiveInt = 4096
    """Records among which the reader shuffles; packing has already shuffled the whole set."""
    hw_decoder_load: Fraction = 0.65
    """Share of the images that a GPU's hardware JPEG decoder decodes, where there is one."""

    def problems(self) -> list[str]:
        """What is missing or of another scale, a line that begins with its key."""
        found = [
            f"{name} must be on a scale of 0 to 1, not [{', '.join(map(str, values))}]: divide by "
            "255"
            for name, values in (("mean", self.mean), ("std", self.std))
            if max(values) > 1
        ]
        if any("\ud800" <= letter <= "\udfff" for letter in self.root):
            found.append(
                f"root {self.root} is not UTF-8, which DALI cannot open: rename the folder"
            )
        if not self.root:
            found.append(
                "root is missing: give --data.root FOLDER, as tools/make_rec.py wrote it (a "
                "dry run also takes --records)"
            )
        return found


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Network architecture, the same for teacher and student."""

    name: str = "resnet50"
    """Any timm name, or, for 32-pixel images, airbench94, wrn_28_2, wrn_28_8, wrn_28_10, convlarge,
    shake_shake_26, resnet18_cifar, resnet50_cifar (timm's with a 3x3 stem that keeps the size).
    Networks for images of one size, such as ViT, are built for data.image_size."""
    classes: NonNegativeInt = 0
    """Outputs of the last layer, which must equal the number of classes in the data; 0: that
    number."""
    norm: Literal["batch", "sync"] = "batch"
    """Batch norm over each rank's own images, or over those of all ranks (sync), for batches too
    small to be normalized alone: one small exchange a layer in each pass, forward and backward. The
    student's labeled loss in the feedback is always normalized on each rank alone."""
    norm_momentum: Fraction = 0.0
    """Share of a new batch in batch norm's running statistics; 0: as the network defines it (wrn
    0.001, timm 0.1)."""
    pretrained: str = ""
    """Initial weights: a file (.safetensors, .pth, .pth.tar, .ckpt, state.pt), FILE:ENTRY for one
    of several in it, or timm for timm's own; empty: random."""
    frozen: bool = False
    """Train the last layer only; all other weights and statistics stay as pretrained."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run."""

    run_dir: str = ""
    """Folder of the run: config, metrics, checkpoints. The same command with the same folder
    resumes."""
    lock: bool = True
    """Lock the folder against a second run in it; false: where its file system has no locks."""
    steps: PositiveInt = 700_000
    """Training steps."""
    epochs: NonNegativeFloat = 0.0
    """Training length in place of `steps`: passes over the unlabeled images (over the labeled ones
    for recipes that use no others); 0: `steps` counts."""
    labeled_batch: PositiveInt = 1024
    """Labeled images in a step, over all ranks."""
    unlabeled_batch: NonNegativeInt = 15_360
    """Unlabeled images in a step, over all ranks; supervised and finetune ignore it."""
    seed: Annotated[int, at_least(0), at_most(10**13)] = 0
    """Seed of initial weights, data order, augmentation and dropout."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Training device. auto: CUDA if there is a GPU."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of the forward pass; weights and losses are always float32. auto: bf16 on CUDA, and
    on a CPU with AMX for networks without grouped convolutions, else fp32; a run that is resumed
    keeps its own."""
    compile: Literal["auto", "off", "default", "max-autotune"] = "auto"
    """Mode of torch.compile for the networks; off: not compiled. auto: default on CUDA, off on a
    CPU and for model.norm sync with grad_sync ddp."""
    cuda_graphs: Literal["auto", Graphs] = "auto"
    """CUDA graphs, which save the time of launching kernels on a GPU. model: one for each compiled
    pass. step: one for the whole step but the moving average, once ramps and delays are over. auto:
    step on CUDA where a step can be captured (not with grad_sync ddp, apex, or recipes that draw
    the same dropout twice), else off."""
    microbatches: PositiveInt = 1
    """Equal parts in which a rank computes its batch one after the other, to save memory (with mpl,
    also set --algorithm.teacher_graph recompute); batch norm normalizes each part by itself."""
    grad_sync: Literal["auto", GradientSync] = "auto"
    """Averaging of gradients over ranks. allreduce: all of a network's at once after the backward
    pass. ddp: in DistributedDataParallel's buckets during it. auto: ddp on CUDA between machines;
    allreduce otherwise, and with microbatches, cuda_graphs step, or a compiled model.norm sync."""
    deterministic: bool = False
    """Bitwise repeatable results, at some cost in speed."""
    eval_every: NonNegativeInt = 5000
    """Steps between evaluations; 0: only at the end."""
    eval_epochs: NonNegativeFloat = 0.0
    """Passes between evaluations, in place of `eval_every`, counted as in `epochs`."""
    patience: NonNegativeInt = 0
    """Evaluations in a row without a better top-1 after which the run ends, as if it had reached
    `steps`; those before a delay (delay_steps) is over do not count. Schedules are those of `steps`
    and are cut off: cosine's learning rate has not come down to 0. A run that ended early continues
    when it is resumed with a larger value, or 0. 0: no early end."""
    eval_batch: PositiveInt = 1024
    """Images in an evaluation batch, over all ranks; at most the validation split is one batch."""
    log_every: PositiveInt = 50
    """Steps averaged in one row of metrics."""
    checkpoint_every: NonNegativeInt = 1000
    """Steps between checkpoints; 0: only at the end."""
    checkpoint_keep: Annotated[int, at_least(2)] = 2
    """Newest checkpoints that are kept."""
    checkpoint_best: bool = False
    """Also keep the checkpoint of the best top-1 so far, in checkpoints_best: each better
    evaluation then saves one. It is selected on the validation images themselves."""
    hang_timeout: NonNegativeFloat = 600.0
    """Seconds without a step, or a batch of an evaluation, after which a rank writes where it is to
    RUN/hang and ends with exit code 7, so that the run ends, or torchrun restarts it. For the first
    steps and compilation: three times as many, and at least 1800. Of a save that is waited for:
    seconds in which no data reaches the disk. 0: no limit."""
    stop_at: NonNegativeInt = 0
    """Save and stop after this step; a run that is already there continues. 0: run to the end."""
    on_spike: Literal["skip", "rollback"] = "skip"
    """What to do when training diverges: ten skipped updates in a row, or a value that is not
    finite. skip: end the run. rollback: go back to the newest checkpoint and on from there, with
    the images that come next in place of those since then."""
    spike_factor: NonNegativeFloat = 5.0
    """With on_spike rollback, a loss (labeled, or the student's) also diverges where a row has more
    than this factor of its median over the 20 rows before, or of 0.1 if that is less. 0: never."""
    rollbacks: PositiveInt = 3
    """With on_spike rollback, how often a run goes back before it ends."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    algorithm: AlgorithmConfig = field(default_factory=MPLConfig)

    @property
    def recipe(self) -> str:
        """Algorithm; it determines which --algorithm.* options there are."""
        return self.algorithm.recipe

    @property
    def unlabeled_images(self) -> int:
        """Unlabeled images that a step uses, over all ranks: `unlabeled_batch`, or none."""
        return 0 if self.algorithm.labeled_only else self.unlabeled_batch

    @property
    def images(self) -> int:
        """Distinct images that a step uses, over all ranks."""
        return self.labeled_batch + self.unlabeled_images

    def problems(self) -> list[str]:
        """Contradictions between sections, each a line that begins with a key."""
        found = self._batch_problems() + self._start_problems() + self._graph_problems()
        if (
            self.model.norm == "sync"
            and self.grad_sync == "ddp"
            and self.compile not in ("auto", "off")
        ):
            found.append(
                "model.norm sync cannot be compiled with grad_sync ddp: set --compile off, or "
                "--grad-sync allreduce"
            )
        if self.patience and not (self.eval_every or self.eval_epochs):
            found.append("patience needs evaluations before the end: set eval_every")
        if self.on_spike == "rollback" and not self.checkpoint_every:
            found.append("on_spike rollback needs checkpoints before the end: set checkpoint_every")
        if not self.run_dir:
            found.append("run_dir is missing: give --run-dir FOLDER")
        return found

    def _batch_problems(self) -> list[str]:
        found, algorithm = [], self.algorithm
        if self.unlabeled_batch < 1 and not algorithm.labeled_only:
            found.append(f"unlabeled_batch must be at least 1 for recipe {self.recipe}, not 0")
        if self.microbatches > 1 and self.grad_sync == "ddp":
            found.append("microbatches above 1 need grad_sync allreduce: DDP syncs after each part")
        if self.microbatches > 1 and algorithm.whole_batch:
            found.append(
                f"microbatches must be 1 for {algorithm.whole_batch}, whose step needs the whole "
                "batch at once"
            )
        return found

    def _start_problems(self) -> list[str]:
        """Of the weights that the run starts from."""
        finetune, model = isinstance(self.algorithm, FinetuneConfig), self.model
        if finetune and model.pretrained:
            return [
                "model.pretrained is not for recipe finetune, which starts from algorithm.start"
            ]
        if model.frozen and not (finetune or model.pretrained):
            return ["model.frozen would keep random weights: give --model.pretrained FILE too"]
        return [
            f"{prefix}trunk_delay_steps is of no use with model.frozen: give one of them"
            for prefix, section in sections(self.algorithm, "algorithm.")
            if model.frozen and isinstance(section, LearnerConfig) and section.trunk_delay_steps
        ]

    @property
    def no_step_graph(self) -> str:
        """Why a step cannot be one CUDA graph; empty if it can."""
        if choice := self.algorithm.repeats_draws:
            return f"{choice} draws the same dropout twice"
        if self.grad_sync == "ddp":
            return "the buckets of grad_sync ddp cannot be captured"
        for prefix, section in sections(self.algorithm, "algorithm."):
            if isinstance(section, LearnerConfig) and section.optimizer_backend == "apex":
                return f"{prefix}optimizer_backend apex reads its learning rate on the host"
        return ""

    def _graph_problems(self) -> list[str]:
        if self.cuda_graphs == "model" and self.compile == "off":
            return ["cuda_graphs model is for compiled networks: give --compile default as well"]
        if self.cuda_graphs == "step" and (reason := self.no_step_graph):
            return [f"cuda_graphs step is not possible, since {reason}: set cuda_graphs auto"]
        return []
