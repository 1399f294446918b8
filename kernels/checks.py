"""Checks of the losses' arguments: shapes, types, devices and numbers, never values of tensors."""

import torch
from torch import Tensor

from mpl_fast.kernels.outputs import Scalar, TeacherInputs

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def logits(x: Tensor) -> None:
    """(rows, classes) floating point."""
    if x.dim() != 2:
        raise ValueError(f"logits must have 2 dimensions (rows, classes), not {tuple(x.shape)}")
    if x.dtype not in FLOATS:
        raise TypeError(f"logits must be floating point, not {x.dtype}")
    if x.shape[1] == 0:
        raise ValueError(f"logits must have at least one class, not {tuple(x.shape)}")


def labels(name: str, x: Tensor, rows: int, like: Tensor) -> None:
    """Class indices: one int64 for each row. Values out of range are not looked for here."""
    _shape(name, x, (rows,), like)
    if x.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, not {x.dtype}")


def floats(name: str, x: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """Floating point of a shape, such as a weight for each row."""
    _shape(name, x, shape, like)
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be floating point, not {x.dtype}")


def smoothing(value: float) -> None:
    """Label smoothing is a share of the probability."""
    _number("label_smoothing", value)
    if not 0.0 <= value < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), not {value}")


def temperature(value: float) -> None:
    """A temperature divides: neither it nor its inverse may become 0 in float32."""
    _number("temperature", value)
    if not 1e-38 <= value <= 1e38:
        raise ValueError(f"temperature must be positive and finite, not {value}")


def threshold(value: float) -> None:
    """A confidence; above 1 it masks every row. NaN would do so silently."""
    _number("threshold", value)
    if not value >= 0.0:
        raise ValueError(f"threshold must be a number >= 0, not {value}")


def scalar(name: str, value: Scalar, like: Tensor) -> None:
    """A weight is a number or a 0-dim tensor where the logits are: moving it would synchronize."""
    if not isinstance(value, Tensor):
        return
    if value.dim() != 0:
        raise ValueError(f"{name} must be a number or a 0-dim tensor, not {tuple(value.shape)}")
    _same_device(name, value, "the logits are", like)


def feedback(old: Tensor, new: Tensor, average: Tensor | None, momentum: float) -> None:
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
        _same_device(name, x, "old is", old)
    if average is not None and average.dtype != torch.float32:
        raise TypeError(f"average must be float32, as the feedback is, not {average.dtype}")
    _number("momentum", momentum)
    if not 0.0 <= momentum <= 1.0:
        raise ValueError(f"momentum must be in [0, 1], not {momentum}")


def student(x: Tensor, pseudo: Tensor, label_smoothing: float, weight: Tensor | None) -> None:
    """All arguments of a student's loss."""
    logits(x)
    if pseudo.dim() == 2:
        floats("pseudo", pseudo, tuple(x.shape), x)
    else:
        labels("pseudo", pseudo, x.shape[0], x)
    smoothing(label_smoothing)
    if weight is not None:
        floats("weight", weight, (x.shape[0],), x)


def teacher(inputs: TeacherInputs) -> None:
    """All arguments of the teacher's loss."""
    x, target, n_unlabeled, pseudo = inputs.logits, inputs.target, inputs.n_unlabeled, inputs.pseudo
    logits(x)
    n_labeled = target.shape[0] if target.dim() else 0  # a 0-dim target is refused by `labels`
    if n_unlabeled < 0 or x.shape[0] != n_labeled + 2 * n_unlabeled:
        raise ValueError(
            f"{x.shape[0]} rows of logits are not {n_labeled} labeled + 2 x {n_unlabeled}"
            " unlabeled ones"
        )
    labels("target", target, n_labeled, x)
    temperature(inputs.temperature)
    threshold(inputs.threshold)
    smoothing(inputs.label_smoothing)
    scalar("uda_weight", inputs.uda_weight, x)
    scalar("feedback", inputs.feedback, x)
    if isinstance(pseudo, Tensor):
        labels("pseudo", pseudo, n_unlabeled, x)
    elif pseudo not in ("weak", "strong"):
        raise ValueError(f"pseudo must be 'weak', 'strong' or a tensor of labels, not {pseudo!r}")
    if inputs.truth is not None:
        labels("truth", inputs.truth, n_unlabeled, x)


def _shape(name: str, x: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, not {tuple(x.shape)}")
    _same_device(name, x, "the logits are", like)


def _same_device(name: str, x: Tensor, others_are: str, like: Tensor) -> None:
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device}, but {others_are} on {like.device}")


def _number(name: str, value: float) -> None:
    """Reading a tensor's value would wait for the GPU."""
    if isinstance(value, Tensor):
        raise TypeError(f"{name} must be a number, not a tensor")
