"""The operations of policy ``mpl``: one table, and a DALI graph for each entry.

To add an operation, add an entry to `OPERATIONS`. The branches of both policies, the affine
matrices and the `signature` in checkpoints follow from the table.
"""

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from nvidia.dali import fn, math, types
from nvidia.dali.auto_aug import augmentations
from nvidia.dali.data_node import DataNode

from mpl_fast.config import DataConfig

FILL = 128
"""Gray level of uncovered and cut out pixels."""


class Draws(NamedTuple):
    """Random values of an image."""

    sign: Callable[[], DataNode]
    """Returns -1 or 1, for operations with a direction. A function, since DALI splits a value among
    the branches of an `if` where it is read: only branches that call it are given the value."""
    center: DataNode
    """A pixel (y, x), float (2,), for the cutout."""


Apply = Callable[[DataNode, Draws, DataConfig], DataNode]
"""Images (H, W, 3) uint8 to images of the same shape and type."""
Matrix = list[tuple[float, float, float]]
"""(2, 3): the (x, y, 1) of an output pixel to where it reads, in pixels; centers are at 0.5."""


class Operation(NamedTuple):
    """One operation, at magnitude / 10 of its nominal strength.

    `apply` is enough. An operation that is an affine transform or a linear map of gray levels is
    faster with one of `matrix`, `line` and `contrast`: policy ``mpl`` then computes it together
    with others of its kind.
    """

    name: str
    number: int
    """Position in the official code's list, or the next free number: the order of the branches of
    policy ``mpl_branched``."""
    apply: Apply
    """The operation by itself: the reference."""
    matrix: Callable[[DataConfig, int], Matrix] | None = None
    """Affine matrix, from the config and the sign."""
    line: Callable[[DataConfig], tuple[float, float]] | None = None
    """(a, b) of the map from gray level x to ``a x + 255 b``."""
    contrast: Callable[[DataConfig], float] | None = None
    """a of the map from gray level x to ``mean + a (x - mean)``, with the image's mean."""
    fast: Apply | None = None
    """A faster equivalent of `apply`."""


def level(config: DataConfig) -> float:
    """Strength relative to the nominal one."""
    return config.magnitude / 10


def factor(config: DataConfig) -> float:
    """Blending factor of Color, Contrast, Brightness and Sharpness; 1 is the identity."""
    return 1.8 * level(config) + 0.1


def shift(config: DataConfig) -> float:
    """Pixels of a translation."""
    return config.translate * level(config)


def cut(image: DataNode, center: DataNode, half: int) -> DataNode:
    """Grays out the square of ``2 * half`` pixels around the center, clipped to the image."""
    return fn.erase(
        image, anchor=center - half, shape=(2 * half, 2 * half), axis_names="HW", fill_value=FILL
    )


def _cutout(image: DataNode, draws: Draws, config: DataConfig) -> DataNode:
    return cut(image, draws.center, int(config.cutout * level(config)))


def _invert(image: DataNode, _draws: Draws, _config: DataConfig) -> DataNode:
    return augmentations.invert.op(image, None)


def _brightness(image: DataNode, _draws: Draws, config: DataConfig) -> DataNode:
    return fn.brightness(image, brightness=factor(config))


def _contrast(image: DataNode, _draws: Draws, config: DataConfig) -> DataNode:
    return augmentations.contrast.op(image, factor(config))


def _color(image: DataNode, _draws: Draws, config: DataConfig) -> DataNode:
    return fn.saturation(image, saturation=factor(config))


def _rotate(image: DataNode, draws: Draws, config: DataConfig) -> DataNode:
    return fn.rotate(
        image,
        angle=draws.sign() * (30 * level(config)),
        keep_size=True,
        fill_value=FILL,
        interp_type=types.INTERP_NN,
    )


def _rotation(config: DataConfig, sign: int) -> Matrix:
    angle, middle = np.radians(30 * level(config)), config.image_size / 2
    sine, cosine = sign * np.sin(angle), np.cos(angle)
    return [
        (cosine, -sine, middle * (1 - cosine + sine)),
        (sine, cosine, middle * (1 - cosine - sine)),
    ]


def _shear(axis: int) -> Apply:
    def apply(image: DataNode, draws: Draws, config: DataConfig) -> DataNode:
        shear = [0.0, 0.0]
        shear[axis] = 0.3 * level(config)
        angle = draws.sign() * types.Constant(shear, dtype=types.FLOAT)
        return warp(image, fn.transforms.shear(shear=angle))

    return apply


def _translate(axis: int) -> Apply:
    def apply(image: DataNode, draws: Draws, config: DataConfig) -> DataNode:
        pixels = [0.0, 0.0]
        pixels[axis] = shift(config)
        offset = draws.sign() * types.Constant(pixels, dtype=types.FLOAT)
        return warp(image, fn.transforms.translation(offset=offset))

    return apply


def warp(image: DataNode, matrix: DataNode) -> DataNode:
    """Reads every pixel where the affine matrix maps it; nearest neighbor."""
    return fn.warp_affine(image, matrix=matrix, fill_value=FILL, interp_type=types.INTERP_NN)


def _posterize(image: DataNode, _draws: Draws, config: DataConfig) -> DataNode:
    bits = min(max(int(4 * level(config)), 0), 8)  # upper bits to keep
    return image & types.Constant(0xFF & ~(0xFF >> bits), dtype=types.UINT8)


