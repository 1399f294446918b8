"""Policy ``mpl`` as few DALI operators: a batch is split by kind of operation.

An image passes at most one operation in a layer. DALI splits and merges batches without copying
pixels, so on a CPU a split pays where operators differ: all affine transforms are one warp with a
matrix for each image, all linear maps of gray levels one brightness_contrast. A branch for each
operation costs more for splitting every input of every operator than for pixels, and its few images
are divided badly among threads.

Two properties of DALI: arguments that differ by image must come from the CPU, so nothing computed
from a GPU's images can be one; an arithmetic expression on a CPU takes about 4 ns to convert a
float to a byte, longer than most operators take for a pixel.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from nvidia.dali import fn, types
from nvidia.dali.data_node import DataNode

from mpl_fast.config import DataConfig
from mpl_fast.data.operations import OPERATIONS, Draws, Operation, warp

BY_CODE = sorted(OPERATIONS, key=lambda o: (o.matrix is None, o.line is None, o.contrast is None))
"""An operation's codes are 2 * its position for sign -1, and the next one for sign 1."""
CODES = 2 * len(BY_CODE)
MATRICES = [o.matrix for o in BY_CODE if o.matrix]
LINES = [o.line for o in BY_CODE if o.line]
CONTRASTS = [o.contrast for o in BY_CODE if o.contrast]
# The first codes of lines, of contrasts, and of the operations without any of the three.
LINE, CONTRAST = 2 * len(MATRICES), 2 * len(MATRICES + LINES)
OTHER = CONTRAST + 2 * len(CONTRASTS)


class Inputs(NamedTuple):
    """DALI splits a value among branches where a variable that holds it is read: values in a tuple
    only in the branches that use them."""

    image: DataNode
    code: DataNode
    center: DataNode


Subgraph = Callable[[DataNode, Inputs, DataConfig], DataNode]


class Branch(NamedTuple):
    """What is computed for the codes from `first` to `end` - 1."""

    first: int
    end: int
    apply: Subgraph


def apply_code(image: DataNode, code: DataNode, center: DataNode, config: DataConfig) -> DataNode:
    """Applies one operation to each image (H, W, 3) uint8, by its code, an int32 scalar.

    ``center`` is a pixel (y, x), float (2,), for the cutout.
    """
    shared = [Branch(0, LINE, _warp), Branch(LINE, OTHER, _line_or_contrast)]
    return _choose([*shared, *_alone(OTHER, CODES)], Inputs(image, code, center), config)


def _choose(branches: Sequence[Branch], inputs: Inputs, config: DataConfig) -> DataNode:
    """A binary tree: DALI makes splits and merges of the `if` on the codes."""
    if len(branches) == 1:
        image = inputs.image
        return branches[0].apply(image, inputs, config)
    middle = _middle(branches)
    if inputs.code < branches[middle].first:
        image = _choose(branches[:middle], inputs, config)
    else:
        image = _choose(branches[middle:], inputs, config)
    return image


def _middle(branches: Sequence[Branch]) -> int:
    """The position that divides the codes most evenly."""
    total = branches[0].first + branches[-1].end
    return min(range(1, len(branches)), key=lambda at: abs(total - 2 * branches[at].first))


def _alone(first: int, end: int) -> list[Branch]:
    """A branch for each operation."""
    return [Branch(code, code + 2, _by_itself(BY_CODE[code // 2])) for code in range(first, end, 2)]


def _by_itself(operation: Operation) -> Subgraph:
    apply = operation.fast or operation.apply

    def subgraph(image: DataNode, inputs: Inputs, config: DataConfig) -> DataNode:
        return apply(image, Draws(lambda: (inputs.code & 1) * 2 - 1, inputs.center), config)

    return subgraph


def _warp(image: DataNode, inputs: Inputs, config: DataConfig) -> DataNode:
    code = inputs.code
    return warp(image, _matrix(code, config))


def _matrix(code: DataNode, config: DataConfig) -> DataNode:
    matrices = [matrix(config, sign) for matrix in MATRICES for sign in (-1, 1)]
    return types.Constant(np.array(matrices, np.float32), device="cpu")[code]


def _line_or_contrast(image: DataNode, inputs: Inputs, config: DataConfig) -> DataNode:
    """On a CPU, DALI needs a fifth of the time for this operator that it needs for a product, whose
    floats it converts to bytes one by one."""
    code = inputs.code
    lines = [line(config) for line in LINES]
    slope = _look_up(code, LINE, [a for a, _ in lines], 1.0)
    shift = _look_up(code, LINE, [b for _, b in lines], 0.0)
    if image.device == "cpu":
        gray = fn.color_space_conversion(image, image_type=types.RGB, output_type=types.GRAY)
        image = fn.brightness_contrast(
            image,
            brightness=slope,
            brightness_shift=shift,
            contrast=_look_up(code, CONTRAST, [contrast(config) for contrast in CONTRASTS], 1.0),
            contrast_center=fn.reductions.mean(gray),
        )
    # What was computed on a GPU cannot be an argument, which the mean gray level has to be.
    elif code < CONTRAST:
        image = fn.brightness_contrast(image, brightness=slope, brightness_shift=shift)
    else:
        image = _choose(_alone(CONTRAST, OTHER), inputs._replace(image=image), config)
    return image


def _look_up(code: DataNode, first: int, values: Sequence[float], otherwise: float) -> DataNode:
    """Each image's parameter, by its code: `values` are those of the operations from `first` on.

    A constant indexed by the code would be split among all branches on the way, as images are.
    """
    return fn.lookup_table(
        code,
        keys=list(range(first, first + 2 * len(values))),
        values=[value for value in values for _ in (-1, 1)],
        default_value=otherwise,
        dtype=types.FLOAT,
    )
