"""Refuses arguments that cannot be right, by shape, type and number: tensor values stay unread."""

import torch
from torch import Tensor

from mpl_fast.kernels.outputs import Pseudo, Scalar

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


def labels(name: str, x: Tensor, rows: int, like: Tensor) -> None:
    """Class indices: one int64 for each row. Values out of range are not looked for here."""
    _shape(name, x, (rows,), like)
    if x.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, not {x.dtype}")


def floats(name: str, x: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """Floating numbers of a shape, such as a weight for each row."""
    _shape(name, x, shape, like)
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be floating point, not {x.dtype}")


def labels_or_logits(name: str, x: Tensor, rows: int, like: Tensor) -> None:
    """A class for each row, or a row of logits as wide as ours."""
    if x.dim() == 2:
        floats(name, x, (rows, like.shape[1]), like)
    else:
        labels(name, x, rows, like)


def smoothing(value: float) -> None:
    """Label smoothing is a share of the probability."""
    _number("label_smoothing", value)
    if not 0.0 <= value < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), not {value}")


def temperature(value: float) -> None:
    """A temperature divides: neither it nor its inverse may vanish in float32."""
    _number("temperature", value)
    if not 1e-38 <= value <= 1e38:
        raise ValueError(f"temperature must be positive and finite, not {value}")


def threshold(value: float) -> None:
    """A confidence; above 1 it masks every row. NaN would do so silently."""
    _number("threshold", value)
    if not value >= 0.0:
        raise ValueError(f"threshold must be a number >= 0, not {value}")


def momentum(value: float) -> None:
    """A running mean lies between what it was and what is new."""
    _number("momentum", value)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"momentum must be in [0, 1], not {value}")


def scalar(name: str, value: Scalar, like: Tensor) -> None:
    """A weight is a number or a 0-dim tensor where the logits are: moving it would synchronize."""
    if not isinstance(value, Tensor):
        return
    if value.dim() != 0:
        raise ValueError(f"{name} must be a number or a 0-dim tensor, not {tuple(value.shape)}")
    _place(name, value, "the logits are", like)


def grad_scale(value: Tensor | None, like: Tensor) -> None:
    """A loss scale is a tensor: a number would be frozen into a captured graph."""
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"grad_scale must be None or a 0-dim tensor, not {value!r}")
    floats("grad_scale", value, (), like)


def feedback(old: Tensor, new: Tensor, average: Tensor | None, factor: float) -> None:
    """Two losses and their running mean; a number would be frozen into a captured graph."""
    given = {"old": old, "new": new}
    if average is not None:
        given["average"] = average
    for name, x in given.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a 0-dim tensor, not {x!r}")
        if x.dim() != 0:
            raise ValueError(f"{name} must be a 0-dim tensor, not {tuple(x.shape)}")
        if x.dtype not in FLOATS:
            raise TypeError(f"{name} must be floating point, not {x.dtype}")
        _place(name, x, "old is", old)
    if average is not None and average.dtype != torch.float32:
        raise TypeError(f"average must be float32, as the feedback is, not {average.dtype}")
    momentum(factor)


def student(
    x: Tensor,
    pseudo: Tensor,
    target: Tensor | None,
    label_smoothing: float,
    sharpening: float,
    weight: Tensor | None,
    num_classes: int | None,
) -> int:
    """All that a student's loss is given, in its order; returns the number of classes."""
    classes = logits(x, num_classes)
    n_labeled = 0
    if target is not None:
        n_labeled = target.shape[0] if target.dim() else 0
        labels("target", target, n_labeled, x)
        if n_labeled > x.shape[0]:
            raise ValueError(f"{x.shape[0]} rows of logits are less than {n_labeled} labeled ones")
    labels_or_logits("pseudo", pseudo, x.shape[0] - n_labeled, x)
    smoothing(label_smoothing)
    temperature(sharpening)
    if weight is not None:
        floats("weight", weight, (pseudo.shape[0],), x)
    return classes


def teacher(
    x: Tensor,
    target: Tensor,
    n_unlabeled: int,
    uda_weight: Scalar,
    h: Scalar,
    sharpening: float,
    least_confidence: float,
    label_smoothing: float,
    pseudo: Pseudo,
    truth: Tensor | None,
    num_classes: int | None,
) -> int:
    """All that a teacher's loss is given, in its order; returns the number of classes."""
    classes = logits(x, num_classes)
    n_labeled = target.shape[0] if target.dim() else 0  # of a 0-dim target `labels` complains
    if n_unlabeled < 0 or x.shape[0] != n_labeled + 2 * n_unlabeled:
        raise ValueError(
            f"{x.shape[0]} rows of logits are not {n_labeled} labeled + 2 x {n_unlabeled}"
            " unlabeled ones"
        )
    labels("target", target, n_labeled, x)
    temperature(sharpening)
    threshold(least_confidence)
    smoothing(label_smoothing)
    scalar("uda_weight", uda_weight, x)
    scalar("feedback", h, x)
    if isinstance(pseudo, Tensor):
        labels("pseudo", pseudo, n_unlabeled, x)
    elif pseudo not in ("weak", "strong"):
        raise ValueError(f"pseudo must be 'weak', 'strong' or a tensor of labels, not {pseudo!r}")
    if truth is not None:
        labels("truth", truth, n_unlabeled, x)
    return classes


def _shape(name: str, x: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, not {tuple(x.shape)}")
    _place(name, x, "the logits are", like)


def _place(name: str, x: Tensor, others_are: str, like: Tensor) -> None:
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device}, but {others_are} on {like.device}")


def _number(name: str, value: float) -> None:
    """Looking at a tensor's value would wait for the GPU."""
    if isinstance(value, Tensor):
        raise TypeError(f"{name} must be a number, not a tensor")
