"""RandAugment as DALI graphs: DALI's own policy, and the 15 operations of Meta Pseudo Labels.

Policy ``mpl`` follows google-research/meta_pseudo_labels/augment.py (class RandAugment): every
layer draws one of 15 operations uniformly and applies it with a probability that each image draws
once from U(0.2, 0.8). Level M means M/10 of an operation's nominal strength and may exceed 10.

Where it deviates from that code:

- Solarize: the threshold int(25.6 M) is at most 256. The code casts it to uint8, where it wraps: at
  M = 16 it inverts what is above 153, at M = 10 everything. Here M >= 10 inverts nothing.
- Posterize: the kept bits are held within 0 to 8; the code shifts by a wrapped number past 8.
- Color, Contrast, Brightness, Sharpness saturate at 0 and 255; the code clips on the wrong scale
  and lets values above 255 wrap. Results are rounded where Pillow truncates.
- Contrast turns about the mean gray level, as in Pillow; the code divides the pixel count by 256.
- Sharpness does not round the smoothed image before it blends.
- Equalize rounds once more than Pillow and the code, to a gray level or two.
- Shear and rotation map pixel centers as Pillow does; TensorFlow maps pixel indices.
- The flip comes after the policy, within the normalization. That is the same distribution: signs
  are symmetric, and a cut square covers [c - half, c + half), symmetric to within a pixel.
"""

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from nvidia.dali import fn, math, types
from nvidia.dali.auto_aug import augmentations, rand_augment
from nvidia.dali.auto_aug.core import select
from nvidia.dali.data_node import DataNode

from mpl_fast.config import DataConfig

FILL = 128
"""Gray level of what an operation uncovers or cuts out."""

Operation = Callable[[DataNode], DataNode]
"""An image (H, W, 3) uint8 to one of the same shape and type."""


def strengthen(image: DataNode, config: DataConfig) -> DataNode:
    """The policy, then the final cutout if any; images are (image_size, image_size, 3) uint8."""
    image = _dali_policy(image, config) if config.policy == "dali" else _mpl_policy(image, config)
    if config.final_cutout > 0:
        image = _cut(image, _random_center(config.image_size), config.final_cutout)
    return image


def operations(config: DataConfig, sign: DataNode, center: DataNode) -> dict[str, Operation]:
    """The 15 operations of policy ``mpl`` at ``config.magnitude``, by the official code's names.

    ``sign`` is -1 or 1, for what moves; ``center`` is a pixel (y, x), for what is cut out.
    """
    level = config.magnitude / 10
    factor = 1.8 * level + 0.1
    shear, shift, half = 0.3 * level, config.translate * level, int(config.cutout * level)
    return {
        "AutoContrast": lambda image: augmentations.auto_contrast.op(image, None),
        "Equalize": lambda image: _equalize(image),
        "Invert": lambda image: augmentations.invert.op(image, None),
        "Rotate": lambda image: _rotate(image, sign * (30 * level)),
        "Posterize": lambda image: _posterize(image, int(4 * level)),
        "Solarize": lambda image: _solarize(image, int(256 * level)),
        "Color": lambda image: fn.saturation(image, saturation=factor),
        "Contrast": lambda image: augmentations.contrast.op(image, factor),
        "Brightness": lambda image: fn.brightness(image, brightness=factor),
        "Sharpness": lambda image: _sharpness(image, factor, config.image_size),
        "ShearX": lambda image: _shear(image, sign, (shear, 0.0)),
        "ShearY": lambda image: _shear(image, sign, (0.0, shear)),
        "TranslateX": lambda image: _translate(image, sign, (shift, 0.0)),
        "TranslateY": lambda image: _translate(image, sign, (0.0, shift)),
        "Cutout": lambda image: _cut(image, center, half),
    }


@contextmanager
def own_deprecations_hidden() -> Iterator[None]:
    """Drops the warnings that DALI's rand_augment causes by calling DALI's own deprecated aliases.

    DALI resets the warning filters before each of them, so that they have to be caught.
    """
    with warnings.catch_warnings(record=True) as caught:
        yield
    for warning in caught:
        if not re.search(r"experimental\.(filter|equalize)", str(warning.message)):
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )


