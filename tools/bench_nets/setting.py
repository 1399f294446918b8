"""What is measured of one network: its name, the images, how often."""

from typing import NamedTuple

import torch
from torch import Tensor

from mpl_fast.errors import ConfigError
from mpl_fast.models import OWN

SMALL, LARGE = 32, 224  # pixels a side, of the networks for CIFAR and of all others
BATCHES = {("cpu", SMALL): 64, ("cpu", LARGE): 16, ("cuda", SMALL): 512, ("cuda", LARGE): 256}
STEPS = {"cpu": 1, "cuda": 10}


class Setting(NamedTuple):
    """Of one network."""

    model: str
    image_size: int
    batch: int
    steps: int
    """Of one measurement."""
    rounds: int
    seed: int
    device: torch.device

    @property
    def label(self) -> str:
        """How its rows begin."""
        return f"{self.model}, {self.batch} x {self.image_size} px"

    @property
    def classes(self) -> int:
        """Of the data set that the literature trains it on."""
        return 10 if self.model in OWN else 1000

    def images(self) -> tuple[Tensor, Tensor]:
        """Images ``(N, 3, H, W)`` float32 and labels ``(N,)`` int64, on the device."""
        shape = (self.batch, 3, self.image_size, self.image_size)
        labels = torch.arange(self.batch, device=self.device) % self.classes
        return torch.randn(shape, device=self.device), labels


def setting(
    model: str,
    device: torch.device,
    *,
    image_size: int | None,
    batch: int | None,
    steps: int | None,
    rounds: int,
    seed: int,
) -> Setting:
    """With what fits the network and the device, where nothing is asked for.

    Raises `ConfigError` for numbers that cannot be.
    """
    usual = SMALL if model in OWN else LARGE
    size = usual if image_size is None else image_size
    images = BATCHES[device.type, usual] if batch is None else batch
    calls = STEPS[device.type] if steps is None else steps
    least = {"batch": (images, 2), "image-size": (size, 8), "steps": (calls, 1)}
    for name, (given, minimum) in (least | {"rounds": (rounds, 1)}).items():
        if given < minimum:  # a batch norm cannot normalize one image
            raise ConfigError(f"--{name} {given} is too small: give at least {minimum}")
    return Setting(model, size, images, calls, rounds, seed, device)
