"""A trained network with all that is needed to use it: transform, class names, config."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mpl_fast.config import DataConfig, RolePlayConfig, RunConfig
from mpl_fast.config.command_line import parse
from mpl_fast.config.run import WhichCheckpoint
from mpl_fast.data.manifest import read_manifest
from mpl_fast.distributed import init
from mpl_fast.errors import CheckpointError, DataError
from mpl_fast.training.auto import evaluated_in, uses_bf16
from mpl_fast.training.build import build_network
from mpl_fast.training.checkpoint import step_of
from mpl_fast.training.saving import State
from mpl_fast.training.state import evaluated, no_class_names
from mpl_fast.training.trained import read_checkpoint

# Of DataConfig: what makes the input of a network in evaluation.
VIEW = (
    "image_size", "crop", "interpolation", "antialias", "use_fast_idct", "eval_crop", "mean", "std",
)  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """The network that a run evaluates, and what is needed to use it."""

    network: nn.Module
    """From ``(N, 3, H, W)`` normalized images to ``(N, C)`` logits; of an ensemble, logits whose
    softmax is the ensemble's prediction. In evaluation mode, its weights without gradient."""
    transform: Callable[[Image.Image], Tensor]
    """From an image to the ``(3, H, W)`` float32 tensor that the network was evaluated on."""
    classes: tuple[str, ...]
    """Name of each class, by label."""
    config: RunConfig
    """Of the run; ``config.data`` has size, crop, mean and standard deviation of the images."""
    checkpoint: Path
    """Folder of the checkpoint."""
    device: torch.device
    accuracy: dict[str, float]
    """top1 and top5 in percent, and count, as evaluated last before the checkpoint was written;
    empty before the first evaluation."""
    warnings: tuple[str, ...] = ()
    """Of damaged checkpoints that were passed over, and of missing class names."""

    @property
    def step(self) -> int:
        """Training steps done."""
        return step_of(self.checkpoint)

    @property
    def dtype(self) -> torch.dtype:
        """Of images that need no cast: bfloat16 where the run used it, else float32."""
        return torch.bfloat16 if uses_bf16(self.config, self.device) else torch.float32

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Class probabilities ``(N, C)`` float32, at the precision of the run's evaluation."""
        return self.logits(images).softmax(-1)

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Logits ``(N, C)`` float32 of ``(N, 3, H, W)`` images, at the run's precision."""
        bf16 = self.dtype is torch.bfloat16
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            logits: Tensor = self.network(images.to(self.device))
        return logits.float()

    @torch.no_grad()
    def logits_and_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``(N, C)`` and what the last layer receives, ``(N, F)``, both float32; the
        features of an ensemble are those of its networks side by side."""
        members = self.network.members if isinstance(self.network, Ensemble) else [self.network]
        inputs: list[Tensor] = []

        def keep(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            inputs.append(given[0].flatten(1).float())

        hooks = [_last_layer(one).register_forward_pre_hook(keep) for one in members]
        try:
            logits = self.logits(images)
        finally:
            for hook in hooks:
                hook.remove()
        return logits, torch.cat(inputs, 1)

    def predict(self, images: Sequence[Image.Image]) -> Tensor:
        """Class probabilities ``(N, C)`` float32 of images of any size."""
        return self(torch.stack([self.transform(image) for image in images]))


class Ensemble(nn.Module):
    """Several networks as one: the mean of their logits, or the logarithm of the mean of their
    probabilities."""

    def __init__(self, members: Sequence[nn.Module], mean_of: Literal["probability", "logits"]):
        super().__init__()
        self.members, self.mean_of = nn.ModuleList(members), mean_of

    def forward(self, images: Tensor) -> Tensor:
        logits = torch.stack([member(images).float() for member in self.members])
        if self.mean_of == "logits":
            return logits.mean(0)
        return logits.log_softmax(-1).logsumexp(0) - torch.tensor(float(len(logits))).log()


def load(
    run: str | Path,
    *,
    device: str = "auto",
    checkpoint: WhichCheckpoint = "newest",
    pipeline: Sequence[str] = (),
) -> Trained:
    """The network that a run evaluates, with the averaged weights of a checkpoint.

    `run` is a run directory, `device` is ``auto``, ``cpu`` or ``cuda``, `checkpoint` the newest or
    the best one (of runs with ``checkpoint_best``); `pipeline` has options of train.py that replace
    those of the run, such as ``["--data.threads", "4"]``. The run's records need not exist. Raises
    `DataError` for a folder without config.yaml and `CheckpointError` if no checkpoint is usable.
    """
    config = config_of(run, ["--device", device, *pipeline])
    found, shared, warnings = read_checkpoint(run, checkpoint)
    place = init(config.device).device
    config = evaluated_in(config, shared, place)
    classes = _classes(shared, config, found)
    if "classes" not in shared:
        warnings.append(no_class_names(found))
    network = _network(shared, config, classes, found).eval().requires_grad_(False)
    network = cast(Any, network).to(place, memory_format=torch.channels_last)
    return Trained(
        network,
        transform_of(config),
        classes,
        config,
        found,
        place,
        shared.get("accuracy", {}),
        tuple(warnings),
    )


def config_of(run: str | Path, options: Sequence[str] = ()) -> RunConfig:
    """The config in a run directory, with options of train.py over it. Raises `DataError` if there
    is none."""
    file = Path(run) / "config.yaml"
    if not file.exists():
        raise DataError(f"{file} does not exist: name a run directory that has trained")
    return parse(["--config", str(file), *options, "--run-dir", str(run)])


def transform_of(config: RunConfig) -> Callable[[Image.Image], Tensor]:
    """What evaluation does to an image, by torchvision: to RGB, resize, center crop, normalize.

    DALI's result differs in the rounding of sizes and corners, by at most a pixel, in its JPEG
    decoder and, without `antialias`, in the coefficient of a bicubic filter, -0.5 for -0.75.
    """
    from torchvision.transforms import v2  # late: takes a second

    data = config.data
    side, filter_ = data.image_size, v2.InterpolationMode(data.interpolation)
    whole = data.crop == "pad_crop"
    size = [side, side] if whole else [resized_side(data)]
    steps = [
        v2.Lambda(_of_8_bits),
        v2.RGB(),
        *([] if data.antialias else [v2.ToImage()]),  # Pillow always antialiases
        v2.Resize(size, filter_, antialias=data.antialias),
        v2.CenterCrop(side),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([*data.mean], [*data.std]),
        v2.ToPureTensor(),
    ]
    return cast(Callable[[Image.Image], Tensor], v2.Compose(steps))


def _of_8_bits(image: Image.Image) -> Image.Image:
    """Converts gray of 16 bits as DALI scales it; Pillow would clip at 255."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image