def _mpl_policy(image: DataNode, config: DataConfig) -> DataNode:
    """``config.layers`` operations in a row, each applied with the image's own probability."""
    probability = fn.random.uniform(range=(0.2, 0.8))
    applied = fn.random.coin_flip(probability=probability, shape=(config.layers,), dtype=types.BOOL)
    signs = fn.random.uniform(values=[-1.0, 1.0], shape=(config.layers,))
    for layer in range(config.layers):
        # Everything random is drawn before the batch is split among the operations.
        table = list(operations(config, signs[layer], _random_center(config.image_size)).values())
        chosen = fn.random.uniform(values=list(range(len(table))), dtype=types.INT32)
        if applied[layer]:
            image = select(table, chosen, image)
    return image


def _dali_policy(image: DataNode, config: DataConfig) -> DataNode:
    """DALI's rand_augment: 14 operations, levels 0 to 10 in 31 bins, growing in strength."""
    return rand_augment.rand_augment(
        image,
        n=config.layers,
        m=round(3 * min(config.magnitude, 10)),
        fill_value=FILL,
        max_translate_abs=round(config.translate),
    )


def _random_center(size: int) -> DataNode:
    """(y, x) of a pixel drawn uniformly from the image."""
    return fn.random.uniform(values=[float(pixel) for pixel in range(size)], shape=(2,))


def _cut(image: DataNode, center: DataNode, half: int) -> DataNode:
    """Grays out the square of ``2 * half`` pixels around the center, as far as it lies inside."""
    return fn.erase(
        image, anchor=center - half, shape=(2 * half, 2 * half), axis_names="HW", fill_value=FILL
    )


def _rotate(image: DataNode, degrees: DataNode) -> DataNode:
    return fn.rotate(
        image, angle=degrees, keep_size=True, fill_value=FILL, interp_type=types.INTERP_NN
    )


def _shear(image: DataNode, sign: DataNode, shear: tuple[float, float]) -> DataNode:
    return _warp(image, fn.transforms.shear(shear=sign * types.Constant(shear, dtype=types.FLOAT)))


def _translate(image: DataNode, sign: DataNode, pixels: tuple[float, float]) -> DataNode:
    offset = sign * types.Constant(pixels, dtype=types.FLOAT)
    return _warp(image, fn.transforms.translation(offset=offset))


def _warp(image: DataNode, matrix: DataNode) -> DataNode:
    """Reads every pixel where the affine matrix sends it; the nearest source pixel counts."""
    return fn.warp_affine(image, matrix=matrix, fill_value=FILL, interp_type=types.INTERP_NN)


def _posterize(image: DataNode, bits: int) -> DataNode:
    """Keeps the upper bits of every value."""
    mask = 0xFF & ~(0xFF >> min(max(bits, 0), 8))
    return image & types.Constant(mask, dtype=types.UINT8)


def _solarize(image: DataNode, threshold: int) -> DataNode:
    """Inverts values from the threshold on."""
    return image if threshold >= 256 else augmentations.solarize.op(image, threshold)


def _sharpness(image: DataNode, factor: float, size: int) -> DataNode:
    """Blends with the image smoothed by Pillow's 3 x 3 kernel; the outermost pixels stay."""
    kernel = augmentations.sharpness_kernel_shifted(factor)
    sharp = fn.filter(image, types.Constant(kernel, device=image.device))
    inside = np.pad(np.ones((size - 2, size - 2, 1), np.uint8), ((1, 1), (1, 1), (0, 0)))
    inner = types.Constant(inside, device=image.device)
    border = types.Constant(1 - inside, device=image.device)
    return fn.cast_like(inner * sharp + border * image, image)


def _equalize(image: DataNode) -> DataNode:
    """Pillow's histogram equalization of each channel, made from OpenCV's, which DALI has.

    Pillow maps a value to round(darker / step): darker counts the pixels below the value, step is
    the whole part of 1/255 of the pixels below the maximum. OpenCV's formula applied to the
    negative gives 255 * darker / (pixels below the maximum); the rest is to scale by the fraction
    that step lost, which on 32 x 32 images is up to a third.
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
