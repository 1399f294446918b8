"""Directional derivatives (Jacobian-vector products) of a network's logits by its weights.

The network is called with other weights and is not changed: adding a perturbation and subtracting
it again would not restore float32 weights, and replicas would drift apart.
"""

import functools
import importlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from mpl_fast.errors import ConfigError
from mpl_fast.learner.norm_jvp import FusedNorms
from mpl_fast.learner.rng import replay_rng, rng_state

EPSILON = 0.01  # length of the central difference's step in weight space, as in MetaSemi


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Matrix products and convolutions in float32 proper: the 10 bits of TF32's mantissa leave a
    small difference few digits. A CUDA graph records the kernels chosen inside."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


class FunctionalNetwork(nn.Module):
    """A network as a function of its weights and of images; never compiled."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.names = [f"network.{n}" for n, p in network.named_parameters() if p.requires_grad]

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network.forward(images)  # not __call__, which may be compiled
        return logits

    def at(self, weights: Sequence[Tensor], images: Tensor) -> Tensor:
        """Logits ``(N, C)`` with `weights`, a list like the trained parameters, in their place."""
        named = dict(zip(self.names, weights, strict=True))
        logits: Tensor = torch.func.functional_call(self, named, (images,))
        return logits


class WeightDerivative:
    """The derivative of logits along a direction in weight space.

    `method`: forward-mode differentiation, a central difference, or auto, which is forward until a
    layer has no forward mode, then central. (PyTorch treats operations of `torch.library` as
    constants in forward mode: use central for networks that have any.)
    """

    def __init__(
        self, network: nn.Module, method: Literal["auto", "forward", "central"] = "auto"
    ) -> None:
        self.function, self.method = FunctionalNetwork(network), method

    def jvp(
        self,
        weights: Sequence[Tensor],
        direction: Sequence[Tensor],
        images: Tensor,
        epsilon: float = EPSILON,
    ) -> Tensor:
        """The derivative ``(N, C)`` of the logits at `weights` along `direction`, float32 or wider.

        Both are lists like the trained parameters. The network stays in its mode (training or
        evaluation); dropout masks are drawn once, and used twice by the central difference.
        Raises `ConfigError` if the method is forward and a layer has no forward mode.
        """
        before = rng_state(images.device)
        # Not in 16 bits, in which a small difference would have no digits left.
        with torch.autocast(images.device.type, enabled=False):
            images = images.to(weights[0].dtype)
            if self.method != "central":
                try:
                    return self._forward(weights, direction, images)
                except NotImplementedError as error:
                    self._fall_back(error)
            with replay_rng(before, images.device):  # a failed attempt may have drawn
                return self._central(weights, direction, images, epsilon)

    def _fall_back(self, error: NotImplementedError) -> None:
        """Changes the method to central, with a warning; raises if it is forward and not auto."""
        reason = str(error).splitlines()[0].rstrip(".")
        if self.method == "forward":
            raise ConfigError(
                "derivative forward: a layer of this network has no forward-mode differentiation; "
                f"take central or auto ({reason})"
            ) from error
        self.method = "central"
        warnings.warn(
            "a layer of this network has no forward-mode differentiation, so two more forward "
            f"passes take its derivative ({reason})",
            stacklevel=3,
        )

    @torch.no_grad()
    def _forward(
        self, weights: Sequence[Tensor], direction: Sequence[Tensor], images: Tensor
    ) -> Tensor:
        _load_forward_rules()
        # Not torch.func.jvp: dropout of channels_last images draws another mask in there.
        with forward_ad.dual_level(), FusedNorms():
            pairs = zip(weights, direction, strict=True)
            dual = [forward_ad.make_dual(weight, change) for weight, change in pairs]
            change = forward_ad.unpack_dual(self.function.at(dual, images)).tangent
        if change is None:
            raise NotImplementedError("the logits have no tangent")
        return _at_least_float32(change)

    @torch.no_grad()
    @_without_tf32()
    def _central(
        self, weights: Sequence[Tensor], direction: Sequence[Tensor], images: Tensor, epsilon: float
    ) -> Tensor:
        norm = torch.stack(list(torch._foreach_norm(list(direction)))).norm()
        step = epsilon / norm.clamp_min(torch.finfo(norm.dtype).tiny)
        scaled = torch._foreach_mul(list(direction), step)
        before = rng_state(images.device)
        above = self.function.at(torch._foreach_add(list(weights), scaled), images)
        with replay_rng(before, images.device):
            below = self.function.at(torch._foreach_sub(list(weights), scaled), images)
        change: Tensor = (above - below) / (2.0 * step)
        return change


@functools.cache
def _load_forward_rules() -> None:
    """Loads PyTorch's forward-mode rules, without the deprecation warning of that import."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
        importlib.import_module("torch._decomp.decompositions_for_jvp")


def log_softmax_jvp(logits: Tensor, change: Tensor) -> Tensor:
    """The derivative of log softmax(logits) along `change`; all are ``(N, C)``."""
    p = _at_least_float32(logits.detach()).softmax(-1)
    return change - (p * change).sum(-1, keepdim=True)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
