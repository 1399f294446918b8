"""Frozen trunk: only the classifier head is trained, and batch norm statistics are fixed."""

import torch.nn.functional as F
from torch import Tensor, nn

from mpl_fast.models.head import head_prefixes


def freeze(network: nn.Module) -> None:
    """Disables gradients outside the classifier head, and replaces batch norms by `FrozenNorm`.

    Dropout is unchanged. Keys of `state_dict` are unchanged too, so a checkpoint of a frozen
    network fits one that is not frozen.
    """
    head = head_prefixes(network)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.startswith(head))
    for name, module in [*network.named_modules()]:
        norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if norm and not f"{name}.".startswith(head):
            network.set_submodule(name, FrozenNorm(module))


class FrozenNorm(nn.Module):
    """Batch norm that is always in evaluation mode.

    Not a subclass of PyTorch's batch norm, so that code which makes those use batch statistics
    skips it. Submodules of the norm, such as timm's activation, are applied after it.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__()
        self.eps = norm.eps
        self.weight, self.bias = norm.weight, norm.bias
        self.register_buffer("running_mean", norm.running_mean)
        self.register_buffer("running_var", norm.running_var)
        self.register_buffer("num_batches_tracked", norm.num_batches_tracked)
        for name, module in norm.named_children():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )
        for module in self.children():
            x = module(x)
        return x
