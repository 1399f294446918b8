"""The null GPU as seen by a process on it: what was launched, and operators of cuDNN.

Importing it makes the stand-ins for cuDNN known to PyTorch: results of the right shape, dtype and
memory format, whose values are not computed.
"""

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_stubs = ctypes.CDLL(None)
_stubs.null_log.restype = ctypes.c_char_p


class _Counts(ctypes.Structure):
    _fields_ = [("launches", ctypes.c_long), ("graph_launches", ctypes.c_long)]


class Seen(NamedTuple):
    """What happened since `watch`."""

    launches: int
    """Kernels, also those that a capture recorded."""
    graph_launches: int
    log: list[str]
    """As stubs/null.h defines its lines."""

    def lines(self, *kinds: str) -> list[str]:
        return [line for line in self.log if line.startswith(kinds)]


def watch() -> None:
    """Counts and logs from here on."""
    _stubs.null_start(1)


def note(line: str) -> None:
    """Adds a line to the log."""
    _stubs.null_note(b"%s", line.encode())


def seen() -> Seen:
    """What happened since `watch`, where counting ends."""
    counts = _Counts.in_dll(_stubs, "null_counts")
    log = _stubs.null_log().decode(errors="replace").splitlines()
    found = Seen(counts.launches, counts.graph_launches, log)
    _stubs.null_start(0)
    return found


def zeros_on_host(values: Tensor) -> Tensor:
    """In place of values that the host reads and nobody has computed."""
    return torch.zeros_like(values, device="cpu")


def no_hits(probabilities: Tensor, labels: Tensor) -> Tensor:
    """In place of `mpl_fast.training.evaluate._hits`."""
    return torch.tensor([0.0, 0.0, len(labels), 0.0])


def always_finite(learner: object) -> Tensor:
    """In place of `mpl_fast.learner.Learner.finite`."""
    return torch.tensor(True)


def _launch(name: str) -> None:
    stream = torch.cuda.current_stream().cuda_stream
    _stubs.null_launch(name.encode(), ctypes.c_void_p(stream))


CHANNELS_LAST = torch.channels_last


def _pair(numbers: Sequence[int]) -> Sequence[int]:
    return numbers if len(numbers) == 2 else [*numbers] * 2


def _convolution(
    images: Tensor,
    weight: Tensor,
    padding: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    benchmark: bool,
    deterministic: bool,
    allow_tf32: bool,
) -> Tensor:
    in_order = images.is_contiguous(memory_format=CHANNELS_LAST)
    if not in_order:
        _launch("cudnn: transposes the images")
    _launch("cudnn: convolution")
    last = in_order or weight.is_contiguous(memory_format=CHANNELS_LAST)
    sides = [
        (side + 2 * pad - spread * (kernel - 1) - 1) // step + 1
        for side, kernel, pad, step, spread in zip(
            images.shape[2:],
            weight.shape[2:],
            _pair(padding),
            _pair(stride),
            _pair(dilation),
            strict=True,
        )
    ]
    return torch.empty(
        (len(images), len(weight), *sides),
        dtype=images.dtype,
        device=images.device,
        memory_format=CHANNELS_LAST if last else torch.contiguous_format,
    )


def _convolution_backward(
    gradient: Tensor,
    images: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    of_images = of_weight = of_bias = None
    if not gradient.is_contiguous(memory_format=CHANNELS_LAST):
        _launch("cudnn: transposes the gradient")
    if wanted[0]:
        _launch("cudnn: gradient of the images")
        of_images = torch.empty_like(images, memory_format=CHANNELS_LAST)
    if wanted[1]:
        _launch("cudnn: gradient of the weight")
        of_weight = torch.empty_like(weight, memory_format=CHANNELS_LAST)
    if wanted[2]:
        _launch("cudnn: gradient of the bias")
        of_bias = torch.empty(len(weight), dtype=gradient.dtype, device=gradient.device)
    return of_images, of_weight, of_bias


def _batch_norm(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _launch("cudnn: batch norm")
    channels = images.shape[1] if training else 0
    mean, deviation = (torch.empty(channels, device=images.device) for _ in range(2))
    reserved = torch.empty(0, dtype=torch.uint8, device=images.device)
    return torch.empty_like(images), mean, deviation, reserved


def _batch_norm_backward(
    images: Tensor,
    gradient: Tensor,
    weight: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor | None,
    deviation: Tensor | None,
    epsilon: float,
    reserved: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    _launch("cudnn: gradient of batch norm")
    return torch.empty_like(images), torch.empty_like(weight), torch.empty_like(weight)


_aten = torch.library.Library("aten", "IMPL")
_aten.impl("cudnn_convolution", _convolution, "CUDA")
_aten.impl("convolution_backward", _convolution_backward, "CUDA")
_aten.impl("cudnn_batch_norm", _batch_norm, "CUDA")
_aten.impl("cudnn_batch_norm_backward", _batch_norm_backward, "CUDA")
