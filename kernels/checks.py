"""Refuses arguments that cannot be right, by shape and number: tensor values stay unread."""

import torch
from torch import Tensor

from mpl_fast.kernels.outputs import Scalar

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def logits(x: Tensor, num_classes: int | None) -> int:
    """The number of classes of logits (N, W); columns from `num_classes` on are padding."""
    if x.dim() != 2:
        raise ValueError(f"logits must have 2 dimensions (rows, classes), not {tuple(x.shape)}")
    if x.dtype not in FLOATS:
        raise TypeError(f"logits must be floating point, not {x.dtype}")
    classes = x.shape[1] if num_classes is None else num_classes
    if not 1 <= classes <= x.shape[1]:
        raise ValueError(f"num_classes is {classes}, but the logits have {x.shape[1]} columns")
    return classes


def labels(name: str, x: Tensor, rows: int) -> None:
    """Class indices: one int64 for each row. Values out of range are not looked for here."""
    if x.shape != (rows,):
        raise ValueError(f"{name} must have shape ({rows},), not {tuple(x.shape)}")
    if x.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, not {x.dtype}")


def smoothing(value: float) -> None:
    """Label smoothing is a share of the probability."""
    if not 0.0 <= value < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), not {value}")


def temperature(value: float) -> None:
    """A temperature divides: neither it nor its inverse may vanish in float32."""
    if not 1e-38 <= value <= 1e38:
        raise ValueError(f"temperature must be positive and finite, not {value}")


def scalar(name: str, value: Scalar) -> None:
    """A weight is a number or a 0-dim tensor."""
    if isinstance(value, Tensor) and value.dim() != 0:
        raise ValueError(f"{name} must be a number or a 0-dim tensor, not {tuple(value.shape)}")


def split(rows: int, labeled: int, unlabeled: int) -> None:
    """Rows come as labeled | weak | strong."""
    if unlabeled < 0 or rows != labeled + 2 * unlabeled:
        raise ValueError(
            f"{rows} rows of logits are not {labeled} labeled + 2 x {unlabeled} unlabeled ones"
        )
