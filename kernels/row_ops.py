"""The ops of the functions that look at one row at a time: each allocates, and launches a kernel.

x: (rows, W) logits with neighbors in a row next to each other in memory. Targets that are logits,
and directions, lie like that too; uniform numbers and labels are contiguous. The columns from
num_classes on are padding.

Each op names its kernel where it calls `wrap_triton`, and does not leave that to a function which
they share: the compiler reads which kernels an op has from there (see `launch.wrap_triton`).
"""

from typing import Any

import torch
from torch import Tensor

from mpl_fast.kernels.cosine import cosine_gradient_kernel, cosine_kernel
from mpl_fast.kernels.exact import exact_gradient_kernel, exact_kernel
from mpl_fast.kernels.launch import align, launch_config, register, wrap_triton
from mpl_fast.kernels.pseudo import pseudo_kernel


def _gradient_outputs(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _pseudo_outputs(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.shape[0]
    floats = (x.new_empty(rows, dtype=torch.float32), x.new_empty(rows, dtype=torch.float32))
    return x.new_empty(rows, dtype=torch.int64), *floats


def _pseudo(
    x: Tensor, uniforms: Tensor, drawn: bool, temperature: float, num_classes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Labels, confidences and entropies, each (rows,). uniforms: any tensor unless drawn."""
    label, confidence, entropy = _pseudo_outputs(x)
    rows, width = x.shape
    if rows == 0:
        return label, confidence, entropy
    config = launch_config(width)
    # Triton launches on the current device, not on the tensors'.
    with torch.cuda.device_of(x):
        wrap_triton(pseudo_kernel, x, rows, config.warps)(
            x,
            x.stride(0),
            uniforms,
            label,
            confidence,
            entropy,
            1.0 / temperature,
            C=num_classes,
            W=width,
            DRAWN=drawn,
            ALIGN=align(x.stride(0)),
            SINGLE=config.single,
            BLOCK=config.block,
        )
    return label, confidence, entropy


def _cosine_outputs(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    rows = x.shape[0]
    part = x.new_empty((2, rows), dtype=torch.float32)
    return part, x.new_empty((4, rows), dtype=torch.float32)


def _cosine(
    x: Tensor, target: Tensor, temperature: float, threshold: float, num_classes: int
) -> tuple[Tensor, Tensor]:
    """Shares of loss and mask rate (2, rows), and what the gradient needs (4, rows)."""
    part, saved = _cosine_outputs(x)
    rows, width = x.shape
    if rows == 0:
        return part, saved
    soft, config = target.dim() == 2, launch_config(width)
    pitch = target.stride(0) if soft else 0
    with torch.cuda.device_of(x):
        wrap_triton(cosine_kernel, x, rows, config.warps)(
            x,
            x.stride(0),
            target,
            target if soft else x,
            pitch,
            saved,
            part,
            rows,
            1.0 / temperature,
            float(threshold),
            C=num_classes,
            W=width,
            SOFT=soft,
            ALIGN=align(x.stride(0), pitch),
            BLOCK=config.block,
        )
    return part, saved


def _cosine_gradient(
    x: Tensor,
    target: Tensor,
    saved: Tensor,
    upstream: Tensor,
    temperature: float,
    num_classes: int,
) -> Tensor:
    """The gradient (rows, W). upstream: 0-dim, the gradient from above."""
    gradient = _gradient_outputs(x)
    rows, width = x.shape
    if rows == 0:
        return gradient
    soft, config = target.dim() == 2, launch_config(width)
    pitch = target.stride(0) if soft else 0
    with torch.cuda.device_of(x):
        wrap_triton(cosine_gradient_kernel, x, rows, config.warps)(
            x,
            x.stride(0),
            target,
            target if soft else x,
            pitch,
            saved,
            upstream,
            gradient,
            rows,
            1.0 / temperature,
            C=num_classes,
            W=width,
            SOFT=soft,
            ALIGN=align(x.stride(0), pitch),
            BLOCK=config.block,
        )
    return gradient


def _exact_outputs(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    rows = x.shape[0]
    part = x.new_empty(rows, dtype=torch.float32)
    return part, x.new_empty((3, rows), dtype=torch.float32)


def _exact(
    x: Tensor, direction: Tensor, weight: Tensor, temperature: float, num_classes: int
) -> tuple[Tensor, Tensor]:
    """Shares of the value (rows,), and what the gradient needs (3, rows). weight: 0-dim."""
    part, saved = _exact_outputs(x)
    rows, width = x.shape
    if rows == 0:
        return part, saved
    config = launch_config(width)
    with torch.cuda.device_of(x):
        wrap_triton(exact_kernel, x, rows, config.warps)(
            x,
            x.stride(0),
            direction,
            direction.stride(0),
            weight,
            saved,
            part,
            rows,
            1.0 / temperature,
            C=num_classes,
            W=width,
            ALIGN=align(x.stride(0), direction.stride(0)),
            BLOCK=config.block,
        )
    return part, saved


def _exact_gradient(
    x: Tensor,
    direction: Tensor,
    weight: Tensor,
    saved: Tensor,
    upstream: Tensor,
    temperature: float,
    num_classes: int,
) -> Tensor:
    """The gradient (rows, W). upstream: 0-dim, the gradient from above."""
    gradient = _gradient_outputs(x)
    rows, width = x.shape
    if rows == 0:
        return gradient
    config = launch_config(width)
    with torch.cuda.device_of(x):
        wrap_triton(exact_gradient_kernel, x, rows, config.warps)(
            x,
            x.stride(0),
            direction,
            direction.stride(0),
            weight,
            saved,
            upstream,
            gradient,
            rows,
            1.0 / temperature,
            C=num_classes,
            W=width,
            ALIGN=align(x.stride(0), direction.stride(0)),
            BLOCK=config.block,
        )
    return gradient


pseudo = register("mpl_fast::pseudo_labels", _pseudo, _pseudo_outputs)
cosine = register("mpl_fast::cosine", _cosine, _cosine_outputs)
cosine_gradient = register("mpl_fast::cosine_gradient", _cosine_gradient, _gradient_outputs)
exact = register("mpl_fast::exact", _exact, _exact_outputs)
exact_gradient = register("mpl_fast::exact_gradient", _exact_gradient, _gradient_outputs)