def resized_side(data: DataConfig) -> int:
    """Pixels of an image's shorter side before evaluation's center crop."""
    return round(data.image_size / data.eval_crop)


def _classes(shared: State, config: RunConfig, checkpoint: Path) -> tuple[str, ...]:
    """Names by label; of a checkpoint of an older version, those of the run's records."""
    if "classes" in shared:
        return tuple(shared["classes"])
    try:
        return read_manifest(config.data.root).classes
    except DataError as error:
        raise CheckpointError(
            f"{checkpoint} has no class names, and the run's records cannot be read ({error}): "
            "give --data.root REC"
        ) from None


def _network(
    shared: State, config: RunConfig, classes: Sequence[str], checkpoint: Path
) -> nn.Module:
    members = []
    for _, weights in evaluated(shared).values():
        member = build_network(config, len(classes), class_names=classes)
        try:
            member.load_state_dict(weights)
        except RuntimeError as error:
            reason = " ".join(str(error).partition(":")[2].split())[:120]
            raise CheckpointError(f"{checkpoint} is of another network: {reason}") from None
        members.append(member)
    if len(members) == 1:
        return members[0]
    algorithm = config.algorithm
    logits = isinstance(algorithm, RolePlayConfig) and algorithm.ensemble == "logits"
    return Ensemble(members, "logits" if logits else "probability")


def _last_layer(network: Any) -> nn.Module:
    """timm's classifier; of several, the first."""
    found = network.get_classifier()
    layer: nn.Module = found[0] if isinstance(found, tuple | list) else found
    return layer
