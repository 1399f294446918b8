"""RandAugment as DALI graphs: DALI's own policy, and the operations of Meta Pseudo Labels.

Policy ``mpl`` follows google-research/meta_pseudo_labels/augment.py (class RandAugment): every
layer draws one operation uniformly and applies it with a probability that each image draws once
from U(0.2, 0.8). Level M means M/10 of an operation's nominal strength and may exceed 10.
``mpl_branched`` is the same policy with a branch for every operation, as a reference.

Differences from that code:

- Solarize: the threshold int(25.6 M) is at most 256. The code casts it to uint8, where it wraps: at
  M = 16 it inverts what is above 153, at M = 10 everything. Here M >= 10 inverts nothing.
- Posterize: the kept bits are clamped to 0 to 8; the code shifts by a wrapped number past 8.
- Color, Contrast, Brightness, Sharpness saturate at 0 and 255; the code clips on the wrong scale
  and lets values above 255 wrap. Results are rounded where Pillow truncates.
- Contrast turns about the mean gray level, as in Pillow; the code divides the pixel count by 256.
- Sharpness does not round the smoothed image before it blends.
- Equalize rounds once more than Pillow and the code, a difference of a gray level or two.
- Shear and rotation map pixel centers as Pillow does; TensorFlow maps pixel indices.
- The flip comes after the policy, within the normalization. That is the same distribution: signs
  are symmetric, and a cut square covers [c - half, c + half), symmetric to within a pixel.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from nvidia.dali import fn, types
from nvidia.dali.auto_aug import rand_augment
from nvidia.dali.auto_aug.core import select
from nvidia.dali.data_node import DataNode

from mpl_fast.config import DataConfig
from mpl_fast.data.grouped import CODES, apply_code
from mpl_fast.data.operations import FILL, OPERATIONS, Draws, Operation, cut, level

Layer = Callable[[DataNode, DataNode, DataNode, DataConfig], DataNode]
"""From images, whether to apply an operation, centers and the config."""


def strengthen(image: DataNode, config: DataConfig) -> DataNode:
    """The policy, then the final cutout if any; images are (image_size, image_size, 3) uint8."""
    image = POLICIES[config.policy](image, config)
    if config.final_cutout > 0:
        image = cut(image, _random_center(config.image_size), config.final_cutout)
    return image


def gray_views(config: DataConfig) -> str:
    """A warning if one operation can leave nothing of an image, or an empty text."""
    if not config.num_ops:
        return ""
    dali = config.policy == "dali"  # has no cutout, and no level above 10
    strength = min(level(config), 1) if dali else level(config)
    offset = abs(config.translate) * strength
    side = 0 if dali else 2 * int(config.cutout * strength)
    found = []
    if offset >= config.image_size:
        found.append(f"a translation is by {offset:g} pixels (data.translate {config.translate:g})")
    if side >= config.image_size:
        found.append(f"a cutout is {side} pixels wide (data.cutout {config.cutout})")
    if not found:
        return ""
    return (
        f"strong views can be all gray: at data.magnitude {config.magnitude:g} "
        f"{' and '.join(found)}, and data.image_size is {config.image_size}; lower values are "
        "usual (CIFAR, of 32 pixels: 4 for both)"
    )


def _layers(image: DataNode, config: DataConfig, layer: Layer) -> DataNode:
    """``config.num_ops`` operations in a row, each applied with the image's own probability."""
    probability = fn.random.uniform(range=(0.2, 0.8))
    for _ in range(config.num_ops):
        # Everything random is drawn before the batch is split among the operations.
        applied = fn.random.coin_flip(probability=probability, dtype=types.BOOL)
        image = layer(image, applied, _random_center(config.image_size), config)
    return image


def _grouped_layer(
    image: DataNode, applied: DataNode, center: DataNode, config: DataConfig
) -> DataNode:
    code = fn.random.uniform(values=list(range(CODES)), dtype=types.INT32)
    if applied:
        image = apply_code(image, code, center, config)
    return image


def _branched_layer(
    image: DataNode, applied: DataNode, center: DataNode, config: DataConfig
) -> DataNode:
    sign = fn.random.uniform(values=[-1.0, 1.0])
    draws = Draws(lambda: sign, center)
    by_number = sorted(OPERATIONS, key=lambda operation: operation.number)
    branches = [_bound(operation, draws, config) for operation in by_number]
    chosen = fn.random.uniform(values=list(range(len(branches))), dtype=types.INT32)
    if applied:
        image = select(branches, chosen, image)
    return image


def _bound(
    operation: Operation, draws: Draws, config: DataConfig
) -> Callable[[DataNode], DataNode]:
    return lambda image: operation.apply(image, draws, config)


def _dali(image: DataNode, config: DataConfig) -> DataNode:
    """DALI's rand_augment: 14 operations, levels 0 to 10 in 31 bins, growing in strength."""
    with _deprecations_hidden():
        return rand_augment.rand_augment(
            image,
            n=config.num_ops,
            m=round(3 * min(config.magnitude, 10)),
            fill_value=FILL,
            max_translate_abs=round(config.translate),
        )


@contextmanager
def _deprecations_hidden() -> Iterator[None]:
    """Drops DeprecationWarnings: DALI's rand_augment calls deprecated aliases of DALI.

    DALI resets the warning filters before it warns, so a filter is not enough.
    """
    with warnings.catch_warnings(record=True) as caught:
        yield
    for warning in caught:
        if not issubclass(warning.category, DeprecationWarning):
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )


def _random_center(size: int) -> DataNode:
    """(y, x) of a pixel drawn uniformly from the image."""
    return fn.random.uniform(values=[float(pixel) for pixel in range(size)], shape=(2,))


POLICIES: dict[str, Callable[[DataNode, DataConfig], DataNode]] = {
    "mpl": partial(_layers, layer=_grouped_layer),
    "mpl_branched": partial(_layers, layer=_branched_layer),
    "dali": _dali,
}
"""Of every value of `DataConfig.policy`."""
