"""One training run: data, network, algorithm, and how long and where it runs."""

from dataclasses import dataclass, field
from typing import Literal

from mpl_fast.config.algorithms import (
    FinetuneConfig,
    FixMatchConfig,
    MetaSemiConfig,
    MPLConfig,
    RolePlayConfig,
    SMPLConfig,
    SupervisedConfig,
    UDAConfig,
)

GradientSync = Literal["allreduce", "ddp"]
Graphs = Literal["off", "model", "step"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the images are and how they become views."""

    root: str = ""
    """Folder that `tools/make_rec.py pack` wrote."""
    image_size: int = 224
    """Side of the square views, in pixels."""
    crop: Literal["random_resized", "pad_crop"] = "random_resized"
    """Weak view: random resized crop, or the image padded by 4 pixels and cropped back."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """How images are resized, antialiased both: as published, or with half the work, which counts
    where DALI works on the CPU."""
    flip: bool = True
    """Mirror at random; switch off where left and right differ in meaning, as in digits."""
    policy: Literal["mpl", "mpl_branched", "dali"] = "mpl"
    """Strong view: the official code's 15 operations, the same as a slower reference, or DALI's own
    RandAugment."""
    num_ops: int = 2
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
    """Share of the shorter side that evaluation keeps (crop random_resized only)."""
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
    """Any timm name, or wrn_28_2, wrn_28_8, convlarge, shake_shake_26 (for 32-pixel images)."""
    classes: int = 0
    """Width of the last layer; 0 takes the number of classes in the data, another number must equal
    it."""
    norm: Literal["batch", "sync"] = "batch"
    """Batch norm of training passes by each rank's own images, or by those of all ranks (sync: on
    CUDA, not compiled), for batches too small to be normalized alone. The student is judged by each
    rank's own in any case."""
    norm_momentum: float = 0.0
    """Share of the new batch in batch norm's running statistics; 0 keeps the network's own (wrn
    0.001, timm 0.1)."""
    pretrained: str = ""
    """Begin with weights from a .safetensors or .pth file, or, if this is timm, with timm's own;
    empty: at random."""
    frozen: bool = False
    """Train the last layer only; everything else keeps its pretrained weights and statistics."""


AlgorithmConfig = (
    SupervisedConfig
    | FinetuneConfig
    | UDAConfig
    | FixMatchConfig
    | MPLConfig
    | RolePlayConfig
    | SMPLConfig
    | MetaSemiConfig
)
RECIPES: dict[str, type[AlgorithmConfig]] = {
    "supervised": SupervisedConfig,
    "finetune": FinetuneConfig,
    "uda": UDAConfig,
    "fixmatch": FixMatchConfig,
    "mpl": MPLConfig,
    "mpl_roleplay": RolePlayConfig,
    "smpl": SMPLConfig,
    "metasemi": MetaSemiConfig,
}
LABELED_ONLY = ("supervised", "finetune")  # recipes that read no unlabeled images


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run."""

    run_dir: str = ""
    """Folder of the run: config, metrics, checkpoints. The same command with the same folder
    resumes."""
    recipe: Literal[
        "supervised", "finetune", "uda", "fixmatch", "mpl", "mpl_roleplay", "smpl", "metasemi"
    ] = "mpl"
    """Algorithm; decides which --algorithm.* options there are."""
    steps: int = 700_000
    """Training steps in all."""
    epochs: float = 0.0
    """Passes over the data, in place of `steps`: over the unlabeled images, or over the labeled
    ones for recipes that read no others; 0: `steps` counts."""
    labeled_batch: int = 1024
    """Labeled images in a step, over all ranks."""
    unlabeled_batch: int = 15_360
    """Unlabeled images in a step, over all ranks; supervised and finetune ignore it."""
    seed: int = 0
    """Of initial weights, data order, augmentation and dropout."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto takes CUDA if there is a GPU."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the forward pass; weights and losses are float32 always. auto: bf16 on CUDA, fp32 on the
    CPU."""
    compile: Literal["off", "default", "max-autotune"] = "off"
    """torch.compile the networks."""
    cuda_graphs: Graphs = "off"
    """Launch kernels together, for small networks on a GPU: those of each compiled pass (model), or
    of all of a step but the average, once its ramps and waits are over (step)."""
    microbatches: int = 1
    """Parts in which a rank computes its batch, one after the other, to need less memory (for mpl
    together with --algorithm.teacher_graph recompute); batch norm sees each by itself."""
    grad_sync: GradientSync = "allreduce"
    """How gradients cross ranks: allreduce, all of a network's in one exchange after the
    backward pass; ddp, in DistributedDataParallel's buckets during it, faster between machines."""
    deterministic: bool = False
    """Bitwise repeatable, at some cost in speed."""
    eval_every: int = 5000
    """Steps between evaluations (0: only at the end)."""
    eval_epochs: float = 0.0
    """Passes between evaluations, in place of `eval_every`; counted as `epochs` are."""
    eval_batch: int = 1024
    """Images in an evaluation batch, over all ranks."""
    log_every: int = 50
    """Steps that one row of metrics averages."""
    checkpoint_every: int = 1000
    """Steps between checkpoints (0: only at the end)."""
    checkpoint_keep: int = 2
    """Newest checkpoints to keep."""
    stop_at: int = 0
    """Save and pause after this step; a run that is there already goes on (0: run to the end)."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    algorithm: AlgorithmConfig = field(default_factory=MPLConfig)
