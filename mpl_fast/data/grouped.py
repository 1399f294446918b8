"""The 15 operations as few DALI operators: a batch is split by kind, not by operation.

An image needs at most one operation in a layer, and DALI splits and merges batches without copying
pixels, so that on a CPU it pays to split, but only where the operators differ: whatever moves
pixels is one affine warp with a matrix for each image, and what maps all gray levels by a straight
line is one brightness_contrast. A branch for each operation spends more on splitting every input
of every operator than on pixels, and its handful of images divides badly among threads.

Two traps: operators take what differs from image to image as arguments only from the CPU, so that
nothing computed from a GPU's images can be one; and an arithmetic expression on a CPU takes about
4 ns to turn a float into a byte, longer than most operators need for a pixel.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import fn, types
from nvidia.dali.auto_aug import augmentations
from nvidia.dali.data_node import DataNode

from mpl_fast.config import DataConfig
from mpl_fast.data.operations import FILL, cut, equalize, factor, half, posterize, solarize

MOVES = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
TONES = ("Invert", "Brightness", "Contrast")
REST = ("Posterize", "Solarize", "Cutout", "AutoContrast", "Equalize", "Color", "Sharpness")
NAMES = (*MOVES, *TONES, *REST)
"""The operations in the order of their codes: 2 * position, plus 1 where the sign is positive."""


def apply_code(image: DataNode, code: DataNode, center: DataNode, config: DataConfig) -> DataNode:
    """Applies one operation to each image (H, W, 3) uint8: that of its code, an int32 scalar.

    ``center`` is a pixel (y, x), float, for what is cut out.
    """
    if code < _end("Contrast"):
        if code < _end("TranslateY"):
            image = _move(image, code, config)
        else:
            image = _tone(image, code, config)
    elif code < _end("Cutout"):
        if code < _end("Posterize"):
            image = posterize(image, config)
        elif code < _end("Solarize"):
            image = solarize(image, config)
        else:
            image = cut(image, center, half(config))
    elif code < _end("Equalize"):
        if code < _end("AutoContrast"):  # noqa: SIM108 - DALI makes no branch of an expression
            image = _auto_contrast(image)
        else:
            image = equalize(image)
    elif code < _end("Color"):
        image = fn.saturation(image, saturation=factor(config))
    else:
        image = _sharpen(image, config)
    return image


def _end(name: str) -> int:
    """The first code after an operation's."""
    return 2 * NAMES.index(name) + 2


def _look_up(code: DataNode, values: Mapping[str, float], otherwise: float) -> DataNode:
    """Each image's number, by the operation of its code.

    A table in a constant's place would be split among all the branches on the way, as images are.
    """
    first = {name: 2 * NAMES.index(name) for name in values}
    return fn.lookup_table(
        code,
        keys=[first[name] + sign for name in values for sign in (0, 1)],
        values=[value for value in values.values() for _ in (0, 1)],
        default_value=otherwise,
        dtype=types.FLOAT,
    )


def _move(image: DataNode, code: DataNode, config: DataConfig) -> DataNode:
    """Reads every pixel where its affine matrix sends it; the nearest source pixel counts."""
    matrix = types.Constant(_matrices(config), device="cpu")[code]
    return fn.warp_affine(image, matrix=matrix, fill_value=FILL, interp_type=types.INTERP_NN)


def _matrices(config: DataConfig) -> NDArray[np.float32]:
    """(10, 2, 3), by code: where a pixel's (x, y, 1) reads, in pixels; centers lie at 0.5."""
    level, middle = config.magnitude / 10, config.image_size / 2
    rows = []
    for sign in (-1, 1):
        sine, cosine = sign * np.sin(np.radians(30 * level)), np.cos(np.radians(30 * level))
        shear, shift = sign * 0.3 * level, sign * config.translate * level
        rows.append(
            {
                "Rotate": [
                    (cosine, -sine, middle * (1 - cosine + sine)),
                    (sine, cosine, middle * (1 - cosine - sine)),
                ],
                "ShearX": [(1, shear, 0), (0, 1, 0)],
                "ShearY": [(1, 0, 0), (shear, 1, 0)],
                "TranslateX": [(1, 0, shift), (0, 1, 0)],
                "TranslateY": [(1, 0, 0), (0, 1, shift)],
            }
        )
    return np.array([signed[name] for name in MOVES for signed in rows], np.float32)


def _tone(image: DataNode, code: DataNode, config: DataConfig) -> DataNode:
    """Maps gray levels by a straight line.

    On a CPU, DALI needs a fifth of the time for this operator that it needs for a product, whose
    floats it turns into bytes one by one.
    """
    strength = factor(config)
    brightness = _look_up(code, {"Invert": -1.0, "Brightness": strength}, 1.0)
    shift = _look_up(code, {"Invert": 1.0}, 0.0)
    if image.device == "cpu":
        gray = fn.color_space_conversion(image, image_type=types.RGB, output_type=types.GRAY)
        image = fn.brightness_contrast(
            image,
            brightness=brightness,
            brightness_shift=shift,
            contrast=_look_up(code, {"Contrast": strength}, 1.0),
            contrast_center=fn.reductions.mean(gray),
        )
    # What was computed on a GPU cannot be an argument, which the mean gray level has to be.
    elif code < _end("Brightness"):
        image = fn.brightness_contrast(image, brightness=brightness, brightness_shift=shift)
    else:
        image = augmentations.contrast.op(image, strength)
    return image


def _auto_contrast(image: DataNode) -> DataNode:
    """Stretches each channel to 0 to 255, a flat one not."""
    if image.device == "gpu":
        return augmentations.auto_contrast.op(image, None)
    low = fn.cast(fn.reductions.min(image, axis_names="HW"), dtype=types.FLOAT)
    spread = fn.reductions.max(image, axis_names="HW") - low
    return _per_channel(image, low * (spread > 0.0), spread / 255.0 + (spread == 0.0))


def _sharpen(image: DataNode, config: DataConfig) -> DataNode:
    """Blends with the image smoothed by Pillow's 3 x 3 kernel; the outermost pixels stay."""
    kernel = augmentations.sharpness_kernel_shifted(factor(config))
    sharp = fn.filter(image, types.Constant(kernel, device=image.device))
    # Erasing is a copy; to multiply with a mask takes longer than the filter.
    last, side = config.image_size - 1, config.image_size
    inner = fn.erase(
        sharp,
        anchor=[0, 0, last, 0, 0, 0, 0, last],
        shape=[1, side, 1, side, side, 1, side, 1],
        axis_names="HW",
    )
    border = fn.erase(image, anchor=[1, 1], shape=[side - 2, side - 2], axis_names="HW")
    return inner | border


def _per_channel(image: DataNode, black: DataNode, step: DataNode) -> DataNode:
    """(image - black) / step, rounded, with a black and a step for each channel (3,) float."""
    return fn.crop_mirror_normalize(
        image, mean=black, std=step, output_layout="HWC", dtype=types.UINT8
    )
