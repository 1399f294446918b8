"""Derivatives of a network along a direction in weight space, without touching the network.

The network is called with other weights in their place, so nothing has to be put back: adding a
perturbation and taking it away again does not restore float32 weights, and replicas drift apart.
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
from mpl_fast.learner.rng import replay_rng, rng_state

EPSILON = 0.01  # of the central difference, MetaSemi's: length of the step in weight space


class Function(nn.Module):
    """A network as a function of weights that are given with each call, never compiled."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.names = [f"network.{n}" for n, p in network.named_parameters() if p.requires_grad]

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network.forward(images)  # past a compiled __call__
        return logits

    def at(self, weights: Sequence[Tensor], images: Tensor) -> Tensor:
        """Logits ``(N, C)`` under other values of the trained parameters, in their order."""
        given = dict(zip(self.names, weights, strict=True))
        logits: Tensor = torch.func.functional_call(self, given, (images,))
        return logits


class Derivative:
    """d logits / d weights along a direction, by forward-mode differentiation or by difference.

    `method`: forward, central, or auto, which is forward until a layer turns out not to have it.
    (PyTorch takes an operation of `torch.library` for a constant in forward mode: such a network
    wants central.)
    """

    def __init__(
        self, network: nn.Module, method: Literal["auto", "forward", "central"] = "auto"
    ) -> None:
        self.function, self.method = Function(network), method

    def jvp(
        self,
        weights: Sequence[Tensor],
        direction: Sequence[Tensor],
        images: Tensor,
        epsilon: float = EPSILON,
    ) -> Tensor:
        """``(N, C)`` float32 (or float64): how fast logits change at `weights` along `direction`.

        Both are lists like the trained parameters. Modes (training, dropout, statistics) are those
        that the network is in; random numbers are drawn once (forward) or twice alike (central).
        Raises `ConfigError` if the method is forward and a layer does not have it.
        """
        before = rng_state(images.device)
        # Not in 16 bits: a small difference would have no digits left, and batch norm's forward
        # derivative is float32, which the next convolution would not take.
        with torch.autocast(images.device.type, enabled=False):
            images = images.to(weights[0].dtype)
            if self.method != "central":
                try:
                    return self._forward(weights, direction, images)
                except NotImplementedError as error:
                    self._give_up_forward(error)
            with replay_rng(before, images.device):  # whatever a failed attempt has drawn
                return self._central(weights, direction, images, epsilon)

    def _give_up_forward(self, error: NotImplementedError) -> None:
        """Goes over to central differences and says so, or raises if `method` is forward."""
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

    def _forward(
        self, weights: Sequence[Tensor], direction: Sequence[Tensor], images: Tensor
    ) -> Tensor:
        _load_rules()
        # Not torch.func.jvp: dropout of channels_last images draws another mask in there.
        with forward_ad.dual_level():
            pairs = zip(weights, direction, strict=True)
            dual = [forward_ad.make_dual(weight, change) for weight, change in pairs]
            change = forward_ad.unpack_dual(self.function.at(dual, images)).tangent
        if change is None:
            raise NotImplementedError("what it returns has no tangent")
        return _lifted(change)

    @torch.no_grad()
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
def _load_rules() -> None:
    """PyTorch makes some forward rules when they are first needed, and warns of how it does it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
        importlib.import_module("torch._decomp.decompositions_for_jvp")


def log_softmax_jvp(logits: Tensor, change: Tensor) -> Tensor:
    """How fast log softmax(logits) changes if the logits change by `change`; both ``(N, C)``."""
    p = _lifted(logits.detach()).softmax(-1)
    return change - (p * change).sum(-1, keepdim=True)


@contextmanager
def own_statistics(network: nn.Module) -> Iterator[None]:
    """Inside, batch norm normalizes by the batch and leaves its running statistics alone.

    In evaluation mode as in training mode: without running statistics it has nothing else.
    """
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    # A frozen norm stays what it was pretrained to be.
    norms = [m for m in norms if m.weight is None or m.weight.requires_grad]
    kept = [(m.running_mean, m.running_var, m.num_batches_tracked) for m in norms]
    synchronized = [m for m in norms if isinstance(m, nn.SyncBatchNorm)]
    for norm in norms:
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    for norm in synchronized:  # which insist on a counter while they keep statistics
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in synchronized:
            norm.track_running_stats = True
        for norm, (mean, var, count) in zip(norms, kept, strict=True):
            norm.running_mean, norm.running_var, norm.num_batches_tracked = mean, var, count


def _lifted(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