def _solarize(image: DataNode, _draws: Draws, config: DataConfig) -> DataNode:
    """Inverts values from the threshold on."""
    threshold = int(256 * level(config))
    return image if threshold >= 256 else augmentations.solarize.op(image, threshold)


def _sharpness(image: DataNode, _draws: Draws, config: DataConfig) -> DataNode:
    """Blends with the image smoothed by Pillow's 3 x 3 kernel; the outermost pixels stay."""
    kernel, size = augmentations.sharpness_kernel_shifted(factor(config)), config.image_size
    sharp = fn.filter(image, types.Constant(kernel, device=image.device))
    inside = np.pad(np.ones((size - 2, size - 2, 1), np.uint8), ((1, 1), (1, 1), (0, 0)))
    inner = types.Constant(inside, device=image.device)
    border = types.Constant(1 - inside, device=image.device)
    return fn.cast_like(inner * sharp + border * image, image)


def _fast_sharpness(image: DataNode, _draws: Draws, config: DataConfig) -> DataNode:
    """Sharpness with two erasures, which are copies, in place of products with a mask, which
    take longer than the filter."""
    kernel = augmentations.sharpness_kernel_shifted(factor(config))
    sharp = fn.filter(image, types.Constant(kernel, device=image.device))
    last, side = config.image_size - 1, config.image_size
    inner = fn.erase(
        sharp,
        anchor=[0, 0, last, 0, 0, 0, 0, last],
        shape=[1, side, 1, side, side, 1, side, 1],
        axis_names="HW",
    )
    border = fn.erase(image, anchor=[1, 1], shape=[side - 2, side - 2], axis_names="HW")
    return inner | border


def _auto_contrast(image: DataNode, _draws: Draws, _config: DataConfig) -> DataNode:
    return augmentations.auto_contrast.op(image, None)


def _fast_auto_contrast(image: DataNode, draws: Draws, config: DataConfig) -> DataNode:
    """Stretches each channel to 0 to 255, except constant ones; on the CPU by one operator."""
    if image.device == "gpu":
        return _auto_contrast(image, draws, config)
    low = fn.cast(fn.reductions.min(image, axis_names="HW"), dtype=types.FLOAT)
    spread = fn.reductions.max(image, axis_names="HW") - low
    return fn.crop_mirror_normalize(
        image,
        mean=low * (spread > 0.0),
        std=spread / 255.0 + (spread == 0.0),
        output_layout="HWC",
        dtype=types.UINT8,
    )


def _equalize(image: DataNode, _draws: Draws, _config: DataConfig) -> DataNode:
    """Pillow's histogram equalization of each channel, made from OpenCV's, which DALI has.

    Pillow maps a value to round(darker / step): darker counts the pixels below the value, step is
    the whole part of 1/255 of the pixels below the maximum. OpenCV's formula applied to the
    negative gives 255 * darker / (pixels below the maximum); what remains is a factor for the
    fraction that step lost, which on 32 x 32 images is up to a third.
    """
    white = types.Constant(255, dtype=types.UINT8)
    spread = white - fn.equalize(white - image)
    top = fn.reductions.max(image, axis_names="HW", keep_dims=True)
    below = fn.reductions.sum(
        fn.cast(image < top, dtype=types.FLOAT), axis_names="HW", keep_dims=True
    )
    step = math.floor(below / 255.0)
    usable = step > 0.0
    scaled = fn.cast_like(spread * (below / (255.0 * math.max(step, 1.0))), image)
    return usable * scaled + (usable ^ True) * image


OPERATIONS = (
    Operation("Rotate", 3, _rotate, matrix=_rotation),
    Operation("ShearX", 10, _shear(0), matrix=lambda c, s: [(1, s * 0.3 * level(c), 0), (0, 1, 0)]),
    Operation("ShearY", 11, _shear(1), matrix=lambda c, s: [(1, 0, 0), (s * 0.3 * level(c), 1, 0)]),
    Operation(
        "TranslateX", 12, _translate(0), matrix=lambda c, s: [(1, 0, s * shift(c)), (0, 1, 0)]
    ),
    Operation(
        "TranslateY", 13, _translate(1), matrix=lambda c, s: [(1, 0, 0), (0, 1, s * shift(c))]
    ),
    Operation("Invert", 2, _invert, line=lambda config: (-1.0, 1.0)),
    Operation("Brightness", 8, _brightness, line=lambda config: (factor(config), 0.0)),
    Operation("Contrast", 7, _contrast, contrast=factor),
    Operation("Posterize", 4, _posterize),
    Operation("Solarize", 5, _solarize),
    Operation("Cutout", 14, _cutout),
    Operation("AutoContrast", 0, _auto_contrast, fast=_fast_auto_contrast),
    Operation("Equalize", 1, _equalize),
    Operation("Color", 6, _color),
    Operation("Sharpness", 9, _sharpness, fast=_fast_sharpness),
)


def signature(operations: tuple[Operation, ...]) -> str:
    """Hash of names and numbers: a data position saved with another table does not fit."""
    entries = "/".join(f"{operation.name} {operation.number}" for operation in operations)
    return hashlib.sha256(entries.encode()).hexdigest()[:16]
