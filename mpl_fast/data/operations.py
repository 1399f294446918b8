"""The 15 operations of Meta Pseudo Labels, one DALI graph each."""

from collections.abc import Callable

import numpy as np
from nvidia.dali import fn, math, types
from nvidia.dali.auto_aug import augmentations
from nvidia.dali.data_node import DataNode

from mpl_fast.config import DataConfig

FILL = 128
"""Gray level of what an operation uncovers or cuts out."""

Operation = Callable[[DataNode], DataNode]
"""An image (H, W, 3) uint8 to one of the same shape and type."""


def operations(config: DataConfig, sign: DataNode, center: DataNode) -> dict[str, Operation]:
    """The 15 operations of policy ``mpl`` at ``config.magnitude``, by the official code's names.

    ``sign`` is -1 or 1, for what moves; ``center`` is a pixel (y, x), for what is cut out.
    """
    level, strength = config.magnitude / 10, factor(config)
    shear, shift = 0.3 * level, config.translate * level
    return {
        "AutoContrast": lambda image: augmentations.auto_contrast.op(image, None),
        "Equalize": equalize,
        "Invert": lambda image: augmentations.invert.op(image, None),
        "Rotate": lambda image: _rotate(image, sign * (30 * level)),
        "Posterize": lambda image: posterize(image, config),
        "Solarize": lambda image: solarize(image, config),
        "Color": lambda image: fn.saturation(image, saturation=strength),
        "Contrast": lambda image: augmentations.contrast.op(image, strength),
        "Brightness": lambda image: fn.brightness(image, brightness=strength),
        "Sharpness": lambda image: _sharpness(image, strength, config.image_size),
        "ShearX": lambda image: _shear(image, sign, (shear, 0.0)),
        "ShearY": lambda image: _shear(image, sign, (0.0, shear)),
        "TranslateX": lambda image: _translate(image, sign, (shift, 0.0)),
        "TranslateY": lambda image: _translate(image, sign, (0.0, shift)),
        "Cutout": lambda image: cut(image, center, half(config)),
    }


def factor(config: DataConfig) -> float:
    """Strength of Color, Contrast, Brightness and Sharpness; 1 changes nothing."""
    return 1.8 * (config.magnitude / 10) + 0.1


def half(config: DataConfig) -> int:
    """Half the side, in pixels, of what the operation Cutout cuts out."""
    return int(config.cutout * (config.magnitude / 10))


def cut(image: DataNode, center: DataNode, half: int) -> DataNode:
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


def posterize(image: DataNode, config: DataConfig) -> DataNode:
    """Keeps the upper bits of every value."""
    bits = min(max(int(4 * (config.magnitude / 10)), 0), 8)
    return image & types.Constant(0xFF & ~(0xFF >> bits), dtype=types.UINT8)


def solarize(image: DataNode, config: DataConfig) -> DataNode:
    """Inverts values from the threshold on."""
    threshold = int(256 * (config.magnitude / 10))
    return image if threshold >= 256 else augmentations.solarize.op(image, threshold)


def _sharpness(image: DataNode, factor: float, size: int) -> DataNode:
    """Blends with the image smoothed by Pillow's 3 x 3 kernel; the outermost pixels stay."""
    kernel = augmentations.sharpness_kernel_shifted(factor)
    sharp = fn.filter(image, types.Constant(kernel, device=image.device))
    inside = np.pad(np.ones((size - 2, size - 2, 1), np.uint8), ((1, 1), (1, 1), (0, 0)))
    inner = types.Constant(inside, device=image.device)
    border = types.Constant(1 - inside, device=image.device)
    return fn.cast_like(inner * sharp + border * image, image)


def equalize(image: DataNode) -> DataNode:
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
